"""The knob `learning_rate`: steps too large for the noise, too small for the time, or unstable."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from typing_extensions import override

from gradwatch.interfaces import Rule
from gradwatch.records import History, Recommendation, Severity
from gradwatch.rules.combination import combined, with_curvature
from gradwatch.rules.conditioning import ill_conditioned
from gradwatch.rules.convergence import (
    LARGEST_FACTOR,
    STEP_LIMITED,
    Convergence,
    check_target,
    converging,
    floor_at,
)
from gradwatch.rules.divergence import diverging
from gradwatch.rules.headroom import headroom
from gradwatch.rules.instability import unstable
from gradwatch.rules.limits import largest_raise
from gradwatch.rules.noise_instability import noise_unstable
from gradwatch.rules.noise_scale import noise_scale
from gradwatch.rules.recent import differs
from gradwatch.rules.rescaling import rescaled
from gradwatch.rules.stall import stalled
from gradwatch.rules.warm_up import warm_up
from gradwatch.table import number
from gradwatch.theory.gradient_convergence import best_learning_rate, learning_rate_for_floor

CAUTION: Final = 0.5
"""A proposal to raise the learning rate stays below this over L."""


@dataclass(frozen=True)
class LearningRate(Rule):
    """Recommends one learning rate, by the first of these that applies.

    Below, r is the `stability_ratio`, the sharpness over the stability threshold of the optimizer.

    Lower it, to the smallest of what these ask for, with all their reasons:

    - r >= 1.2 in three readings and the smoothed loss rose by more than 5 % over them; or the loss
      is above the first one, or not finite, and r was 1.2 or more at the start or is now: 0.8 lr/r,
      but 0.5 lr/r of the start.
      Where r is not measured: the loss is above the first one and does not fall, and `lr L > 2` in
      more than half of the newest readings of plain SGD: 0.5/L.
    - The loss rose, gradient noise makes the training unstable at r < 1, and neither momentum nor
      batch size is the better remedy: 0.8 of the limit. See `Momentum`.
    - The loss is flat, or a target is given, and the noise floor is what limits the gradient
      (share of the noise above 0.7, measured within a factor 4 of the floor): the step whose floor
      is the target, `2 eps/(L (eps + sigma²/B))`. Or else the loss is flat and the stall ratio is
      significantly above 1 in three readings at least 100 steps apart: lr x 0.3. Both are a matter
      of noise, and win over any room that the curvature leaves.

    Or else one of these:

    - r > 1 at the first reading of SGD, within the first reports, and the loss has not come below
      the first one: a warm-up from half of the limit.
    - The batch size was changed and the learning rate was not: the one that fits. Silent where
      noise is or was most of the bound, or the run stalled: a larger batch was the remedy then.

    Or raise it, to the smallest of what these ask for, and to no more than 0.8 of any limit of the
    curvature that is known:

    - The planned steps are what limits the gradient (share of the noise at their end below 0.3):
      the step with the smallest bound, but not above 0.5/L, nor above ten times the present one.
    - r < 0.3 in five readings, a smooth loss and a stall ratio below 0.1: twice the present one.
    - r < 0.1 in the first epochs and `covariance_ratio` below 3: an information without a number,
      by a conjecture.

    Where 0.3 <= r < 1.2 the curvature is no reason for anything: a training that hovers about the
    threshold, at the edge of stability, is usual, and its loss falls though not steadily.

    Silent on the noise floor where `NoiseFloor` is undecided or violated; on stall ratio and batch
    size where the noise scale is not significant, in the warm-up, under frequent or unknown
    clipping, for other optimizers than SGD (Adam in the latter only, with the square root); on r
    where `gradwatch.rules.curvature.stability` is None; and altogether while `Momentum` or
    `BatchSize` speaks of an instability by noise. All of this is about the gradient of the training
    objective and not about test error.

    Args:
        target: wanted mean of `||grad f||²` [L²/P²]; a quarter of what is measured if None.

    Raises:
        ConfigError: if `target` is not a positive number.

    References:
        derived from the descent lemma, as Ghadimi and Lan 2013, SIAM J. Optim. 23; noise scale of
        McCandlish et al. 2018, arXiv:1812.06162; Jastrzebski et al. 2020, arXiv:2002.09572; Cohen
        et al. 2021, arXiv:2103.00065, and 2022, arXiv:2207.14484.
    """

    target: float | None = None

    def __post_init__(self) -> None:
        check_target(self.target)

    @override
    def advise(self, history: History) -> Iterable[Recommendation]:
        noisy = noise_unstable(history)
        if noisy is not None and noisy.remedy != "learning_rate":
            return
        by_noise = noisy.recommend() if noisy is not None else None
        state, scale = converging(history), noise_scale(history)
        floor = _to_the_floor(state, self.target) or stalled(history, scale)
        groups = (
            (unstable(history) or diverging(history), by_noise, with_curvature(floor, history)),
            (warm_up(history),),
            (rescaled(history, scale) if scale and scale.lr_is_step_size else None,),
            (
                with_curvature(_to_the_best(state, self.target, history), history),
                headroom(history),
                ill_conditioned(history),
            ),
        )
        for group in groups:
            found = combined([item for item in group if item is not None])
            if found is not None:
                yield found
                return


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
    size = min(size, largest_raise(history) * (state.step_size / state.learning_rate))
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
