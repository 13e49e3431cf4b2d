"""The knob `training_length`: trainings that end before the gradient is small."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation
from gradwatch.rules.convergence import Convergence, check_target, converging
from gradwatch.rules.recent import differs
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import steps_for_target

LARGEST_FACTOR: Final = 1000.0
"""A training that would have to be longer than this many times is no advice."""


@dataclass(frozen=True)
class TrainingLength(Rule):
    """Recommends the number of steps after which the bound is at the target.

    Where the steps are what limits the gradient (share of the noise in the bound below 0.3):
    `N = 2 D/(eps g (2 - L g) - L g² sigma²/B)`, rounded up. It is compared with the planned
    number of steps, or where that is not known with the steps so far.

    Silent where `NoiseFloor` is undecided or violated, and where no number of steps reaches the
    target at this learning rate.

    Args:
        target: wanted mean of `||grad f||²` [L²/P²]; a quarter of what is measured if None.

    Raises:
        ConfigError: if `target` is not a positive number.

    References:
        derived from the descent lemma, as Ghadimi and Lan 2013, SIAM J. Optim. 23, theorem 2.1.
    """

    target: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target)

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        state = converging(history)
        target = state.target(self.target) if state is not None else None
        if state is None or target is None or not state.step_limited:
            return
        planned = history.model.planned_steps
        current = float(planned) if planned else state.steps
        needed = steps_for_target(
            state.loss_gap,
            state.smoothness,
            state.variance,
            state.batch_size,
            state.step_size,
            target,
        )
        too_many = math.isinf(needed) or needed > LARGEST_FACTOR * current
        if not too_many and needed > current and differs(current, needed):
            yield _recommend(state, current, needed, target)


def _recommend(state: Convergence, current: float, needed: float, target: float) -> Recommendation:
    return Recommendation(
        knob="training_length",
        current=current,
        proposed=needed,
        unit="step",
        severity="info",
        reason=(
            f"only {state.split.noise_share:.0%} of the bound on |grad|² is noise: the steps are "
            f"what is missing; {number(needed)} steps bring the bound down to {number(target)}, "
            f"or fewer at a larger learning rate ({state})"
        ),
        expected=f"the mean of |grad|² over the training at {number(target)} or below",
        evidence=(state.verdict,),
        source=state.verdict.source,
    )
