"""Randomly stopped SGD: how large the true gradient may be along a whole run.

What several statements about the mean square of the true gradient need to hold stands here too.
The square of a batch's own gradient is never compared with them: it is too large by the variance
of the batch.
"""

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Final

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Kind, Measurement, ModelInfo, StepInfo

PLAIN_SGD: Final = "SGD"
"""torch's own, the only optimizer whose steps are the learning rate times the gradient."""
ENOUGH_ESTIMATES: Final = 200
LARGEST_CLIPPED_SHARE: Final = 0.05
LARGEST_GRADIENT_SCALE: Final = 2.0
"""Factor between the gradient of a step and that of the loss as probes evaluate it, squared."""
LARGEST_RELATIVE_ERROR: Final = 0.5
BROKEN: Final = 1.5
"""Ratio to the bound that the lower confidence limit must exceed before an assumption broke."""
_SIGMAS: Final = 2.0


class RandomlyStoppedSgd(Bound):
    """The mean of `||grad f||²` over the run stays below a step term plus a noise term.

    `E ||grad f(w_R)||² <= (2 D + sum L g_k² sigma²/B) / sum (2 g_k - L g_k²)` for an L-smooth loss,
    unbiased gradients and learning rates `g_k < 2/L`, where step R is drawn with probabilities
    proportional to `2 g_k - L g_k²`. The two terms are `inputs["step_term"]` and
    `inputs["noise_term"]` of the measurement.

    A ratio of up to 1 holds. It is violated if the ratio is above 1.5 by more than two standard
    errors: an assumption broke, such as an L that was measured too low, and not the run. Between
    the two, and where an assumption is known not to hold, it is undecided. With momentum, batch
    normalisation or an L from secants the statement is heuristic.

    References:
        derived from the descent lemma, as Ghadimi and Lan 2013, "Stochastic First- and Zeroth-Order
        Methods for Nonconvex Stochastic Programming", SIAM J. Optim. 23, theorem 2.1. That the
        constants are what network structure and dropout act on is the subject of Ithapu, Ravi and
        Singh 2017, arXiv:1702.08670.
    """

    metric = "stationarity"
    source: ClassVar[str] = (
        "derived from the descent lemma, as Ghadimi & Lan 2013, SIAM J. Optim. 23, theorem 2.1; "
        "subject of Ithapu, Ravi & Singh 2017, arXiv:1702.08670"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        if measurement.scope != MODEL:
            return None
        inputs = measurement.inputs
        upper = known(inputs, "step_term") + known(inputs, "noise_term")
        return judged(measurement, upper, assumptions(inputs, step), strength(inputs, step, model))


def known(inputs: Mapping[str, float], name: str) -> float:
    """An input of a measurement.

    Args:
        inputs: of the measurement.
        name: of the input.

    Returns:
        Its value, NaN if it is missing.
    """
    return inputs.get(name, math.nan)


def judged(measurement: Measurement, upper: float, unmet: str, kind: Kind) -> Interval:
    """The interval from 0 to an upper bound on the mean square of the true gradient.

    Args:
        measurement: the unbiased estimate of it, with its standard error.
        upper: the bound [L²/P²]; may be NaN.
        unmet: the assumption that is not met; empty if all are.
        kind: how far the statement can be trusted.

    Returns:
        The interval; undecided if an assumption is not met or the numbers do not tell.
    """
    usable = upper if math.isfinite(upper) and upper >= 0 else math.inf
    because = unmet or _indistinct(measurement, upper)
    return Interval(lower=0.0, upper=usable, kind=kind, undecided=because)


def assumptions(inputs: Mapping[str, float], step: StepInfo) -> str:
    """Which assumption of statements about plain SGD is not met.

    A step size beyond 2/L comes last: where that is the reason, there is no other one.

    Args:
        inputs: of a measurement of stationarity; NaN counts as not met, but for
            `gradient_scale`, which only probes of the loss know.
        step: the settings of its step.

    Returns:
        The reason in words; empty if all are met.
    """
    reasons = (*_of_the_settings(inputs, step), *_of_the_run(inputs))
    return reasons[0] if reasons else ""


def strength(inputs: Mapping[str, float], step: StepInfo, model: ModelInfo) -> Kind:
    """How far the statement can be trusted.

    Args:
        inputs: of a measurement of stationarity.
        step: the settings of its step.
        model: facts about the model.

    Returns:
        `heuristic` with momentum (the step size is lr/(1-momentum) only on average), batch
        normalisation (it couples the samples) or an L from secants (it may be too low), else
        `explicit`.
    """
    coupled = any("BatchNorm" in layer.kind for layer in model.layers)
    secant = known(inputs, "smoothness_is_secant") != 0
    momentum = max(step.momentum or 0.0, inputs.get("momentum", 0.0)) != 0
    return "heuristic" if coupled or secant or momentum else "explicit"


def _of_the_settings(inputs: Mapping[str, float], step: StepInfo) -> Iterator[str]:
    if step.optimizer != PLAIN_SGD:
        yield f"the optimizer is {step.optimizer or 'unknown'}, the statement is about SGD"
    if known(inputs, "from_adam") != 0:
        yield "the gradient noise comes from the state of Adam, which is no unbiased estimate"
    if (step.weight_decay or 0.0) > 0 or known(inputs, "weight_decay") > 0:
        yield "the measured gradient is without that of the weight decay"
    if known(inputs, "groups_differ") != 0:
        yield "the parameter groups have different learning rates"
    clipped = known(inputs, "clipped_share")
    if math.isnan(clipped):
        yield "it is unknown whether gradients were clipped; pass track_clipping=True"
    elif clipped > LARGEST_CLIPPED_SHARE:
        yield f"gradients were clipped in {clipped:.0%} of the steps"


def _of_the_run(inputs: Mapping[str, float]) -> Iterator[str]:
    estimates = known(inputs, "estimates")
    if not estimates >= ENOUGH_ESTIMATES:
        got = 0 if math.isnan(estimates) else estimates
        yield f"{got:.0f} estimates of the gradient are fewer than {ENOUGH_ESTIMATES}"
    if known(inputs, "loss_scale_changes") != 0:
        yield "the loss scale changed"
    if not _same_gradient(known(inputs, "gradient_scale")):
        yield (
            "the gradient of a step is not that of the loss as it is measured: divide the loss by "
            "the number of micro-batches, and give a loss_fn that is a mean"
        )
    if not known(inputs, "smallest_loss") >= known(inputs, "lowest_loss"):
        yield (
            "the loss is unknown, unbounded below, or lowest_loss is wrong; pass "
            "Stationarity(lowest_loss=...)"
        )
    if not known(inputs, "smoothness") >= 0:
        yield "the smoothness L is unknown"
    if known(inputs, "beyond_edge") != 0:
        yield "some step sizes were beyond 2/L, where there is no bound"


def _same_gradient(scale: float) -> bool:
    known_scale = not math.isnan(scale)
    within = 1.0 / LARGEST_GRADIENT_SCALE <= scale <= LARGEST_GRADIENT_SCALE
    return within or not known_scale


def _indistinct(measurement: Measurement, upper: float) -> str:
    """Why the two numbers do not tell whether the statement holds; empty if they do."""
    value, error = measurement.value, measurement.standard_error
    if not math.isfinite(value) or not math.isfinite(upper):
        return "the estimate or the bound is not finite"
    if upper < 0:
        return "the bound came out negative"
    if error is None or not abs(error) <= LARGEST_RELATIVE_ERROR * abs(value):
        return "the relative standard error of the estimate is above 0.5"
    if value < 0:
        return "the estimate is below 0, so the batches were not independent draws"
    if value > upper and not value - _SIGMAS * error > BROKEN * upper:
        return f"above the bound, but not by a factor of {BROKEN:g} for certain"
    return ""
