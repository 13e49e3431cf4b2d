"""The learning rate over the batch size, and what it is in terms of the noise."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from typing_extensions import override

from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors.smoothness import KnownSmoothness
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import Window, reading_of, where_defined
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo
from gradwatch.theory.lr_batch_ratio import effective_ratio, temperature

UNIT: Final = "P²/(L sample)"
WINDOW: Final = 200
FEWEST: Final = 50


class LrBatchRatio(Monitor):
    """Learning rate over batch size, the scale of the noise of SGD [P²/(L sample)].

    The learning rate is that of the first parameter group; the batch size counts the samples of
    all micro-batches of a step. For SGD there is more: `lr_batch_ratio_effective` is the ratio with
    heavy ball, `lr (1 - dampening)/(S (1 - momentum))`. `temperature = lr s²/(2 S)` [L] is the
    noise level, with `s²` the mean variance of one coordinate of a sample's gradient, from the
    newest 200 `gradient_variance` after 50. `lr_curvature` is the largest learning rate times the
    sharpness, or times the largest secant where the sharpness is not measured: the ratio alone
    describes SGD while that is small.

    References:
        Jastrzebski et al. 2018, "Three Factors Influencing Minima in SGD", arXiv:1711.04623.
    """

    metrics = (
        "lr_batch_ratio",
        "batch_size",
        "lr_batch_ratio_effective",
        "temperature",
        "lr_curvature",
    )

    def __init__(self) -> None:
        self._smoothness = KnownSmoothness()
        self._variances = Window(WINDOW)

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        if view.batch_size is None:
            view.note(
                "batch_size: the model's inputs do not show it; call watch.observe(batch_size=...)"
            )
            return
        samples = torch.as_tensor(view.batch_size, dtype=torch.float32)
        yield Reading("batch_size", samples, unit="sample")
        if view.lr is not None:
            yield Reading("lr_batch_ratio", _ratio(view.lr, samples), unit=UNIT)

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        if step.skipped:
            return
        self._smoothness.learn(measurements)
        variance = reading_of(measurements, "gradient_variance")
        if variance is not None:
            self._variances.add(variance.value)
        if step.optimizer == "SGD" and step.lrs:
            yield from _effective(step)
            yield from self._temperature(step, model.parameter_count)
            yield from self._lr_curvature(step, model)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "smoothness": self._smoothness.state_dict(),
            "variances": self._variances.state_dict(),
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._smoothness.load_state_dict(state["smoothness"])
        self._variances.load_state_dict(state["variances"])

    def _temperature(self, step: StepInfo, parameters: int) -> Iterator[Measurement]:
        if not parameters or not step.batch_size or len(self._variances) < FEWEST:
            return
        mean = self._variances.mean()
        variance = mean.value / parameters
        value = where_defined(temperature, step.lrs[0], variance, step.batch_size)
        if value is not None:
            yield Measurement(
                metric="temperature",
                scope=MODEL,
                step=step.step,
                value=value,
                unit="L",
                standard_error=value * mean.relative_error if value else None,
                inputs={"estimates": float(mean.count), "coordinate_variance": variance},
            )

    def _lr_curvature(self, step: StepInfo, model: ModelInfo) -> Iterator[Measurement]:
        value = max(step.lrs) * self._smoothness.value
        if math.isfinite(value):
            yield Measurement(
                metric="lr_curvature",
                scope=MODEL,
                step=step.step,
                value=value,
                source=self._smoothness.source,
                inputs={
                    "momentum": step.momentum or 0.0,
                    "is_secant": float(self._smoothness.is_secant),
                    "batch_size": _or_unknown(step.batch_size),
                    "train_size": _or_unknown(model.train_size),
                },
            )


def _ratio(lr: float | Tensor, samples: Tensor) -> Tensor:
    """On the device of whichever is on one: the other way would be a host read."""
    if not isinstance(lr, Tensor):
        return lr / samples
    device = lr.device if samples.device.type == "cpu" else samples.device
    return lr.to(device, torch.float32) / samples.to(device)


def _effective(step: StepInfo) -> Iterator[Measurement]:
    size = _or_unknown(step.batch_size)
    lr = step.lrs[0] * (1.0 - (step.dampening or 0.0))
    value = where_defined(effective_ratio, lr, size, step.momentum or 0.0)
    if value is not None:
        yield Measurement(
            metric="lr_batch_ratio_effective",
            scope=MODEL,
            step=step.step,
            value=value,
            unit=UNIT,
        )


def _or_unknown(count: int | None) -> float:
    return math.nan if count is None else float(count)
