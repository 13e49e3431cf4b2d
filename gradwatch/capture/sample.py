"""One sampled step: the view for monitors, and settings that may still be on the device."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from gradwatch.capture.model.parameters import settings_of
from gradwatch.capture.step.microbatch import (
    MicrobatchNorms,
    covariance_of,
    independent_gradients,
    microbatch_covariance,
)
from gradwatch.capture.step_tensors import StepTensors
from gradwatch.capture.view import AdamMoments, NamedValues, StepView
from gradwatch.records import StepInfo

if TYPE_CHECKING:
    from gradwatch.capture.session import Session

UNCLIPPED: Final = 1 - 1e-5
"""A clip coefficient below this is not rounding."""


NO_VALUES: Final = NamedValues((), torch.zeros(0))

MIXED: Final = (
    "batch_size, loss and activation_norm: one optimizer stepped again before another had, so "
    "that the forwards of two steps cannot be told apart; call watch.observe(batch_size=..., "
    "loss=...)"
)
"""Note of a round that shares forwards with its neighbour."""


@dataclass(slots=True)
class Sample:
    """A view and the settings of its step.

    Attributes:
        view: what monitors read.
        info: the settings that are Python values.
        lrs: learning rate of each parameter group; tensors where the optimizer holds tensors.
        loss_scale: of a GradScaler, or None.
        found_inf: above 0 if the scaler skipped the step, or None.
        facts: `weight_facts` of each chained layer, in the first sample that shows them.
        clock: of the probes of all ranks, or None.
    """

    view: StepView
    info: StepInfo
    lrs: Sequence[float | Tensor] = ()
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    facts: Mapping[str, Tensor] = field(default_factory=dict)
    clock: Tensor | None = None
    _order: tuple[str, ...] = field(default=())

    def tensors(self) -> list[Tensor]:
        """What must travel to the host to complete the settings."""
        batch_size = self.view.batch_size
        named = {
            "batch": batch_size if isinstance(batch_size, Tensor) else None,
            "loss": self.view.loss,
            "clip": self.view.clip_coefficient,
            "scale": self.loss_scale,
            "inf": self.found_inf,
        }
        present = {name: value for name, value in named.items() if value is not None}
        self._order = tuple(present)
        return [*present.values(), *(lr for lr in self.lrs if isinstance(lr, Tensor))]

    def complete(self, numbers: Sequence[Sequence[float]]) -> StepInfo:
        """The settings with the numbers that `tensors` became.

        Args:
            numbers: one list for each of `tensors()`.

        Returns:
            The settings, all on the host.
        """
        fetched: Iterator[float] = iter([item[0] for item in numbers])
        named = {name: next(fetched) for name in self._order}
        batch_size = named.get("batch", self.view.batch_size)
        return replace(
            self.info,
            batch_size=None if batch_size is None else int(batch_size),
            lrs=tuple(next(fetched) if isinstance(lr, Tensor) else float(lr) for lr in self.lrs),
            loss=named.get("loss"),
            grads_clipped=_is_clipped(named.get("clip")),
            loss_scale=named.get("scale"),
            skipped=named.get("inf", 0.0) > 0,
        )


def _is_clipped(coefficient: float | None) -> bool | None:
    if coefficient is None or math.isnan(coefficient):
        return None
    return coefficient < UNCLIPPED


def collect(session: "Session") -> StepTensors:
    """Gathers what a sampled step left in the taps of this rank.

    Args:
        session: at the end of a sampled step.

    Returns:
        Tensors that are small and its own.
    """
    gradients, layers, told = session.gradients, session.layers, session.told
    if layers is not None:
        session.info = layers.link(session.info)
    changes = gradients.changes
    microbatches = session.microbatches.take(session.gate.passes)
    raw = gradients.raw()
    weights = _weights(session, microbatches, raw)
    norms = None if layers is None else layers.take_norms()
    log_gains = None if layers is None else layers.take_log_gains()
    samples, loss = session.gate.samples, told.best_loss(session.gate.losses)
    if session.mixed:
        norms, log_gains, samples, loss = NO_VALUES, None, 0, told.loss
    return StepTensors(
        used=gradients.used(),
        raw=raw,
        updates=_joined([change.norms for change in changes]),
        unmoved=_joined([change.unmoved for change in changes]),
        pushed=_joined([change.pushed for change in changes]),
        parameters=gradients.parameter_norms() if session.wants_parameters else None,
        activations=norms,
        log_gains=log_gains,
        facts={} if layers is None else layers.weight_facts(),
        loss=loss,
        microbatch_squares=None if microbatches is None else microbatches.squares.sum(),
        microbatches=None if microbatches is None else len(microbatches.forwards),
        weights=None if weights is None else weights.sum(),
        weight_squares=None if weights is None else weights.square().sum(),
        first_squares=None if gradients.moments is None else gradients.moments.first_squares,
        seconds=None if gradients.moments is None else gradients.moments.seconds,
        shrink=None if gradients.moments is None else gradients.moments.shrink,
        covariance=covariance_of(microbatches, told.batch_size or samples),
        samples=told.batch_size or samples or None,
        loss_scale=gradients.loss_scale,
        found_inf=gradients.found_inf,
        probed={} if session.probes is None else session.probes.take(),
        clock=_clock(session),
    )


def _can_probe(session: "Session") -> bool:
    return session.probes is not None and session.probes.can_evaluate(bool(session.gate.losses))


def _clock(session: "Session") -> Tensor | None:
    if session.probes is None or not session.exchange.joint:
        return None
    return torch.tensor(session.probes.clock())


def make_sample(session: "Session", tensors: StepTensors) -> Sample:
    """The sample of one step.

    Args:
        session: at the end of the sampled step.
        tensors: what was gathered in it, on this rank or on all.

    Returns:
        The sample.
    """
    optimizers = session.optimizers
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    info = StepInfo(
        step=session.step,
        epoch=session.told.epoch,
        optimizer="+".join(dict.fromkeys(type(item).__name__ for item in optimizers)),
        **settings_of(optimizers[0]),
    )
    return Sample(
        view=_view(session, tensors),
        info=info,
        lrs=[_kept(group["lr"]) for group in groups if "lr" in group],
        loss_scale=tensors.loss_scale,
        found_inf=tensors.found_inf,
        facts=tensors.facts,
        clock=tensors.clock,
    )


def _view(session: "Session", tensors: StepTensors) -> StepView:
    lrs = [group["lr"] for group in session.optimizers[0].param_groups if "lr" in group]
    used, raw = tensors.used, tensors.raw
    independent, not_independent = independent_gradients(session, tensors)
    return StepView(
        step=session.step,
        model=session.info,
        gradient_norms=used,
        raw_gradient_norms=raw,
        clipping_hidden=session.clipping.hidden,
        clip_coefficient=None if raw is None else _quotient(used.total(), raw.total()),
        parameter_norms=tensors.parameters,
        update_norms=tensors.updates,
        unmoved_fractions=_fractions(tensors.unmoved, tensors.pushed),
        activation_norms=tensors.activations,
        activation_log_gains=tensors.log_gains,
        activations_unavailable=session.activations_unavailable,
        loss=tensors.loss,
        lr=_kept(lrs[0]) if lrs else None,
        batch_size=tensors.samples,
        microbatch_mean_square=_mean(tensors.microbatch_squares, tensors.microbatches),
        microbatches=tensors.microbatches,
        microbatches_unavailable=session.microbatches.unavailable,
        independent_gradients=independent,
        independent_gradients_unavailable=not_independent,
        microbatch_covariance=microbatch_covariance(session, tensors),
        adam_moments=_adam_moments(tensors),
        probed=tensors.probed,
        loss_can_be_probed=_can_probe(session),
        without_gradient=session.gradients.without_gradient,
        notes=[
            *session.exchange.limits(),
            *([MIXED] if session.mixed else []),
            *(session.probes.notes if session.probes is not None else ()),
        ],
    )


def _weights(
    session: "Session", microbatches: MicrobatchNorms | None, raw: NamedValues | None
) -> Tensor | None:
    """Those of the micro-batches, if the whole gradient that they make up is known as well."""
    tap = session.microbatches
    if microbatches is None or not tap.wants_parts or (raw is None and not tap.untouched):
        return None
    return microbatches.weights


def _adam_moments(tensors: StepTensors) -> AdamMoments | None:
    first, second, shrink = tensors.first_squares, tensors.seconds, tensors.shrink
    if first is None or second is None or shrink is None:
        return None
    return AdamMoments(first.values.sum(), second.values.sum(), shrink)


def _joined(parts: Sequence[NamedValues]) -> NamedValues | None:
    return NamedValues.join(parts) if parts else None


def _fractions(part: NamedValues | None, whole: NamedValues | None) -> NamedValues | None:
    """0 where nothing was pushed."""
    if part is None or whole is None:
        return None
    return NamedValues(part.names, part.values / whole.values.clamp(min=1.0))


def _mean(total: Tensor | None, count: int | Tensor | None) -> Tensor | None:
    return None if total is None or count is None else total / count


def _quotient(after: Tensor, before: Tensor) -> Tensor:
    """Gradients that are all zero were not clipped."""
    return torch.where(after == before, torch.ones_like(after), after / before)


def _kept(lr: float | Tensor) -> float | Tensor:
    """A scheduler changes a tensor in place, so a copy is kept."""
    return lr.detach().clone() if isinstance(lr, Tensor) else lr
