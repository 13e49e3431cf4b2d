"""The gradient of each backward, seen at the parameters before it is accumulated."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, distributed

from gradwatch.capture.hooks import HookHandles, OwnHook
from gradwatch.capture.part import MICROBATCHES
from gradwatch.capture.step.microbatch.record import MicrobatchRecord
from gradwatch.isolation import Isolation
from gradwatch.numerics.norms import norm

CHANGED: Final = (
    "the accumulated gradient was changed in place between two backward() calls, as by "
    "zero_grad(set_to_none=False) or by clipping each micro-batch"
)
UNSEEN: Final = "the gradient of {name} came without a backward() that was seen"


class LeafTap:
    """Two hooks on each parameter, on for one step.

    A tensor hook sees the gradient of one backward on this process, but also what the user asks
    `torch.autograd.grad` for; the hook after accumulation runs for `backward()` only, and confirms.

    Args:
        record: takes the norms.
        isolation: what to do when a hook fails.
    """

    def __init__(self, record: MicrobatchRecord, isolation: Isolation) -> None:
        self._record = record
        self._isolation = isolation
        self._handles = HookHandles()
        self._tapped: dict[str, Tensor] = {}
        self._forget()

    def _forget(self) -> None:
        self._pending: dict[str, tuple[Tensor, Tensor | None, bool, bool]] = {}
        self._left: dict[str, tuple[int, int]] = {}
        self._tapped = {}

    def attach(self, parameters: Mapping[str, Tensor]) -> None:
        """Puts the hooks on.

        Args:
            parameters: by name; those that take no gradient are left alone.
        """
        self.remove()
        for name, parameter in parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                self._tapped[name] = parameter
                self._handles.add(parameter.register_hook(_hook(self._arrives, name)))
                self._handles.add(
                    parameter.register_post_accumulate_grad_hook(_hook(self._arrived, name))
                )

    def remove(self) -> None:
        """Takes the hooks off; may be called again."""
        self._handles.remove()
        self._forget()

    def check_complete(self, parameters: Mapping[str, Tensor]) -> None:
        """Spoils the step if a gradient is there that no hook has seen.

        Between processes it may be another rank's: a parameter that this rank did not use.

        Args:
            parameters: by name, with their gradients.
        """
        if _several_processes():
            return
        for name, parameter in parameters.items():
            if parameter.grad is not None and name not in self._left:
                self._record.spoil(UNSEEN.format(name=name))
                return

    def untouched(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether nothing has changed the gradients since the last backward accumulated them.

        A change through `.data`, which hides from autograd, hides from this as well. Between
        processes gradients are reduced after the backward, so that there the answer is no.

        Args:
            parameters: by name, with their gradients.
        """
        return not _several_processes() and all(
            item.grad is None or self._left.get(name) == _version(item.grad)
            for name, item in parameters.items()
        )

    def _arrives(self, name: str, gradient: Tensor) -> None:
        if self._record.active:
            self._isolation.run(MICROBATCHES, self._measure, name, gradient)

    def _arrived(self, name: str, parameter: Tensor) -> None:
        if self._record.active:
            self._isolation.run(MICROBATCHES, self._confirm, name, parameter)

    def _measure(self, name: str, gradient: Tensor) -> None:
        present = self._tapped[name].grad
        left = self._left.get(name)
        changed = present is not None and left not in {None, _version(present)}
        projection = self._record.projected(name, gradient)
        self._pending[name] = (norm(gradient), projection, present is not None, changed)

    def _confirm(self, name: str, parameter: Tensor) -> None:
        if name not in self._pending:
            return
        size, projection, continued, changed = self._pending.pop(name)
        # Wrappers that reduce over processes write into the gradients after each backward.
        if changed and not _several_processes():
            self._record.spoil(CHANGED)
            return
        self._left[name] = (0, 0) if parameter.grad is None else _version(parameter.grad)
        self._record.add(name, size, continued=continued, projection=projection)


def _hook(function: Any, name: str) -> OwnHook:
    def hook(tensor: Tensor | None) -> None:
        # While autograd itself is compiled the gradient is a stand-in.
        if tensor is not None and not torch.compiler.is_compiling():
            function(name, tensor)

    return OwnHook(hook)


def _version(gradient: Tensor) -> tuple[int, int]:
    return id(gradient), gradient._version


def _several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized()
