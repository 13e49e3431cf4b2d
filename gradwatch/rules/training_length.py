"""The knob `training_length`: trainings that end before the gradient is small."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation
from gradwatch.rules.convergence import (
    LARGEST_FACTOR,
    STEP_LIMITED,
    Convergence,
    at_the_edge,
    check_target,
    converging,
)
from gradwatch.rules.instability import unstable
from gradwatch.rules.noise_instability import noise_unstable
from gradwatch.rules.noise_scale import noise_scale
from gradwatch.rules.recent import differs
from gradwatch.rules.stall import stalled
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import steps_for_target

LARGEST_FLOOR: Final = 0.5
"""Share of the noise floor in the target from which the number of steps runs off to infinity."""


@dataclass(frozen=True)
class TrainingLength(Rule):
    """Recommends the number of steps after which the bound is at the target.

    Where the steps are what limits the gradient (share of the noise in the bound below 0.3 at the
    planned end): `N = 2 D/(eps g (2 - L g) - L g² sigma²/B)`, rounded up. With a target but
    without a plan it is compared with the steps so far.

    Silent without a plan and a target, where `NoiseFloor` is undecided or violated, where the
    noise floor is more than half of the target, where more than ten times the steps would be
    needed, at the edge of stability, and while the training stalls or is unstable.

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
        state, planned = converging(history), history.model.planned_steps
        target = state.target(self.target) if state is not None else None
        if state is None or target is None or (planned is None and self.target is None):
            return
        current = max(state.steps, float(planned or 0))
        split = state.split_after(current)
        missing = split.noise_share < STEP_LIMITED and split.noise_term <= LARGEST_FLOOR * target
        if not missing or _wants_smaller_steps(history):
            return
        needed = steps_for_target(
            state.loss_gap,
            state.smoothness,
            state.variance,
            state.batch_size,
            state.step_size,
            target,
        )
        if current < needed <= LARGEST_FACTOR * current and differs(current, needed):
            yield _recommend(state, current, needed, target)


def _wants_smaller_steps(history: History) -> bool:
    """Whether more of these steps are no remedy, or the bound is about to lose its meaning."""
    if at_the_edge(history) is not None or unstable(history) is not None:
        return True
    noisy = noise_unstable(history) is not None
    return noisy or stalled(history, noise_scale(history)) is not None


def _recommend(state: Convergence, current: float, needed: float, target: float) -> Recommendation:
    share = state.split_after(current).noise_share
    return Recommendation(
        knob="training_length",
        current=current,
        proposed=needed,
        unit="step",
        severity="info",
        reason=(
            f"only {share:.0%} of the bound on |grad|² is noise after {number(current)} steps: the "
            f"steps are what is missing; at the present L and sigma², {number(needed)} steps bring "
            f"the bound down to {number(target)} ({state})"
        ),
        expected=f"the mean of |grad|² over the training at {number(target)} or below; a smaller "
        "gradient need not mean a lower loss",
        evidence=(state.verdict,),
        source=state.verdict.source,
    )
