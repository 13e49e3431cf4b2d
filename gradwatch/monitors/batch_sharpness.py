"""Curvature along the gradient of the very batch that it is measured on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.noise import inner_product
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import Window, reading_of
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo

UNIT: Final = "L/P²"
WINDOW: Final = 20
FEWEST: Final = 10


class BatchSharpness(Monitor):
    """Rayleigh quotient of the Hessian along the gradient, of one batch and on average [L/P²].

    `rayleigh_quotient = g_B^T H_B g_B / ||g_B||²` on the batch of the step, before the step. One
    batch says little about the largest eigenvalue of the Hessian: the quotient lies below that of
    the batch, far below before the edge of stability is reached (160 times in one experiment).

    `batch_sharpness` is the mean of the newest 20 of them, from 10 on. In mini-batch SGD it has
    been seen to rise to 2/lr and to stay there, while the largest eigenvalue stays below.

    Several ranks take gradient and Hessian of all their batches together.

    References:
        Andreyev and Beneventano 2024, "Edge of Stochastic Stability", arXiv:2412.20553.
    """

    metrics = ("rayleigh_quotient", "batch_sharpness")
    probed = ("rayleigh_quotient",)
    probe_cost = 3.2

    def __init__(self) -> None:
        self._window = Window(WINDOW)

    @override
    def joint_sums(self, view: ProbeView) -> int:
        return 2

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        if view.microbatches > 1:
            view.note(
                "rayleigh_quotient: the step is made of several micro-batches, and only the last "
                "one can be evaluated again"
            )
            return {}
        with view.curvature(view.last) as curvature:
            gradient = curvature.gradient()
            bend = inner_product(gradient, curvature.product(gradient))
            return {"rayleigh_quotient": bend / inner_product(gradient, gradient)}

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        quotient = view.probed.get("rayleigh_quotient")
        if quotient is not None:
            yield Reading("rayleigh_quotient", quotient, unit=UNIT)

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        quotient = reading_of(measurements, "rayleigh_quotient")
        if step.skipped or quotient is None:
            return
        self._window.add(quotient.value)
        if len(self._window) < FEWEST:
            return
        mean = self._window.mean()
        yield Measurement(
            metric="batch_sharpness",
            scope=MODEL,
            step=step.step,
            value=mean.value,
            unit=UNIT,
            standard_error=mean.error,
            inputs={"readings": float(mean.count)},
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"window": self._window.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._window.load_state_dict(state["window"])
