"""Hooks that belong to one model only, and leave it when asked to."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class OwnHook:
    """A hook that falls silent on every copy of the model.

    PyTorch copies and pickles a module together with its hooks (for averaged weights, for
    checkpoints of whole models). A copied hook would write the copy's values into this watch,
    or make the file unreadable where gradwatch is not installed. So a copy of this object is a
    callable of the standard library that takes anything and does nothing.

    Args:
        function: what the hook does.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        """Does what the hook does."""
        return self._function(*arguments)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nullcontext().__exit__

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return getattr, (nullcontext(), "__exit__")


class HookHandles:
    """The hooks of one watch, removed together."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(self, handle: RemovableHandle) -> None:
        """Takes responsibility for a hook."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Removes all hooks; may be called again."""
        while self._handles:
            self._handles.pop().remove()


def inside_backward() -> bool:
    """Whether autograd is running a backward pass, where checkpointing repeats forwards."""
    return bool(torch._C._current_graph_task_id() != -1)


def is_traced() -> bool:
    """Whether a forward runs to be transformed or recorded, not to train on its result.

    Under `torch.func` (per-example gradients), `torch.jit.trace`, `torch.export` and
    `torch.compile` the tensors are stand-ins, and whatever a hook does would become part of the
    user's function.
    """
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_replica(module: nn.Module) -> bool:
    """Whether a module is one of the copies that `nn.DataParallel` runs in threads.

    The copies share the hooks of the original; each sees a part of the batch, all at once.
    """
    return getattr(module, "_is_replica", False)
