"""The ratio law: where runs of equal learning rate over batch size behave alike."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.theory.lr_batch_ratio import ratio_law_limit

TOLERANCE: Final = 0.1
"""Relative excess of the variance of discrete steps over that of the continuous limit."""


class RatioLaw(Bound):
    """Learning rate times curvature is small enough for the ratio alone to matter.

    `eta lambda <= 2 (1 + beta) tau / (1 + tau)`: up to there the stationary variance of SGD with
    momentum beta is within tau = 10 % of that of its continuous limit, which depends on learning
    rate and batch size through their ratio only. Beyond it nothing is wrong with the run,
    the law is just not shown to apply: the verdict is undecided, never violated. So it is inside,
    if the curvature is from secants, which are mostly too low. Nothing is said of other
    optimizers than SGD.

    References:
        derived from the exact variance of the discrete recursion; the failure of the ratio at
        large learning rates is stated qualitatively in Jastrzebski et al. 2017, "Three Factors
        Influencing Minima in SGD", arXiv:1711.04623.
    """

    metric = "lr_curvature"
    source: ClassVar[str] = (
        "derived from the stationary variance of discrete SGD; Jastrzebski et al. 2017, "
        "arXiv:1711.04623 (qualitatively)"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        momentum = step.momentum or 0.0
        if measurement.scope != MODEL or step.optimizer != "SGD" or not 0 <= momentum < 1:
            return None
        limit = ratio_law_limit(momentum, TOLERANCE)
        because = _settings(step, model) or _beyond(measurement, limit) or _secant(measurement)
        return Interval(upper=limit, kind="law", undecided=because)


def _settings(step: StepInfo, model: ModelInfo) -> str:
    if len(set(step.lrs)) > 1:
        return "the parameter groups have different learning rates"
    if step.grads_clipped:
        return "the gradient was clipped, so the learning rate is not the step size"
    if step.batch_size and model.train_size and step.batch_size * 2 >= model.train_size:
        return "the batch is half of the training data or more"
    return ""


def _beyond(measurement: Measurement, limit: float) -> str:
    if not measurement.value > limit:
        return ""
    return "not shown to apply: runs of the same learning rate over batch size may differ"


def _secant(measurement: Measurement) -> str:
    exact = measurement.inputs.get("is_secant", math.nan) == 0
    return "" if exact else "the secant underestimates the curvature"
