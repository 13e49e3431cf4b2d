"""Where the gradient noise makes SGD unstable although the curvature alone would not."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from gradwatch.bounds.stability_threshold import of_another_loss
from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.records.judgement import SIGNIFICANCE
from gradwatch.theory.break_even import stands_for_all

BROKEN: Final = 1.2
"""Ratio up to which a run may hover about the limit."""


class NoiseStability(Bound):
    """The learning rate of SGD stays below its limit of stability in the mean square.

    `eta <= 2 (1 + beta) lambda / (lambda² + kappa s² (1 + beta)/(1 - beta))` with `s²` the variance
    over the examples of the curvature along the sharpest direction. Exact for losses of the
    examples that are parabolas with a *common* minimum, as a network has that can fit all of them.
    Without one the noise does not make the steps unstable, it adds a variance around the minimum.

    It is the limit along the sharpest direction alone. Where several directions are about as sharp
    the noise of each adds to the others, and steps below the limit may be unstable as well: "holds"
    says that this direction is not what breaks a run.

    From 1 to 1.2 times the limit, where the error of `s²` leaves it open, and above the limit if
    the curvature is that of less than 128 examples, whose sharpest direction is their own, the
    verdict is undecided. So it is where the steps are known to follow another gradient than that of
    the loss whose curvature is measured.

    References:
        Jastrzebski et al. 2020, "The Break-Even Point on Optimization Trajectories of Deep Neural
        Networks", arXiv:2002.09572, after Wu et al. 2018; with momentum derived here.
    """

    metric = "noise_stability_ratio"
    source: ClassVar[str] = (
        "Jastrzebski et al. 2020, arXiv:2002.09572, after Wu et al. 2018; heavy ball derived; "
        "assumes that all examples have a common minimum"
    )

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        if measurement.scope != MODEL or step.optimizer != "SGD":
            return None
        because = (
            _assumptions(step)
            or of_another_loss(measurement)
            or _indistinct(measurement)
            or _of_few(measurement, model)
        )
        return Interval(lower=0.0, upper=1.0, kind="law", undecided=because)


def _assumptions(step: StepInfo) -> str:
    if len(set(step.lrs)) > 1:
        return "the parameter groups have different learning rates"
    if step.grads_clipped:
        return "the gradient was clipped, so the learning rate is not the step size"
    return ""


def _indistinct(measurement: Measurement) -> str:
    value, error = measurement.value, measurement.standard_error
    if error is None or not error >= 0:
        return "the error of the curvature or of its variance is unknown"
    if 1.0 < value <= BROKEN:
        return "at the limit, which is normal"
    if value > BROKEN and not value - SIGNIFICANCE * error > 1.0:
        return "above the limit, but not for certain: the variance is measured too coarsely"
    return ""


def _of_few(measurement: Measurement, model: ModelInfo) -> str:
    examples = measurement.inputs.get("examples", math.nan)
    if measurement.value <= 1.0 or stands_for_all(examples, model.train_size):
        return ""
    return (
        f"it is the curvature of {examples:.0f} examples, whose sharpest direction is their own; "
        "give the watch a probe_batch of some hundred"
    )
