"""The loss of an optimizer step, from those of its micro-batches.

The Trainer hands `backward()` one scalar per micro-batch, already divided so that the scalars of
a step add up to its loss: by the number of tokens in all micro-batches together where the model
takes `num_items_in_batch`, by the number of micro-batches elsewhere. That holds whoever computes
the loss: the model, label smoothing, `compute_loss_func`, or an overridden `compute_loss`.
`logs["loss"]` is no source: it is a mean over the logging interval, with NaN left out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from gradwatch.capture.forward.gate import own_loss
from gradwatch.capture.hooks import HookHandles, OwnHook, inside_backward, is_traced
from gradwatch.capture.step.backward import BackwardObserver


class StepLoss(ABC):
    """Adds up the loss of one optimizer step; costs nothing on steps that are not sampled.

    Args:
        is_sampled: whether the step under way is sampled.
    """

    def __init__(self, is_sampled: Callable[[], bool]) -> None:
        self._is_sampled = is_sampled
        self.reset()

    def reset(self) -> None:
        """A step begins."""
        self._parts: list[Tensor] = []

    @abstractmethod
    def total(self) -> Tensor | None:
        """The loss of the step in this process, on its device [L]; None if it was not seen."""

    @abstractmethod
    def remove(self) -> None:
        """Stops looking."""


class BackwardLoss(StepLoss):
    """The sum of what `backward()` is called on, before the loss scaler multiplies it.

    Args:
        is_sampled: whether the step under way is sampled.
    """

    def __init__(self, is_sampled: Callable[[], bool]) -> None:
        super().__init__(is_sampled)
        self._observer = BackwardObserver(self._note)

    @override
    def total(self) -> Tensor | None:
        return torch.stack(self._parts).sum() if self._parts else None

    @override
    def remove(self) -> None:
        self._observer.remove()

    def _note(self, loss: Tensor) -> None:
        # Reentrant checkpointing calls backward() inside of backward().
        if self._is_sampled() and not inside_backward():
            self._parts.append(loss.detach().float().reshape(()).clone())


class OutputLoss(StepLoss):
    """The loss in the model's output, for engines whose `backward()` is out of sight.

    Args:
        model: the module whose output is looked at.
        is_sampled: whether the step under way is sampled.
        world: number of processes that `num_items_in_batch` counts the tokens of.
    """

    def __init__(self, model: nn.Module, is_sampled: Callable[[], bool], world: int) -> None:
        super().__init__(is_sampled)
        self._world = world
        self._handles = HookHandles()
        self._handles.add(model.register_forward_hook(OwnHook(self._note), with_kwargs=True))

    @override
    def reset(self) -> None:
        super().reset()
        self._over_whole_step = False

    @override
    def total(self) -> Tensor | None:
        if not self._parts:
            return None
        losses = torch.stack(self._parts)
        return losses.sum() * self._world if self._over_whole_step else losses.mean()

    @override
    def remove(self) -> None:
        self._handles.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        trains = module.training and torch.is_grad_enabled()
        if not (trains and self._is_sampled()) or inside_backward() or is_traced():
            return
        loss = own_loss(output)
        if loss is not None:
            self._over_whole_step = kwargs.get("num_items_in_batch") is not None
            self._parts.append(loss.detach().float().reshape(()).clone())
