"""What the curvature makes of the gradient and of its noise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.noise import inner_product
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import Estimate, Window, mean_of, reading_of, where_defined
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo
from gradwatch.theory.lr_batch_ratio import stall_ratio

FEWEST: Final = 30
WINDOW: Final = 200


class NoiseCurvature(Monitor):
    """Curvature along the gradient and along its noise, from three thirds of a batch.

    With `g1`, `g2` the gradients of b examples each and `v = H_3 g1` from the Hessian of b others,
    `gradient_curvature = g2 . v` estimates `G^T H G` [L³/P⁴] and
    `noise_curvature = b (g1 . v - g2 . v)` estimates `tr(H Sigma)` [L³ sample/P⁴], both unbiased.

    `noise_scale_curvature` is the ratio of their means over the newest 200 probes [sample], after
    30 of them, if the first mean is significant: at that batch size the best step is half as long
    as without noise. `stall_ratio = eta (G^T H G + tr(H Sigma)/S) / (2 ||G||²)` is the loss that a
    step of SGD adds over the loss that it removes; from 1 on the expected loss does not fall.
    It is about a single step of plain SGD and so silent with momentum, whose steps are made of
    many gradients. It takes `||G||²` from the newest `noise_scale`, so this monitor must stand
    behind `GradientNoise`.

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162
        (the noise scale); the estimators and the stall ratio are derived here.
    """

    metrics = ("gradient_curvature", "noise_curvature", "noise_scale_curvature", "stall_ratio")
    probed = ("curvature_of_gradient", "curvature_of_noise")
    probe_cost = 5.0

    def __init__(self) -> None:
        self._window = Window(WINDOW)
        self._known: dict[str, float] = {}

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        third = view.last.examples // 3
        if third < 1:
            view.note("gradient_curvature: it needs a batch of at least three examples")
            return {}
        at = view.parameters(view.last)
        first, second = (
            [*view.gradient(view.last, rows=rows, at=at).values()]
            for rows in (slice(third), slice(third, 2 * third))
        )
        with view.last.hessian(at, slice(2 * third, 3 * third)) as hessian:
            product = hessian(first)
        cross = inner_product(second, product)
        noise = third * (inner_product(first, product) - cross)
        return {"curvature_of_gradient": cross, "curvature_of_noise": noise}

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        gradient = view.probed.get("curvature_of_gradient")
        noise = view.probed.get("curvature_of_noise")
        if gradient is not None and noise is not None:
            yield Reading("gradient_curvature", gradient, unit="L³/P⁴")
            yield Reading("noise_curvature", noise, unit="L³ sample/P⁴")

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        if step.skipped:
            return
        self._learn(measurements)
        gradient = reading_of(measurements, "gradient_curvature")
        noise = reading_of(measurements, "noise_curvature")
        if gradient is None or noise is None:
            return
        self._window.add(gradient.value, noise.value)
        if len(self._window) >= FEWEST and self._window.mean(0).significant:
            yield from self._noise_scale(step)
            yield from self._stall(step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"window": self._window.state_dict(), "known": dict(self._known)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        known = {str(name): float(value) for name, value in state["known"].items()}
        self._window.load_state_dict(state["window"])
        self._known = known

    def _learn(self, measurements: Sequence[Measurement]) -> None:
        """What belongs to the newest noise scale; nothing once the square is lost in the noise."""
        scale = reading_of(measurements, "noise_scale")
        if scale is not None:
            self._known = dict(scale.inputs)
        elif reading_of(measurements, "noise_scale_at_least") is not None:
            self._known = {}

    def _noise_scale(self, step: StepInfo) -> Iterator[Measurement]:
        ratio = self._window.ratio(1, 0)
        if math.isfinite(ratio.value):
            inputs = self._inputs(step)
            yield _measurement("noise_scale_curvature", "sample", step, ratio, inputs)

    def _stall(self, step: StepInfo) -> Iterator[Measurement]:
        if step.optimizer != "SGD" or step.momentum or step.lr is None or not step.batch_size:
            return
        inputs = {**self._known, **self._inputs(step)}
        square = self._known.get("gradient_square", math.nan)
        value = where_defined(
            stall_ratio,
            step.lr,
            square,
            inputs["gradient_curvature"],
            inputs["noise_curvature"],
            step.batch_size,
        )
        if value is not None:
            relative = self._known.get("gradient_square_error", math.nan) / square
            error = abs(value) * math.hypot(self._bend(step.batch_size).relative_error, relative)
            estimate = Estimate(value, error, len(self._window))
            yield _measurement("stall_ratio", "1", step, estimate, inputs)

    def _bend(self, batch_size: int) -> Estimate:
        """`G^T H G + tr(H Sigma)/S`, whose two parts are not independent."""
        pairs = zip(self._window.column(0), self._window.column(1), strict=True)
        return mean_of([gradient + noise / batch_size for gradient, noise in pairs])

    def _inputs(self, step: StepInfo) -> dict[str, float]:
        return {
            "estimates": float(len(self._window)),
            "gradient_curvature": self._window.mean(0).value,
            "gradient_curvature_error": self._window.mean(0).standard_error,
            "noise_curvature": self._window.mean(1).value,
            "noise_curvature_error": self._window.mean(1).standard_error,
            "batch_size": math.nan if step.batch_size is None else float(step.batch_size),
            "learning_rate": math.nan if step.lr is None else step.lr,
            "momentum": step.momentum or 0.0,
        }


def _measurement(
    metric: str, unit: str, step: StepInfo, estimate: Estimate, inputs: Mapping[str, float]
) -> Measurement:
    return Measurement(
        metric=metric,
        scope=MODEL,
        step=step.step,
        value=estimate.value,
        unit=unit,
        standard_error=estimate.error,
        inputs=inputs,
    )
