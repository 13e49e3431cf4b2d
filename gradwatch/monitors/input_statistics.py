"""How far the inputs are from centred."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.noise import mean_squared_norm, top_second_moment
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import Window, reading_of
from gradwatch.records import MODEL, LayerInfo, Measurement, ModelInfo, StepInfo

WINDOW: Final = 20
FEWEST: Final = 10


class InputStatistics(Monitor):
    """Share of the inputs' mean in their largest second moment.

    `input_mean_square` is `||E x||²`, unbiased, and `input_top_eigenvalue` is the largest
    eigenvalue of `X^T X / B`, of the inputs of a batch, `X` of shape (B, d) [A²]. With fewer
    examples than features the second one is too large. `input_mean_share` is the first over the
    second, both averaged over the newest 20 readings: near 1, the curvature of the first layer
    is that of the mean, and centred inputs would allow larger steps.

    It is there for models whose first layer with parameters is linear, for inputs of its size that
    are neither integers nor one-hot, and only if the next layer with parameters is no
    normalisation: that takes the mean out of what the first layer gives.
    """

    metrics = ("input_mean_square", "input_top_eigenvalue", "input_mean_share")
    probed = ("input_mean_square", "input_top_eigenvalue")
    probe_cost = 0.05

    def __init__(self) -> None:
        self._window = Window(WINDOW)

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        first = _first_layer(view.model)
        rows = None if first is None else _rows(view.first_input, first)
        if rows is None:
            return {}
        return {
            "input_mean_square": mean_squared_norm(rows),
            "input_top_eigenvalue": top_second_moment(rows),
        }

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        for metric in self.probed:
            value = view.probed.get(metric)
            if value is not None:
                yield Reading(metric, value, unit="A²")

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        mean = reading_of(measurements, "input_mean_square")
        top = reading_of(measurements, "input_top_eigenvalue")
        if mean is None or top is None:
            return
        self._window.add(mean.value, top.value)
        share = self._window.ratio()
        if share.count >= FEWEST and math.isfinite(share.value):
            yield Measurement(
                metric="input_mean_share",
                scope=MODEL,
                step=step.step,
                value=share.value,
                standard_error=share.error,
                inputs={
                    "estimates": float(share.count),
                    "input_mean_square": self._window.mean(0).value,
                    "input_top_eigenvalue": self._window.mean(1).value,
                },
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"window": self._window.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._window.load_state_dict(state["window"])


def _first_layer(model: ModelInfo) -> LayerInfo | None:
    """The first layer, if it is linear, sees no one-hot rows and is not normalised."""
    first, second = (model.layers[place] if place < len(model.layers) else None for place in (0, 1))
    if first is None or first.kind != "Linear" or first.one_hot_input:
        return None
    normalised = second is not None and second.name in model.normalisations
    return None if normalised else first


def _rows(inputs: Tensor | None, layer: LayerInfo) -> Tensor | None:
    """One row an example, if the layer may have seen them so."""
    if inputs is None or inputs.layout != torch.strided or inputs.dim() < 2:  # noqa: PLR2004
        return None
    rows = inputs.flatten(1)
    if rows.shape[0] < 2 or rows.shape[1] != layer.fan_in:  # noqa: PLR2004
        return None
    return rows if rows.dtype == torch.float64 else rows.float()
