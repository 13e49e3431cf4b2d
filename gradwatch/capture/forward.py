"""The root's training forward passes: when they run, how many samples, which loss."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.capture.hooks import HookHandles, OwnHook, inside_backward
from gradwatch.isolation import Isolation


class ForwardGate:
    """Open while the model runs a training forward of a sampled step.

    Evaluation passes, passes without gradients and the repeated passes of activation
    checkpointing leave it closed, so that inner hooks record each layer once.

    Args:
        model: the root module.
        on_begin: called before each training forward, sampled or not.
        on_end: called after each training forward of a sampled step.
        isolation: what to do when a hook fails.

    Attributes:
        sampling: set by the watch; the gate stays closed while it is False.
        is_open: a training forward is running.
        samples: first dimensions of the inputs since `reset` added up, 0 if they show none.
        losses: the losses that the model itself returned, detached.
    """

    def __init__(
        self,
        model: nn.Module,
        on_begin: Callable[[], None],
        on_end: Callable[[], None],
        isolation: Isolation,
    ) -> None:
        self._on_begin = on_begin
        self._on_end = on_end
        self._isolation = isolation
        self._handles = HookHandles()
        self.sampling = False
        self.is_open = False
        self.reset()
        self._handles.add(model.register_forward_pre_hook(OwnHook(self._begin), with_kwargs=True))
        self._handles.add(
            model.register_forward_hook(OwnHook(self._end), with_kwargs=True, always_call=True)
        )

    def reset(self) -> None:
        """Forgets the forwards of the last step."""
        self.samples = 0
        self.losses: list[Tensor] = []

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self._handles.remove()
        self.is_open = False

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled() or inside_backward():
            return
        self._on_begin()
        if self.sampling:
            self.is_open = True
            self._isolation.run("input hook", self._count, args, kwargs)

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self._isolation.run("output hook", self._take_loss, output)
        self._on_end()

    def _count(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.samples += batch_size((args, kwargs))

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
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, nn.utils.rnn.PackedSequence):
        yield values.data
    elif isinstance(values, Mapping):
        for value in values.values():
            yield from tensors_in(value)
    elif isinstance(values, Sequence) and not isinstance(values, (str, bytes)):
        for value in values:
            yield from tensors_in(value)


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in what a module takes or returns, or None."""
    return next(tensors_in(values), None)


def batch_size(inputs: Any) -> int:
    """The first dimension of the first input tensor that has one, or 0."""
    return next((item.shape[0] for item in tensors_in(inputs) if item.dim() > 0), 0)


def own_loss(output: Any) -> Tensor | None:
    """The loss in a model's output, as `output.loss` or `output["loss"]`, if it is a scalar."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None
