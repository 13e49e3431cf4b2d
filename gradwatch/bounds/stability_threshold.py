"""The edge of stability: how large the sharpness may be for the steps of the optimizer."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.theory.break_even import (
    another_gradient,
    settled_step,
    stands_for_all,
    threshold_at,
)

BROKEN: Final = 1.2
"""Ratio to the threshold up to which a sharpness hovers about it; a loss may fall all the same."""
LARGEST_RELATIVE_ERROR: Final = 0.05
"""Of an eigenvalue that has converged."""
AT_THE_EDGE: Final = (
    "at the edge of stability, which is normal: the sharpness hovers about the threshold while the "
    "loss falls unevenly"
)
ANOTHER_GRADIENT: Final = (
    "the gradient of a step is not that of the loss whose curvature is measured: divide the loss "
    "by the number of micro-batches, and give as loss_fn the mean loss that is trained"
)
PERHAPS_UNDIVIDED: Final = (
    "the gradient of a step is added up from micro-batches, and whether their losses are divided "
    "by their number is not known; without a fixed probe_batch it is measured"
)


class StabilityThreshold(Bound):
    """The sharpness stays below the stability threshold of the optimizer: their ratio below 1.

    On a parabola of constant curvature lambda the steps converge if and only if lambda is below
    the threshold: `2/eta` for SGD, `2 (1 + beta)/eta` with heavy ball, `2 (1 + beta1)/((1 - beta1)
    eta)` for Adam, about the preconditioned sharpness there. In networks the sharpness climbs to
    the threshold and hovers about it: from 1 to 1.2 times the threshold the verdict is undecided
    and nothing is wrong, beyond that it is violated. A violation that lasts while the loss rises is
    divergence; on the way from a start that is too sharp it is passed through with a falling loss.

    Judged are the running mean and the newest reading: "holds" if both are below 1, "violated" if
    both are above 1.2.

    Undecided above the threshold if the curvature is that of less than 128 examples, which is too
    large; everywhere where the steps are known to follow another gradient than that of the loss
    whose curvature is measured, without a known threshold, where the eigenvalue has not converged
    to 5 %, where the gradient of the step was clipped, and where the preconditioner is not settled
    yet. An eigenvalue of 0 or less holds: there is no curvature to be unstable along.

    References:
        exact for constant curvature, derived in `gradwatch.theory.break_even`; Cohen et al. 2021,
        arXiv:2103.00065, and 2022, arXiv:2207.14484, for networks.
    """

    metric = "stability_ratio"
    source: ClassVar[str] = (
        "exact for a quadratic loss, derived; in networks Cohen et al. 2021, arXiv:2103.00065, and "
        "2022, arXiv:2207.14484"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        if measurement.scope != MODEL:
            return None
        because = (
            _without_a_threshold(step)
            or _unsettled(step)
            or of_another_loss(measurement)
            or _imprecise(measurement)
            or _beyond(measurement, model)
        )
        return Interval(upper=1.0, kind="law", undecided=because)


def _without_a_threshold(step: StepInfo) -> str:
    return threshold_at(step).because


def _unsettled(step: StepInfo) -> str:
    if step.step < settled_step(step.optimizer, step.betas):
        return f"the preconditioner of {step.optimizer} is not settled so early"
    if step.grads_clipped:
        return "the gradient was clipped, so the learning rate is not the step size"
    return ""


def of_another_loss(measurement: Measurement) -> str:
    """Why a ratio below 1 or above it may be that of another loss than the one that is trained.

    Args:
        measurement: a ratio of `EdgeOfStability`.

    Returns:
        The reason in words; empty if there is none. Losses that were not divided make the ratio too
        small, so that one above 1 stands.
    """
    scale = measurement.inputs.get("gradient_scale", math.nan)
    if another_gradient(scale):
        return ANOTHER_GRADIENT
    added_up = measurement.inputs.get("added_up", math.nan) == 1.0
    low = measurement.value <= 1.0
    return PERHAPS_UNDIVIDED if math.isnan(scale) and added_up and low else ""


def _imprecise(measurement: Measurement) -> str:
    newest, error = _newest(measurement), measurement.standard_error
    if not math.isfinite(measurement.value) or not math.isfinite(newest):
        return "the eigenvalue is not finite"
    if error is None or not error >= 0:
        return "it is unknown how well the eigenvalue has converged"
    # Of a curvature that is no threat the error matters against the threshold only.
    if not error <= LARGEST_RELATIVE_ERROR * (newest if newest > 0 else 1.0):
        return f"the eigenvalue has not converged to {LARGEST_RELATIVE_ERROR:.0%}"
    return ""


def _beyond(measurement: Measurement, model: ModelInfo) -> str:
    low, high = sorted((measurement.value, _newest(measurement)))
    if not high > 1.0:
        return ""
    examples = measurement.inputs.get("examples", math.nan)
    if not stands_for_all(examples, model.train_size):
        return (
            f"it is the curvature of {examples:.0f} examples, which is larger than that of all; "
            "give the watch a probe_batch of some hundred"
        )
    return AT_THE_EDGE if low <= BROKEN else ""


def _newest(measurement: Measurement) -> float:
    """The newest reading over the threshold; the error is of it and not of the mean."""
    newest = measurement.inputs.get("newest", math.nan)
    threshold = measurement.inputs.get("threshold", math.nan)
    if math.isnan(newest) or not threshold > 0:
        return measurement.value
    return newest / threshold
