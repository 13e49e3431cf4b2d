"""Every number of a training is finite."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo

Family = Literal["nonfinite_activation", "nonfinite_gradient", "nonfinite_parameter"]


@dataclass(frozen=True)
class AllFinite(Bound):
    """No activation, gradient or parameter is infinite or undefined.

    Under loss scaling a step with infinite gradients is skipped on purpose, which is no
    violation.

    Args:
        metric: which of the three counts to judge.
    """

    metric: Family
    source: ClassVar[str] = "IEEE 754: arithmetic with NaN or infinity carries no information"

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        if measurement.scope != MODEL:
            return None
        routine = step.skipped and self.metric == "nonfinite_gradient"
        because = "the loss scaler skipped this step, as it should" if routine else ""
        return Interval(lower=0.0, upper=0.0, kind="explicit", undecided=because)
