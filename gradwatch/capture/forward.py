"""The root's training forward passes: when they run, how many samples, which loss."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.capture.hooks import HookHandles, OwnHook, inside_backward, is_traced
from gradwatch.isolation import Isolation


class ForwardGate:
    """Open while the model runs a training forward of a sampled step.

    Evaluation passes, passes without gradients and the repeated passes of activation
    checkpointing leave it closed, so that inner hooks record each layer once.

    Args:
        model: the root module, or None if its calls are out of reach.
        on_begin: called before each training forward, sampled or not.
        on_end: called after each training forward of a sampled step, with whether it was
            completed: False if it raised.
        isolation: what to do when a hook fails.

    Attributes:
        sampling: set by the watch; the gate stays closed while it is False.
        is_open: a training forward is running.
        passes: training forwards since `reset`, sampled or not.
        samples: first dimensions of the inputs since `reset` added up, 0 if they show none.
        losses: the losses that the model itself returned, detached.
    """

    def __init__(
        self,
        model: nn.Module | None,
        on_begin: Callable[[], None],
        on_end: Callable[[bool], None],
        isolation: Isolation,
    ) -> None:
        self._on_begin = on_begin
        self._on_end = on_end
        self._isolation = isolation
        self._handles = HookHandles()
        self.sampling = False
        self.is_open = False
        self._held = False
        self._entered = 0
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
        self.samples = 0
        self.losses: list[Tensor] = []

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self._handles.remove()
        self.is_open = False

    def hold(self, samples: int) -> None:
        """Opens the gate by hand, for a loop that trains without calling the root module.

        Until `release`, calls of the root neither count nor close it.

        Args:
            samples: that enter.
        """
        self._open()
        self._held = True
        self._enter(samples)

    def release(self, completed: bool) -> None:
        """Closes the gate after `hold`; does nothing if it is not held.

        Args:
            completed: the batch will be trained on.
        """
        if self._held:
            self._held = False
            self._close(completed)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._held or is_traced() or not module.training:
            return
        if not torch.is_grad_enabled() or inside_backward():
            return
        self._open()
        if self.sampling:
            self._isolation.run("input hook", self._count, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._held or not self.is_open:
            return
        completed = output is not None or sys.exc_info()[0] is None
        if completed:
            self._isolation.run("output hook", self._take_loss, output)
        self._close(completed)

    def _open(self) -> None:
        self._on_begin()
        self.passes += 1
        self._entered = 0
        self.is_open = self.sampling

    def _close(self, completed: bool) -> None:
        if not self.is_open:
            return
        self.is_open = False
        if not completed:  # the batch will not be trained on
            self.samples -= self._entered
        self._on_end(completed)

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(batch_size((args, kwargs)))

    def _enter(self, samples: int) -> None:
        self._entered = samples
        self.samples += samples

    def _take_loss(self, output: Any) -> None:
        loss = own_loss(output)
        if loss is not None:
            self.losses.append(loss.detach().clone())


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
