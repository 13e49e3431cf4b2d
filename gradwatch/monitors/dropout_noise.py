"""How much of the gradient noise comes from dropout masks."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.noise import squared_distance
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import Window, reading_of, where_defined
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo
from gradwatch.theory.gradient_convergence import mask_law

UNIT: Final = "L² sample/P²"
WINDOW: Final = 200
FEWEST: Final = 10


class DropoutNoise(Monitor):
    """Variance of a sample's gradient that the masks of dropout cause [L² sample/P²].

    `dropout_variance = B ||g1 - g2||²/2`, from the gradients of the same batch of B examples
    under two draws of the masks, is unbiased for masks that are drawn for each example on its
    own. `dropout_variance_share` is its mean over the mean of `gradient_variance` of the same
    steps, of the newest 200 probes, after 10.

    `dropout_variance_law` is `v` of the law `v (1 - keep)/keep` for the masks' variance at other
    keep rates with the weights as they are. It is there where all dropouts have one rate.

    It is silent for a model without a dropout of a probability between 0 and 1.
    """

    metrics = ("dropout_variance", "dropout_variance_share", "dropout_variance_law")
    probed = ("dropout_difference",)
    probe_cost = 2.0

    def __init__(self) -> None:
        self._window = Window(WINDOW)
        self._variance = math.nan

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        if not _rates(view.model):
            return {}
        first = view.gradient(view.last)
        second = view.gradient(view.last)
        distance = squared_distance([*first.values()], [*second.values()])
        return {"dropout_difference": view.last.examples * distance / 2}

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        variance = view.probed.get("dropout_difference")
        if variance is not None:
            yield Reading("dropout_variance", variance, unit=UNIT)

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        if step.skipped:
            return
        whole = reading_of(measurements, "gradient_variance")
        self._variance = self._variance if whole is None else whole.value
        masks = reading_of(measurements, "dropout_variance")
        if masks is None or math.isnan(self._variance):
            return
        self._window.add(masks.value, self._variance)
        if len(self._window) >= FEWEST:
            yield from self._derived(step.step, _rates(model))

    def _derived(self, step: int, rates: Sequence[float]) -> Iterator[Measurement]:
        masks, whole, share = self._window.mean(0), self._window.mean(1), self._window.ratio()
        keep = 1.0 - rates[0] if len(rates) == 1 else math.nan
        law = where_defined(mask_law, masks.value, keep)
        if math.isfinite(share.value):
            yield Measurement(
                metric="dropout_variance_share",
                scope=MODEL,
                step=step,
                value=share.value,
                standard_error=share.error,
                inputs={
                    "estimates": float(share.count),
                    "keep": keep,
                    "rates": float(len(rates)),
                    "law": math.nan if law is None else law,
                    "data_variance": whole.value - masks.value,
                    "variance": whole.value,
                },
            )
        if law is not None:
            yield Measurement(
                metric="dropout_variance_law",
                scope=MODEL,
                step=step,
                value=law,
                unit=UNIT,
                standard_error=masks.standard_error * keep / (1.0 - keep),
                inputs={"estimates": float(masks.count), "keep": keep},
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"window": self._window.state_dict(), "variance": self._variance}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        variance = float(state["variance"])
        self._window.load_state_dict(state["window"])
        self._variance = variance


def _rates(model: ModelInfo) -> list[float]:
    """The different probabilities of dropping a unit that make any noise."""
    return sorted({item.probability for item in model.dropouts if 0.0 < item.probability < 1.0})
