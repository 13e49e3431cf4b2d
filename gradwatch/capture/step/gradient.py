"""The gradients of one step, optimizer by optimizer."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.capture.step.adam import StateMoments, state_moments
from gradwatch.capture.step.clipping import BETWEEN, ClippingRecord
from gradwatch.capture.step.optimizer import scaler_state
from gradwatch.capture.step.update import Change, UpdateCapture
from gradwatch.capture.view import NamedValues
from gradwatch.numerics.norms import norms
from gradwatch.numerics.sharding import local_part


class GradientCapture:
    """Collects what the optimizers of one step consumed and did, as far as it lies on this rank.

    Args:
        clipping: what clipping did in this step.
        updates: also compare the parameters before and after.

    Attributes:
        changes: what each optimizer changed.
        loss_scale: the scale that a fused optimizer took out itself, or None.
        found_inf: above 0 if the loss scaler skipped the step, or None.
        moments: what the state of an Adam told, or None.
    """

    def __init__(self, clipping: ClippingRecord, updates: bool) -> None:
        self._clipping = clipping
        self._measures_updates = updates
        self._updates: dict[int, UpdateCapture] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets, at the end of a step."""
        # By optimizer: a step that raised and is taken again must not count twice.
        self._parts: dict[int, NamedValues] = {}
        self._raw_parts: dict[int, NamedValues] = {}
        self._without: dict[int, list[str]] = {}
        self._observed: dict[str, Tensor] = {}
        self.changes: list[Change] = []
        self._parameters: dict[str, Tensor] = {}
        self.loss_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.moments: StateMoments | None = None

    def release(self) -> None:
        """Forgets, and lets go of all parameters."""
        self.reset()
        self._updates = {}

    def observe(self, parameters: Mapping[str, Tensor], *, again: bool = True) -> None:
        """Measures the gradients as they are now, before the user clips them.

        Args:
            parameters: whose gradients, by name.
            again: also those that have been measured in this step.
        """
        present = {
            name: item
            for name, item in parameters.items()
            if item.grad is not None and (again or name not in self._observed)
        }
        now = gradient_norms(present)
        whole = self._clipping.undo(now, list(present.values())) or now
        self._observed.update(zip(whole.names, whole.values.unbind(), strict=True))

    def forget_observed(self) -> None:
        """What was measured before was not of this step."""
        self._observed = {}

    def ready(self, optimizer: Optimizer, parameters: dict[str, Tensor]) -> None:
        """Measures the gradients that the optimizer is about to consume.

        Args:
            optimizer: about to step.
            parameters: all that it holds, by name.
        """
        with_gradient = {name: item for name, item in parameters.items() if item.grad is not None}
        used = gradient_norms(with_gradient)
        scale, found_inf = scaler_state(optimizer)
        if scale is not None:
            used = NamedValues(used.names, used.values / scale.to(used.values))
        self.loss_scale = scale.clone() if scale is not None else self.loss_scale
        self.found_inf = found_inf.clone() if found_inf is not None else self.found_inf
        self._parts[id(optimizer)] = used
        raw = self._clipping.undo(used, list(with_gradient.values()))
        if raw is not None:
            self._raw_parts[id(optimizer)] = raw
        self._parameters.update(parameters)
        self._without[id(optimizer)] = [
            name for name, item in parameters.items() if item.grad is None and item.requires_grad
        ]
        if self._measures_updates and with_gradient:
            self._updates.setdefault(id(optimizer), UpdateCapture()).before(with_gradient)

    def read_moments(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> None:
        """Reads what an Adam remembers, before it takes in the gradients of this step.

        Args:
            optimizer: about to step.
            parameters: all that it holds, by name.
        """
        self.moments = state_moments(optimizer, parameters)

    def stepped(self, optimizer: Optimizer) -> None:
        """Compares the parameters with what they were before the step."""
        update = self._updates.get(id(optimizer))
        change = None if update is None else update.after()
        if change is not None:
            self.changes.append(change)

    def used(self) -> NamedValues:
        """The norms of all gradients that the optimizers consumed [L/P]."""
        parts = list(self._parts.values())
        return NamedValues.join(parts) if parts else NamedValues((), torch.zeros(0))

    def raw(self) -> NamedValues | None:
        """The norms before clipping, as observed or undone; None if that was not seen [L/P]."""
        if self._clipping.hidden == BETWEEN:
            return None
        parts = list(self._raw_parts.values())
        undone = NamedValues.join(parts) if parts else None
        if not self._observed:
            return undone
        known = dict(self._observed)
        if undone is not None:  # of those that nobody has clipped since they were measured
            known = dict(zip(undone.names, undone.values.unbind(), strict=True)) | known
        names = self.used().names
        if any(name not in known for name in names):
            return None
        return NamedValues.stack({name: known[name] for name in names})

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """Trainable parameters that no gradient reached."""
        return tuple(name for names in self._without.values() for name in names)

    def parameter_norms(self) -> NamedValues:
        """The norms of all parameters as they are now [P]."""
        parts = [local_part(item) for item in self._parameters.values()]
        return NamedValues(tuple(self._parameters), norms(parts))


def gradient_norms(parameters: Mapping[str, Tensor]) -> NamedValues:
    """Norms of the gradients that are there.

    Args:
        parameters: name and parameter.

    Returns:
        A norm for each parameter that has a gradient [L/P]; of the part on this rank.
    """
    present = {
        name: local_part(item.grad) for name, item in parameters.items() if item.grad is not None
    }
    return NamedValues(tuple(present), norms(list(present.values())))
