"""The two moments of an optimizer step, in every way people call `step`.

plain          pre-hook (gradients are there)  ->  post-hook
closure        pre-hook (gradients are old)  ->  first closure call  ->  post-hook
nested         a subclass that calls super().step() fires both hooks twice
raised         a step that raises has no post-hook, and may be taken again at once
GradScaler     a fused optimizer unscales inside its step: the pre-hook sees scaled gradients
"""

import sys
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.capture.forward.gate import first_tensor
from gradwatch.capture.hooks import HookHandles, OwnHook


class StepListener(Protocol):
    """Who is told of the moments of a step."""

    def begins(self, optimizer: Optimizer) -> None:
        """A step begins; its gradients may not be there yet."""

    def abandoned(self) -> None:
        """A step that had begun raised, and will not be finished."""

    def gradients_ready(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        """The gradients of this step are in `.grad`; the parameters have not moved yet."""

    def stepped(self, optimizer: Optimizer) -> None:
        """The step is over."""


class OptimizerTap:
    """Finds the moments of each step of one optimizer.

    Args:
        optimizer: a torch optimizer.
        listener: who is told.
    """

    def __init__(self, optimizer: Optimizer, listener: StepListener) -> None:
        self._listener = listener
        self._depth = 0
        self._in_closure = False
        self._handles = HookHandles()
        # In a compiled step the hooks run as ever, and all that they call would be compiled too.
        before, after = map(torch.compiler.disable, (self._before, self._after))
        self._handles.add(optimizer.register_step_pre_hook(OwnHook(before)))
        self._handles.add(optimizer.register_step_post_hook(OwnHook(after)))

    def forward_began(self) -> None:
        """A training forward outside a closure: a step that raised has left no post-hook."""
        if self._depth and not self._in_closure:
            self._abandon()

    def remove(self) -> None:
        """Takes the hooks off the optimizer."""
        self._handles.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._depth and _steps_under_way(optimizer) == 1:
            self._depth = 0  # the last one raised, and this one takes it again
        self._depth += 1
        if self._depth > 1:
            return None
        self._listener.begins(optimizer)
        closure, place = _find_closure(args, kwargs)
        if closure is None:
            self._listener.gradients_ready(optimizer, None)
            return None
        return _with_closure(args, kwargs, place, self._listening(optimizer, closure))

    def _listening(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure, telling when it has filled the gradients for the first time.

        Later evaluations (a line search) are at other parameters than the step began with.
        """
        told = False

        def listening_closure() -> Any:
            nonlocal told
            self._in_closure = True
            try:
                result = closure()
            except BaseException:
                self._abandon()
                raise
            finally:
                self._in_closure = False
            if not told:
                told = True
                self._listener.gradients_ready(optimizer, _scalar(result))
            return result

        return listening_closure

    def _abandon(self) -> None:
        self._depth = 0
        self._listener.abandoned()

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._listener.stepped(optimizer)


_STEP: Final = Optimizer.profile_hook_step(lambda _: None).__code__
"""What torch wraps around every `step`, and calls the hooks from."""


def _steps_under_way(optimizer: Optimizer) -> int:
    """The calls of `step` that the caller is inside of; 0 where they are compiled."""
    count = 0
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is _STEP and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


def _find_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[[], Any] | None, int | None]:
    """The closure and its position, None for a keyword; `args[0]` is the optimizer."""
    if callable(kwargs.get("closure")):
        return kwargs["closure"], None
    if len(args) > 1 and callable(args[1]):
        return args[1], 1
    return None, None


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], place: int | None, closure: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if place is None:
        return args, {**kwargs, "closure": closure}
    return (*args[:place], closure, *args[place + 1 :]), kwargs


def _scalar(result: Any) -> Tensor | None:
    loss = first_tensor(result)
    return loss if loss is not None and loss.numel() == 1 else None


def scaler_state(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """What a GradScaler hands to a fused optimizer during its step.

    Args:
        optimizer: the optimizer inside its step.

    Returns:
        The loss scale that the gradients still carry, or None, and a tensor above 0 if a
        gradient was not finite so that the step is skipped, or None.
    """
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
