"""The ratio law: where runs of equal learning rate over batch size behave alike."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.theory.lr_batch_ratio import ratio_law_limit

TOLERANCE: Final = 0.1
"""Relative excess of the variance of discrete steps over that of the continuous limit."""
_SIGMAS: Final = 2.0


class RatioLaw(Bound):
    """Learning rate times curvature is small enough for the ratio alone to matter.

    `eta lambda <= 2 (1 + beta) tau / (1 + tau)`: up to there the stationary variance of SGD with
    momentum beta is within tau = 10 % of that of its continuous limit, which depends on learning
    rate and batch size through their ratio only. Beyond it nothing is wrong with the run; but
    another run of the same ratio need not behave like it.

    A secant is a lower estimate of the curvature: inside, the verdict is then undecided, outside
    it stands. Nothing is said of other optimizers than SGD.

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
        because = _settings(step, model) or _secant(measurement, limit)
        return Interval(upper=limit, kind="law", undecided=because)


def _settings(step: StepInfo, model: ModelInfo) -> str:
    if len(set(step.lrs)) > 1:
        return "the parameter groups have different learning rates"
    if step.grads_clipped:
        return "the gradient was clipped, so the learning rate is not the step size"
    if step.batch_size and model.train_size and step.batch_size * 2 >= model.train_size:
        return "the batch is half of the training data or more"
    return ""


def _secant(measurement: Measurement, limit: float) -> str:
    exact = measurement.inputs.get("is_secant", math.nan) == 0
    slack = _SIGMAS * (measurement.standard_error or 0.0)
    if exact or measurement.value > limit + slack:
        return ""
    return "the secant underestimates the curvature"
