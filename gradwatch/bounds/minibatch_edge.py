"""The edge of stability of mini-batches: how large the curvature along their gradients gets."""

from typing import ClassVar, Final

from typing_extensions import override

from gradwatch.interfaces import Bound
from gradwatch.records import MODEL, Interval, Measurement, ModelInfo, StepInfo
from gradwatch.theory.break_even import minibatch_threshold, threshold_of

AT_THE_EDGE: Final = "above the level at which the batch sharpness was seen to stay; no theorem"


class MinibatchEdge(Bound):
    """The batch sharpness of plain SGD stays at or below `2/eta`.

    An observation and no theorem: the batch sharpness rises to about that level and stays there,
    while the sharpness of the mean loss stays below it. Beyond it the verdict is undecided, never
    violated. The statement is about SGD without momentum; with momentum the verdict is undecided,
    and of other optimizers nothing is said.

    References:
        Andreyev and Beneventano 2024, arXiv:2412.20553.
    """

    metric = "batch_sharpness"
    source: ClassVar[str] = "Andreyev & Beneventano 2024, arXiv:2412.20553; empirical"

    @override
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        if measurement.scope != MODEL or step.optimizer != "SGD":
            return None
        because = threshold_of("SGD", step.lrs).because or _assumptions(step)
        if because:
            return Interval(kind="heuristic", undecided=because)
        limit = minibatch_threshold(step.lrs[0])
        beyond = AT_THE_EDGE if measurement.value > limit else ""
        return Interval(upper=limit, kind="heuristic", undecided=beyond)


def _assumptions(step: StepInfo) -> str:
    if step.momentum:
        return "it is stated for SGD without momentum"
    if step.grads_clipped:
        return "the gradient was clipped, so the learning rate is not the step size"
    return ""
