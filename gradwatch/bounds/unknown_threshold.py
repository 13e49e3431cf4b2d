"""Optimizers of which no stability threshold is known: the sharpness is shown, and no verdict."""

from typing import ClassVar

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.theory.break_even import threshold_at


class UnknownThreshold(Bound):
    """Says why the sharpness has no threshold to be compared with.

    `StabilityThreshold` compares it where there is one. For other optimizers (LBFGS, LAMB, Muon,
    Adafactor, SAM, schedule-free and whatever is not derived), several of them, or learning rates
    that differ between parameter groups the verdict is undecided.

    References:
        the thresholds that are known are derived in `gradwatch.theory.break_even`.
    """

    metric = "sharpness"
    source: ClassVar[str] = "thresholds derived for SGD, Adam, AdamW and RMSprop"

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        because = threshold_at(step).because
        if measurement.scope != MODEL or not because:
            return None
        return Interval(kind="law", undecided=because)
