"""The edge of stability: how large the sharpness may be for the steps of the optimizer."""

import math
from typing import ClassVar, Final, Literal

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.theory.break_even import Threshold, settled_step, stands_for_all, threshold_of

BROKEN: Final = 1.2
"""Ratio to the threshold up to which a sharpness hovers about it; a loss may fall all the same."""
LARGEST_RELATIVE_ERROR: Final = 0.05
"""Of an eigenvalue that has converged."""
AT_THE_EDGE: Final = (
    "at the edge of stability, which is normal: the sharpness hovers about the threshold while the "
    "loss falls unevenly"
)


class StabilityThreshold(Bound):
    """The sharpness stays below the stability threshold of the optimizer.

    On a parabola of constant curvature lambda the steps converge if and only if lambda is below
    it: `2/eta` for SGD, `2 (1 + beta)/eta` with heavy ball, `2 (1 + beta1)/((1 - beta1) eta)` for
    Adam, about the preconditioned sharpness there. In networks the sharpness climbs to the
    threshold and hovers about it: from 1 to 1.2 times the threshold the verdict is undecided and
    nothing is wrong, beyond that it is violated. A violation that lasts while the loss rises is
    divergence; on the way from a start that is too sharp it is passed through with a falling loss.

    Undecided above the threshold if the curvature is that of less than 128 examples, which is too
    large; without a known threshold, where the eigenvalue has not converged to 5 %, where the
    gradient of the step was clipped, and where the preconditioner is not settled yet. An eigenvalue
    of 0 or less holds: there is no curvature to be unstable along.

    Args:
        metric: "sharpness", or "preconditioned_sharpness", which decides under Adam, AdamW and
            RMSprop.

    References:
        exact for constant curvature, derived in `gradwatch.theory.break_even`; Cohen et al. 2021,
        arXiv:2103.00065, and 2022, arXiv:2207.14484, for networks.
    """

    metric = "sharpness"
    source: ClassVar[str] = (
        "exact for a quadratic loss, derived; in networks Cohen et al. 2021, arXiv:2103.00065, and "
        "2022, arXiv:2207.14484"
    )

    def __init__(
        self, metric: Literal["sharpness", "preconditioned_sharpness"] = "sharpness"
    ) -> None:
        self.metric = metric

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        preconditioned = self.metric != "sharpness"
        threshold = _threshold(step)
        if measurement.scope != MODEL or (preconditioned and not threshold.preconditioned):
            return None
        if threshold.preconditioned and not preconditioned:
            return _undecided(f"under {step.optimizer} the preconditioned sharpness decides")
        if threshold.because:
            return _undecided(threshold.because)
        because = _unsettled(step) or _imprecise(measurement, threshold.value)
        return Interval(
            upper=threshold.value,
            kind="law",
            undecided=because or _beyond(measurement, threshold.value, model),
        )


def _threshold(step: StepInfo) -> Threshold:
    return threshold_of(
        step.optimizer,
        step.lrs,
        momentum=step.momentum,
        dampening=step.dampening,
        nesterov=step.nesterov,
        betas=step.betas,
        weight_decay=step.weight_decay,
    )


def _undecided(because: str) -> Interval:
    return Interval(kind="law", undecided=because)


def _unsettled(step: StepInfo) -> str:
    if step.step < settled_step(step.optimizer, step.betas):
        return f"the preconditioner of {step.optimizer} is not settled so early"
    if step.grads_clipped:
        return "the gradient was clipped, so the learning rate is not the step size"
    return ""


def _imprecise(measurement: Measurement, threshold: float) -> str:
    value, error = measurement.value, measurement.standard_error
    if not math.isfinite(value):
        return "the eigenvalue is not finite"
    if error is None or not error >= 0:
        return "it is unknown how well the eigenvalue has converged"
    # Of a curvature that is no threat the error matters against the threshold only.
    if not error <= LARGEST_RELATIVE_ERROR * (value if value > 0 else threshold):
        return f"the eigenvalue has not converged to {LARGEST_RELATIVE_ERROR:.0%}"
    return ""


def _beyond(measurement: Measurement, threshold: float, model: ModelInfo) -> str:
    if not measurement.value > threshold:
        return ""
    examples = measurement.inputs.get("examples", math.nan)
    if not stands_for_all(examples, model.train_size):
        return (
            f"it is the curvature of {examples:.0f} examples, which is larger than that of all; "
            "give the watch a probe_batch of some hundred"
        )
    return AT_THE_EDGE if measurement.value <= BROKEN * threshold else ""
