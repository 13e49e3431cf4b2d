"""One sampled step: the view for monitors, and settings that may still be on the device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from gradwatch.capture.parameters import settings_of
from gradwatch.capture.view import NamedValues, StepView
from gradwatch.records import StepInfo

if TYPE_CHECKING:
    from gradwatch.capture.session import Session

UNCLIPPED: Final = 1 - 1e-5
"""A clip coefficient below this is not rounding."""


@dataclass(slots=True)
class Sample:
    """A view and the settings of its step.

    Attributes:
        view: what monitors read.
        info: the settings that are Python values.
        lrs: learning rate of each parameter group; tensors where the optimizer holds tensors.
        loss_scale: of a GradScaler, or None.
        found_inf: above 0 if the scaler skipped the step, or None.
    """

    view: StepView
    info: StepInfo
    lrs: Sequence[float | Tensor] = ()
    loss_scale: Tensor | None = None
    found_inf: Tensor | None = None
    _order: tuple[str, ...] = field(default=())

    def tensors(self) -> list[Tensor]:
        """What must travel to the host to complete the settings."""
        named = {
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
        return replace(
            self.info,
            lrs=tuple(next(fetched) if isinstance(lr, Tensor) else float(lr) for lr in self.lrs),
            loss=named.get("loss"),
            grads_clipped=named["clip"] < UNCLIPPED if "clip" in named else None,
            loss_scale=named.get("scale"),
            skipped=named.get("inf", 0.0) > 0,
        )


def take_sample(session: "Session") -> Sample:
    """Gathers what a sampled step left in the taps.

    Args:
        session: at the end of a sampled step.

    Returns:
        The sample; its tensors are small and its own.
    """
    gradients, optimizers = session.gradients, session.optimizers
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    view = _view(session)
    info = StepInfo(
        step=session.step,
        epoch=session.told.epoch,
        optimizer="+".join(dict.fromkeys(type(item).__name__ for item in optimizers)),
        batch_size=view.batch_size,
        **settings_of(optimizers[0]),
    )
    return Sample(
        view=view,
        info=info,
        lrs=[_kept(group["lr"]) for group in groups if "lr" in group],
        loss_scale=gradients.loss_scale,
        found_inf=gradients.found_inf,
    )


def _view(session: "Session") -> StepView:
    gradients, layers, told = session.gradients, session.layers, session.told
    if layers is not None:
        session.info = layers.link(session.info)
    used, raw = gradients.used(), gradients.raw()
    changes = gradients.changes
    lrs = [group["lr"] for group in session.optimizers[0].param_groups if "lr" in group]
    return StepView(
        step=session.step,
        model=session.info,
        gradient_norms=used,
        raw_gradient_norms=raw,
        clip_coefficient=None if raw is None else _quotient(used.total(), raw.total()),
        parameter_norms=gradients.parameter_norms() if session.wants_parameters else None,
        update_norms=NamedValues.join([norms for norms, _ in changes]) if changes else None,
        unmoved_fractions=NamedValues.join([part for _, part in changes]) if changes else None,
        activation_norms=None if layers is None else layers.take_norms(),
        activation_log_gains=None if layers is None else layers.take_log_gains(),
        loss=told.best_loss(session.gate.losses),
        lr=_kept(lrs[0]) if lrs else None,
        batch_size=told.batch_size or session.gate.samples or None,
        without_gradient=gradients.without_gradient,
    )


def _quotient(after: Tensor, before: Tensor) -> Tensor:
    """Gradients that are all zero were not clipped."""
    return torch.where(after == before, torch.ones_like(after), after / before)


def _kept(lr: float | Tensor) -> float | Tensor:
    """A scheduler changes a tensor in place, so a copy is kept."""
    return lr.detach().clone() if isinstance(lr, Tensor) else lr
