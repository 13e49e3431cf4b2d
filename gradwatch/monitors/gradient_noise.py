"""How large the true gradient is, how noisy a sample's gradient is, and their ratio."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.interfaces import Monitor
from gradwatch.monitors.noise_scale import ADAM, FEWEST, NoiseReadings, noise_scale
from gradwatch.numerics.noise import split_by_halves, split_by_moments, split_by_parts
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import reading_of
from gradwatch.records import Measurement, ModelInfo, StepInfo

SQUARE_UNIT: Final = "L²/P²"
VARIANCE_UNIT: Final = "L² sample/P²"

HALVES: Final = "two halves of the batch"

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
    `noise_scale_at_least` is what can be said: the variance over the largest square that the
    readings allow, its mean (or 0) plus two standard errors, and never more than the training
    data. Readings of Adam's state enter a twentieth of its memory apart.

    `gradient_scale` is the squared norm of the gradient of the step over that of the loss that
    probes evaluate [1], each of as many samples. It is 1 in expectation; `A²` where A
    micro-batches are added up without dividing their losses by A, and 4 (of two halves) where the
    loss is a sum over the samples. Then the step is longer than the gradient says.

    Batch normalisation makes samples depend on one another; what is measured then is the noise
    of batches of the size of the parts. The noise of dropout masks is part of the variance.

    References:
        McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162.
    """

    metrics = (
        "gradient_square",
        "gradient_variance",
        "noise_scale",
        "noise_scale_at_least",
        "gradient_scale",
    )
    needs = frozenset({"independent_gradients", "adam_moments"})
    probed = ("noise_halves_product", "noise_halves_difference")
    probe_cost = 1.0

    def __init__(self) -> None:
        self._sources = {kind: NoiseReadings(kind) for kind in _ORDER}
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
        scale = _scale(view, square, variance)
        if scale is not None:
            yield Reading("gradient_scale", scale, source=source)
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
        self._add(step, square.source, square.value, variance.value)
        source = self._best()
        if source is not None:
            yield from noise_scale(step.step, source, self._batch_size, model.train_size)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "sources": {kind: source.state_dict() for kind, source in self._sources.items()},
            "batch_size": self._batch_size,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sources = {kind: NoiseReadings.of(kind, state["sources"][kind]) for kind in _ORDER}
        self._sources, self._batch_size = sources, float(state["batch_size"])

    def _add(self, step: StepInfo, text: str, square: float, variance: float) -> None:
        kind = text if text in {HALVES, ADAM} else _PARTS
        for other, source in self._sources.items():
            if other == kind:
                source.add(step, text, square, variance)
            else:
                source.rest()

    def _best(self) -> "NoiseReadings | None":
        """The most trusted source with enough readings."""
        sources = (self._sources[kind] for kind in _ORDER)
        return next((source for source in sources if len(source.window) >= FEWEST), None)


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


def _scale(view: StepView, square: Tensor, variance: Tensor | None) -> Tensor | None:
    """Square of the step's gradient over that of the loss as it is probed, for as many samples.

    The mean gradient of n samples has the expected square `||G||² + tr(Sigma)/n`.
    """
    if variance is None:
        return None
    if view.independent_gradients is not None:
        probed = view.probed.get("smoothness_gradient_square")
        samples = view.probed.get("smoothness_examples")
        if probed is None or samples is None:
            return None
        return (square + variance / samples.to(square.device)) / probed.to(square.device)
    whole = view.raw_gradient_norms
    if whole is None or view.batch_size is None or "noise_halves_product" not in view.probed:
        return None
    total = whole.total().square()
    return total / (square + variance / view.batch_size).to(total.device)


def _missing(view: StepView) -> str:
    reason = view.independent_gradients_unavailable or "the step has one gradient only"
    return (
        f"gradient_square: {reason}; it needs gradients that are accumulated over micro-batches, "
        "several ranks, a loss_fn (with watch.observe(batch=...) where the model does not see "
        "the batch), or Adam"
    )
