"""The root's training forward passes: when they run, how many samples, which loss."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.capture.hooks import (
    HookHandles,
    OwnHook,
    inside_backward,
    is_replica,
    is_traced,
)
from gradwatch.capture.part import INPUT, OUTPUT
from gradwatch.isolation import Isolation

_paused: Final = ContextVar("paused", default=False)
"""Of this thread: what runs now is a probe."""


@contextmanager
def unnoticed() -> Iterator[None]:
    """Lets models run without being noticed, by any watch, as far as this thread goes.

    Yields:
        None.
    """
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


@dataclass(slots=True, eq=False)
class _Pass:
    """One training forward of a sampled step."""

    samples: int = 0
    losses: list[Tensor] = field(default_factory=list)
    version: int = 0
    """Of the parameters that it ran with."""
    went_backward: bool = False


class ForwardGate:
    """Open while the model runs a training forward of a sampled step.

    Evaluation passes, passes without gradients and the repeated passes of activation
    checkpointing leave it closed, so that inner hooks record each layer once. A forward whose
    gradients were thrown away does not count: a GradScaler skipped its step, the gradients were
    those of an attack on the inputs, or of another model.

    Args:
        model: the root module, or None if its calls are out of reach.
        on_begin: called before each training forward, sampled or not.
        on_end: called after each training forward of a sampled step, with whether it was
            completed: False if it raised.
        isolation: what to do when a hook fails.
        on_inputs: called with what each training forward of a sampled step was called with.

    Attributes:
        sampling: set by the watch; the gate stays closed while it is False.
        muted: set by the watch while the gradients of the step are complete, so that further
            forwards of a line search do not count.
        passes: training forwards since `reset`, sampled or not.
    """

    def __init__(
        self,
        model: nn.Module | None,
        on_begin: Callable[[], None],
        on_end: Callable[[bool], None],
        isolation: Isolation,
        on_inputs: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        self._on_begin = on_begin
        self._on_end = on_end
        self._on_inputs = on_inputs
        self._isolation = isolation
        self._handles = HookHandles()
        self.sampling = False
        self.muted = False
        self._is_open = False
        self._held = False
        self._by_hand = False
        self.reset()
        if model is not None:
            self._attach(model)

    def _attach(self, model: nn.Module) -> None:
        self._handles.add(model.register_forward_pre_hook(OwnHook(self._begin), with_kwargs=True))
        self._handles.add(
            model.register_forward_hook(OwnHook(self._end), with_kwargs=True, always_call=True)
        )

    def reset(self) -> None:
        """Forgets the forwards of the last step."""
        self.passes = 0
        self._passes: list[_Pass] = []

    @property
    def samples(self) -> int:
        """First dimensions of the inputs since `reset` added up, 0 if they show none."""
        return sum(item.samples for item in self._passes)

    @property
    def losses(self) -> list[Tensor]:
        """The losses that the model itself returned, detached."""
        return [loss for item in self._passes for loss in item.losses]

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self._handles.remove()
        self._is_open = False

    def hold(self, samples: int) -> None:
        """Opens the gate by hand, for a loop that trains without calling the root module.

        From now on, calls of the root neither count nor close it.

        Args:
            samples: that enter.
        """
        self._by_hand = True
        self._open()
        self._held = True
        if self.is_open:
            self._passes[-1].samples = samples

    pause = staticmethod(unnoticed)

    @property
    def is_open(self) -> bool:
        """A training forward is running, and what this thread does is a part of it."""
        return self._is_open and not _paused.get()

    def release(self, completed: bool) -> None:
        """Closes the gate after `hold`; does nothing if it is not held.

        Args:
            completed: the batch will be trained on.
        """
        if self._held:
            self._held = False
            self._close(completed)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._by_hand or is_traced() or is_replica(module) or _paused.get():
            return
        if not module.training:
            return
        if not torch.is_grad_enabled() or inside_backward():
            return
        if self.sampling:
            self._isolation.run(INPUT, self._drop_those_in_vain, module)
        self._open()
        if self.is_open:
            self._isolation.run(INPUT, self._count, module, args, kwargs)
            if self._on_inputs is not None:
                self._isolation.run(INPUT, self._on_inputs, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.is_open or self._by_hand or is_replica(module) or _paused.get():
            return
        completed = output is not None or sys.exc_info()[0] is None
        if completed:
            self._isolation.run(OUTPUT, self._take_loss, output)
            self._isolation.run(OUTPUT, self._await_backward, output)
        self._close(completed)

    def _open(self) -> None:
        self._on_begin()
        if self.muted:
            return
        self.passes += 1
        self._is_open = self.sampling
        if self.sampling:
            self._passes.append(_Pass())

    def _close(self, completed: bool) -> None:
        if not self.is_open:
            return
        self._is_open = False
        if not completed and self._passes:  # the batch will not be trained on
            self._passes.pop()
        self._on_end(completed)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passes[-1].samples = batch_size((args, kwargs))
        self._passes[-1].version = _version(module)

    def _take_loss(self, output: Any) -> None:
        loss = own_loss(output)
        if loss is not None:
            self._passes[-1].losses.append(loss.detach().clone())

    def _await_backward(self, output: Any) -> None:
        here = self._passes[-1]

        def note(gradients: Any) -> None:
            if not torch.is_grad_enabled():  # else the gradient becomes a part of the loss
                here.went_backward = True

        for tensor in tensors_in(output):
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(note)

    def _drop_those_in_vain(self, module: nn.Module) -> None:
        """Forgets forwards that went backward, left no gradient and were not stepped on."""
        suspects = [item for item in self._passes if item.went_backward]
        if not suspects or any(item.grad is not None for item in module.parameters()):
            return
        version = _version(module)
        vain = [item for item in suspects if item.version == version]
        self._passes = [item for item in self._passes if item not in vain]
        self.passes -= len(vain)


def _version(module: nn.Module) -> int:
    """A number that grows with every change of the parameters in place, as a step is one."""
    return sum(item._version for item in module.parameters())


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in what a module takes or returns, in order, through containers.

    Args:
        values: a tensor, a (nested) sequence or mapping of them, or anything else.

    Yields:
        Each tensor found; a packed sequence yields its data.
    """
    for leaf in _leaves(values):
        yield leaf if isinstance(leaf, Tensor) else leaf.data


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in what a module takes or returns, or None."""
    return next(tensors_in(values), None)


def batch_size(inputs: Any) -> int:
    """The number of packed sequences or the first dimension of the first input, or 0."""
    for leaf in _leaves(inputs):
        if isinstance(leaf, PackedSequence):
            return int(leaf.batch_sizes[0])  # always on the host
        if leaf.dim() > 0:
            return leaf.shape[0]
    return 0


def _leaves(values: Any) -> Iterator[Tensor | PackedSequence]:
    if isinstance(values, (Tensor, PackedSequence)):
        yield values
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from _leaves(value)
    elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        for value in values:
            yield from _leaves(value)


def own_loss(output: Any) -> Tensor | None:
    """The loss in a model's output, as `output.loss` or `output["loss"]`, if it is a scalar."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
