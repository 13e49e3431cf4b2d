"""The knob `learning_rate`: steps too large for the noise, too small for the time, or unstable."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation, Severity
from gradwatch.rules.convergence import (
    LARGEST_FACTOR,
    STEP_LIMITED,
    Convergence,
    at_the_edge,
    check_target,
    converging,
    floor_at,
)
from gradwatch.rules.divergence import diverging
from gradwatch.rules.noise_scale import noise_scale
from gradwatch.rules.recent import differs
from gradwatch.rules.rescaling import rescaled
from gradwatch.rules.stall import stalled
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import best_learning_rate, learning_rate_for_floor

CAUTION: Final = 0.5
"""A proposal to raise the learning rate stays below this over L."""


@dataclass(frozen=True)
class LearningRate(Rule):
    """Recommends one learning rate, by the first of these that applies.

    - The loss is above the first one and does not fall, and `lr L > 2` in more than half of the
      newest readings: 0.5/L. Silent with momentum.
    - More than a tenth of the newest steps have `lr L > 1.8`: no bound holds there; 1/L is the
      largest step with a guarantee. Not said of an L from secants, which can be far too high, nor
      with momentum.
    - The loss is flat, or a target is given, and the noise floor is what limits the gradient
      (share of the noise above 0.7, measured within a factor 4 of the floor): the step whose floor
      is the target, `2 eps/(L (eps + sigma²/B))`.
    - The loss is flat and the stall ratio is significantly above 1 in three readings at least 100
      steps apart: lr x 0.3. Silent with momentum.
    - The batch size was changed and the learning rate was not: the one that fits. Silent where
      noise is or was most of the bound, or the run stalled: a larger batch was the remedy then.
    - The planned steps are what limits the gradient (share of the noise at their end below 0.3):
      the step with the smallest bound, but not above 0.5/L, nor above ten times the present one.

    Silent where `NoiseFloor` is undecided or violated, except the first (the fourth and fifth:
    where the noise scale is not significant, in the warm-up, under frequent or unknown clipping,
    for other optimizers than SGD; Adam in the fifth only, with the square root). All of this is
    about the gradient of the training objective and not about test error.

    Args:
        target: wanted mean of `||grad f||²` [L²/P²]; a quarter of what is measured if None.

    Raises:
        ConfigError: if `target` is not a positive number.

    References:
        derived from the descent lemma, as Ghadimi and Lan 2013, SIAM J. Optim. 23; noise scale of
        McCandlish et al. 2018, arXiv:1812.06162.
    """

    target: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target)

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        state, scale = converging(history), noise_scale(history)
        candidates = (
            diverging(history),
            _to_the_guarantee(at_the_edge(history)),
            _to_the_floor(state, self.target),
            stalled(history, scale),
            rescaled(history, scale) if scale and scale.lr_is_step_size else None,
            _to_the_best(state, self.target, history),
        )
        return [item for item in candidates if item is not None][:1]


def _recommend(
    state: Convergence, step_size: float, reason: str, expected: str, severity: Severity
) -> Recommendation:
    return Recommendation(
        knob="learning_rate",
        current=state.learning_rate,
        proposed=state.as_learning_rate(step_size),
        unit="P²/L",
        severity=severity,
        reason=f"{reason} ({state})",
        expected=expected,
        evidence=(state.verdict,),
        source=state.verdict.source,
    )


def _to_the_guarantee(state: Convergence | None) -> Recommendation | None:
    if state is None:
        return None
    wanted = 1.0 / state.smoothness
    if wanted >= state.step_size or not differs(state.step_size, wanted):
        return None
    return Recommendation(
        knob="learning_rate",
        current=state.learning_rate,
        proposed=state.as_learning_rate(wanted),
        unit="P²/L",
        severity="info",
        reason=(
            f"lr x L was above 1.8 in {state.edge_share:.0%} of the newest steps, at the edge of "
            f"stability where no bound holds; L = {number(state.smoothness)}; lr <= 1/L is the "
            f"largest step with a guarantee{state.caveats}"
        ),
        expected="the bounds of RandomlyStoppedSgd and NoiseFloor apply again",
        evidence=(state.verdict,),
        source=state.verdict.source,
    )


def _to_the_floor(state: Convergence | None, wanted: float | None) -> Recommendation | None:
    target = state.target(wanted) if state is not None else None
    if state is None or target is None or not state.needs_less_noise(wanted):
        return None
    size = learning_rate_for_floor(state.smoothness, state.variance, state.batch_size, target)
    if size >= state.step_size or not differs(state.step_size, size):
        return None
    reason = (
        f"{state.no_way_down}; for |grad|² <= {number(target)} lower the learning rate, or enlarge "
        "the batch"
    )
    return _recommend(state, size, reason, floor_at(target), state.harm)


def _to_the_best(
    state: Convergence | None, wanted: float | None, history: History
) -> Recommendation | None:
    planned = history.model.planned_steps
    if state is None or planned is None or state.target(wanted) is None:
        return None
    steps = max(state.steps, float(planned))
    share = state.split_after(steps).noise_share
    if not share < STEP_LIMITED:
        return None
    best = best_learning_rate(
        state.loss_gap, state.smoothness, state.variance, state.batch_size, steps
    )
    size = min(best, CAUTION / state.smoothness, LARGEST_FACTOR * state.step_size)
    if size <= state.step_size or not differs(state.step_size, size):
        return None
    reason = (
        f"at the end of the {number(steps)} planned steps only {share:.0%} of the bound on |grad|² "
        f"is noise: the steps are what is missing; at the present L and sigma² the bound is "
        f"smallest then at lr {number(state.as_learning_rate(best))}, but 0.5/L, and "
        f"{LARGEST_FACTOR:g} times the present lr, is as far as is safe"
    )
    expected = "stationarity falls faster; L may rise, so look again after the change"
    return _recommend(state, size, reason, expected, "info")
