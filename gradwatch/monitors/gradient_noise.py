"""How large the true gradient is, how noisy a sample's gradient is, and their ratio."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.numerics.noise import split_by_halves, split_by_moments, split_by_parts
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import Estimate, Window, reading_of
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo

SQUARE_UNIT: Final = "L²/P²"
VARIANCE_UNIT: Final = "L² sample/P²"

HALVES: Final = "two halves of the batch"
ADAM: Final = "the state of Adam"

WINDOW: Final = 200
FEWEST: Final = 50
"""Fewer readings say nothing about a ratio of two noisy means."""

_PARTS: Final = "parts of the step"
_ORDER: Final = (_PARTS, HALVES, ADAM)


class GradientNoise(Monitor):
    """Squared norm of the true gradient, variance of the gradients of samples, noise scale.

    `gradient_square` estimates `||G||²` of the gradient over all data [L²/P²] without bias, so that
    a single one may be negative. `gradient_variance` is the trace of the covariance of the
    gradient of one sample [L² sample/P²]. Each step takes the best source that it has:

    1. the parts of the step's gradient, micro-batches and ranks, at no cost;
    2. two halves of the last batch, as a probe, in some of the steps;
    3. the state of Adam: its two moments, over the last `1/(1 - beta2)` steps or so. The
       variance is too large where the gradient drifts within that time.

    `noise_scale` is the variance over the square, both averaged over the newest 200 readings of
    one source [sample]: the batch size above which more samples bring little. It is there after
    50 readings, if the square differs from 0 by two standard errors. If it does not,
    `noise_scale_at_least` is what can be said: batch size times number of readings.

    Batch normalisation makes samples depend on one another; what is measured then is the noise
    of batches of the size of the parts. The noise of dropout masks is part of the variance.

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162.
    """

    metrics = ("gradient_square", "gradient_variance", "noise_scale", "noise_scale_at_least")
    needs = frozenset({"independent_gradients", "adam_moments"})
    probed = ("noise_halves_product", "noise_halves_difference")
    probe_cost = 1.0

    def __init__(self) -> None:
        self._sources = {kind: _Source(kind) for kind in _ORDER}
        self._batch_size = math.nan

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        if view.independent_gradients > 1:
            return {}
        half = view.last.examples // 2
        if half < 1:
            view.note("gradient_square: a batch of one example has no halves to compare")
            return {}
        first = view.gradient(view.last, rows=slice(half))
        second = view.gradient(view.last, rows=slice(half, 2 * half))
        square, variance = split_by_halves([*first.values()], [*second.values()], half)
        return {"noise_halves_product": square, "noise_halves_difference": variance}

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        found = _of_parts(view) or _of_halves(view) or _of_adam(view)
        if found is None:
            if not view.loss_can_be_probed:
                view.note(_missing(view))
            return
        square, variance, source = found
        yield Reading("gradient_square", square, unit=SQUARE_UNIT, source=source)
        if variance is None:
            view.note(
                "gradient_variance: the batch size is not known; call watch.observe(batch_size=...)"
            )
            return
        yield Reading("gradient_variance", variance, unit=VARIANCE_UNIT, source=source)

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        square = reading_of(measurements, "gradient_square")
        variance = reading_of(measurements, "gradient_variance")
        if step.skipped or square is None or variance is None:
            return
        self._batch_size = float(step.batch_size or self._batch_size)
        clipped = math.nan if step.grads_clipped is None else float(step.grads_clipped)
        self._add(square.source, square.value, variance.value, clipped)
        source = self._best()
        if source is not None:
            yield from _noise_scale(step.step, source, self._batch_size)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "sources": {kind: source.state_dict() for kind, source in self._sources.items()},
            "batch_size": self._batch_size,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sources = {kind: _Source.of(kind, state["sources"][kind]) for kind in _ORDER}
        self._sources, self._batch_size = sources, float(state["batch_size"])

    def _add(self, text: str, square: float, variance: float, clipped: float) -> None:
        kind = text if text in {HALVES, ADAM} else _PARTS
        for other, source in self._sources.items():
            if other == kind:
                source.add(text, square, variance, clipped)
            else:
                source.rest()

    def _best(self) -> "_Source | None":
        """The most trusted source with enough readings."""
        sources = (self._sources[kind] for kind in _ORDER)
        return next((source for source in sources if len(source.window) >= FEWEST), None)


@dataclass(slots=True)
class _Source:
    """The readings of one kind of source; readings of several kinds are never mixed.

    Attributes:
        text: how the source is called.
        window: square, variance, and whether gradients were clipped.
        silent: readings of other sources since the last one; at 200 everything is forgotten.
    """

    text: str
    window: Window = field(default_factory=lambda: Window(WINDOW))
    silent: int = 0

    def add(self, text: str, square: float, variance: float, clipped: float) -> None:
        self.text, self.silent = text, 0
        self.window.add(square, variance, clipped)

    def rest(self) -> None:
        self.silent += 1
        if self.silent >= WINDOW:
            self.window.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"text": self.text, "window": self.window.state_dict(), "silent": self.silent}

    @classmethod
    def of(cls, kind: str, state: Mapping[str, Any]) -> "_Source":
        source = cls(kind)
        source.text, source.silent = str(state["text"]), int(state["silent"])
        source.window.load_state_dict(state["window"])
        return source


def share_of(flags: Sequence[float]) -> float:
    """Share of true among what is known.

    Args:
        flags: 1 for true, 0 for false, NaN for unknown.

    Returns:
        The share, NaN if nothing is known.

    Example:
        >>> share_of([1.0, 0.0, math.nan])
        0.5
    """
    known = [flag for flag in flags if not math.isnan(flag)]
    return sum(known) / len(known) if known else math.nan


_Found = tuple[Tensor, Tensor | None, str]


def _of_parts(view: StepView) -> _Found | None:
    parts = view.independent_gradients
    if parts is None:
        return None
    square, noise = split_by_parts(parts.total_square, parts.part_squares, parts.share_squares)
    return square, _per_sample(noise, view), parts.source


def _of_halves(view: StepView) -> _Found | None:
    square = view.probed.get("noise_halves_product")
    variance = view.probed.get("noise_halves_difference")
    return None if square is None or variance is None else (square, variance, HALVES)


def _of_adam(view: StepView) -> _Found | None:
    moments = view.adam_moments
    if moments is None:
        return None
    square, noise = split_by_moments(moments.first_square, moments.second, moments.shrink)
    return square, _per_sample(noise, view), ADAM


def _per_sample(noise: Tensor, view: StepView) -> Tensor | None:
    return None if view.batch_size is None else noise * view.batch_size


def _missing(view: StepView) -> str:
    reason = view.independent_gradients_unavailable or "the step has one gradient only"
    return (
        f"gradient_square: {reason}; it needs gradients that are accumulated over micro-batches, "
        "several ranks, a loss_fn (with watch.observe(batch=...) where the model does not see "
        "the batch), or Adam"
    )


def _noise_scale(step: int, source: _Source, batch_size: float) -> Iterator[Measurement]:
    square, variance = source.window.mean(0), source.window.mean(1)
    ratio = source.window.ratio(1, 0)
    inputs = {
        "estimates": float(square.count),
        "gradient_square": square.value,
        "gradient_square_error": square.standard_error,
        "gradient_variance": variance.value,
        "variance_median": median(source.window.column(1)),
        "clipped_share": share_of(source.window.column(2)),
        "batch_size": batch_size,
        "step_of_adam": float(source.text == ADAM),
    }
    if square.significant:
        found = ("noise_scale", ratio)
    else:
        found = ("noise_scale_at_least", Estimate(batch_size * square.count, math.nan, 0))
    metric, estimate = found
    if math.isfinite(estimate.value):
        yield Measurement(
            metric=metric,
            scope=MODEL,
            step=step,
            value=estimate.value,
            unit="sample",
            standard_error=estimate.error,
            source=source.text,
            inputs=inputs,
        )
