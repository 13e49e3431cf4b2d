"""How much the gradients of single examples scatter, and how much of it in one direction."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from typing_extensions import override

from gradwatch.capture.probe.view import ProbeView
from gradwatch.capture.view import StepView
from gradwatch.errors import ConfigError
from gradwatch.interfaces import Monitor
from gradwatch.numerics.gram import FEWEST, MOST, covariance_estimate
from gradwatch.numerics.projection import SIZE, Projection
from gradwatch.numerics.reading import Reading
from gradwatch.numerics.running import reading_of
from gradwatch.records import MODEL, Measurement, ModelInfo, StepInfo
from gradwatch.theory.break_even import resolution_limit

UNIT: Final = "L²/P²"
PARTS: Final = 25
RESOLVING: Final = 8
"""Fewer gradients show a ratio of 3 for flat spectra as well as for steep ones."""

NOT_RESOLVED: Final = "; not resolved, {why}"


@dataclass(frozen=True, slots=True)
class _Gradients:
    """What an estimate is made of: Lb gradients of M examples each."""

    count: int
    examples: float
    source: str


class GradientCovariance(Monitor):
    """Trace and largest eigenvalue of the covariance K of the gradient of one example.

    From Lb gradients `g_b` of M examples each and their Gram matrix
    `G_ab = M/(Lb-1) (g_a - gbar) . (g_b - gbar)`: `covariance_trace = tr G` is `tr K` [L²/P²],
    unbiased, and `covariance_top_eigenvalue = l - (tr G - l)/(Lb-1)`, with the largest eigenvalue l
    of G, is `lambda_K` [L²/P²], to first order in 1/Lb. Both are of one example, whatever M is;
    values in units of K/M, as in the paper with M = 128, are not to be compared with them.
    `covariance_ratio = tr K / lambda_K` [1] is small where few directions have all of the noise. A
    ratio above `0.6 (Lb-1)`, or from fewer than 8 gradients, is not resolved: its input
    `resolved` is 0 and its source says why. If several eigenvalues are about the largest one,
    `covariance_ratio` is too small, up to a factor of 3 with 25 gradients.

    The gradients are, in this order,

    1. those of the step's own micro-batches, if it has at least 8 on this rank: no extra gradient,
       a pass over each for its projection, 16 KiB of memory each;
    2. those of up to 25 parts of at least two examples of the last batch, as a probe: as much
       arithmetic as one gradient of the batch, in small pieces;
    3. those of 4 to 7 micro-batches.

    Projections to 4093 numbers change squared norms by 2 % or so and the largest eigenvalue by as
    much, against its standard error of 30 % with 25 gradients. Models of no more parameters are
    measured without that error. Of several ranks each measures its own gradients, and the values
    are averaged; standard errors are then those of a single rank.

    It takes the loss for a mean over the examples, which are in no particular order. Batch
    normalisation in training mode takes its statistics from each part, so that what is measured is
    the noise of batches of that size. The noise of dropout masks is a part of K.

    Args:
        parts: of the last batch, from 4 to 64; fewer where they would have one example each.
        projection: how many numbers are kept of the gradient of each part; None for all of them,
            which takes the memory of 2 `parts` gradients.

    Raises:
        ConfigError: if an argument is outside its range.

    References:
        Jastrzebski et al. 2020, "The Break-Even Point on Optimization Trajectories of Deep Neural
        Networks", arXiv:2002.09572; scale, correction and standard errors are derived here.
    """

    metrics = ("covariance_trace", "covariance_top_eigenvalue", "covariance_ratio")
    needs = frozenset({"independent_gradients", "microbatch_covariance"})
    probed = (
        "covariance_of_parts_trace",
        "covariance_of_parts_top",
        "covariance_of_parts_trace_variance",
        "covariance_of_parts_top_variance",
    )
    probe_cost = 5.0

    def __init__(self, parts: int = PARTS, *, projection: int | None = SIZE) -> None:
        _check(parts, projection)
        self._parts = parts
        self._projection = None if projection is None else Projection(projection)
        self._probed: _Gradients | None = None
        self._read: dict[int, _Gradients] = {}

    @override
    def probe(self, view: ProbeView) -> dict[str, Tensor]:
        self._probed = None
        if view.microbatches >= RESOLVING:
            return {}
        count = min(self._parts, view.last.examples // 2)
        if count < FEWEST:
            view.note(f"covariance_trace: it needs a batch of at least {2 * FEWEST} examples")
            return {}
        size = view.last.examples // count
        rows = torch.stack([*self._gradients(view, count, size)])
        weights = torch.ones(count, device=rows.device)
        found = covariance_estimate(rows / count, weights, float(count * size))
        self._probed = _Gradients(count, size, f"{count} parts of the batch")
        return dict(zip(self.probed, found.unbind(), strict=True))

    def _gradients(self, view: ProbeView, count: int, size: int) -> Iterator[Tensor]:
        at = view.parameters(view.last)
        for part in range(count):
            rows = slice(part * size, (part + 1) * size)
            found = view.gradient(view.last, rows=rows, at=at)
            if self._projection is None:
                device = next(iter(found.values())).device
                yield torch.cat([item.detach().reshape(-1).to(device) for item in found.values()])
            else:
                yield self._projection(found)

    @override
    def read(self, view: StepView) -> Iterator[Reading]:
        found = self._best(view)
        if found is None:
            if not view.loss_can_be_probed:
                view.note(_missing(view))
            return
        values, gradients = found
        self._read[view.step] = gradients
        errors = values[2:].sqrt()
        for place, metric in enumerate(self.metrics[:2]):
            yield Reading(
                metric,
                values[place],
                unit=UNIT,
                standard_errors=errors[place],
                source=gradients.source,
            )

    def _best(self, view: StepView) -> tuple[Tensor, _Gradients] | None:
        own = view.microbatch_covariance
        mine = None if own is None else _Gradients(own.gradients, own.examples, own.source)
        found = [view.probed[name] for name in self.probed if name in view.probed]
        enough = mine is not None and mine.count >= RESOLVING
        if self._probed is not None and len(found) == len(self.probed) and not enough:
            return torch.stack(found), self._probed
        return None if own is None or mine is None else (own.values, mine)

    @override
    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterator[Measurement]:
        gradients = self._read.get(step.step)
        self._read = {place: item for place, item in self._read.items() if place > step.step}
        trace = reading_of(measurements, "covariance_trace")
        top = reading_of(measurements, "covariance_top_eigenvalue")
        if step.skipped or gradients is None or trace is None or top is None:
            return
        # Gradients that are all alike have no direction in which they scatter most.
        if top.value > 0.0 and math.isfinite(trace.value / top.value):
            yield _ratio(step.step, trace, top, gradients)


def _ratio(step: int, trace: Measurement, top: Measurement, gradients: _Gradients) -> Measurement:
    value = trace.value / top.value
    limit = resolution_limit(gradients.count)
    why = None
    if gradients.count < RESOLVING:
        why = f"it takes at least {RESOLVING} gradients"
    elif value > limit:
        why = f"{gradients.count} gradients tell ratios up to {limit:.3g}"
    return Measurement(
        metric="covariance_ratio",
        scope=MODEL,
        step=step,
        value=value,
        standard_error=value * math.hypot(_relative_error(trace), _relative_error(top)),
        source=gradients.source + ("" if why is None else NOT_RESOLVED.format(why=why)),
        inputs={
            "resolved": float(why is None),
            "gradients": float(gradients.count),
            "examples": float(gradients.examples),
        },
    )


def _relative_error(measurement: Measurement) -> float:
    return (measurement.standard_error or 0.0) / measurement.value


def _check(parts: object, projection: object) -> None:
    if type(parts) is not int or not FEWEST <= parts <= MOST:
        raise ConfigError(f"parts must be a whole number from {FEWEST} to {MOST}, got {parts!r}")
    if projection is not None and (type(projection) is not int or projection < 2):  # noqa: PLR2004
        raise ConfigError(
            f"projection must be None or a whole number from 2 up, got {projection!r}"
        )


def _missing(view: StepView) -> str:
    reason = view.microbatches_unavailable or "the step has too few micro-batches"
    return (
        f"covariance_trace: {reason}; it needs gradients that are accumulated over at least "
        f"{FEWEST} micro-batches, or a loss_fn (with watch.observe(batch=...) where the model does "
        "not see the batch)"
    )
