"""Modules outside of the model that its loss calls: a discriminator, a teacher, a criterion."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradwatch.capture.patch import Patch
from gradwatch.capture.probe.kept import kept_attributes
from gradwatch.capture.probe.random_states import devices_of, kept_random_states

_under_way: Final[ContextVar["_Outside | None"]] = ContextVar("_under_way", default=None)
"""Of this thread: what a probe has called so far."""


@contextmanager
def kept_outside(model: nn.Module) -> Iterator[None]:
    """Puts back the state of every other module that is called inside the block.

    From its first call on, such a module computes with copies of its buffers; attributes are put
    back as `kept_attributes` says, and the random streams of its devices. Its parameters are its
    own: a forward that changes them in place does change them. Calls of other threads, which see
    the copies, are none of the probe's.

    Args:
        model: the user's own module, which is looked after elsewhere.

    Yields:
        None.

    Raises:
        DisturbedError: if a large tensor was changed in place.
    """
    with ExitStack() as stack:
        outside = _Outside(model, stack)
        token = _under_way.set(outside)
        stack.callback(_under_way.reset, token)
        _calls.add(outside.called)
        stack.callback(_calls.remove, outside.called)
        yield


def renew_outside() -> None:
    """Gives modules outside of the model copies of their buffers anew, for another evaluation.

    Two gradients whose difference is taken must be of the same function: a power iteration that
    has gone on in between makes it another one.
    """
    outside = _under_way.get()
    if outside is not None:
        outside.renew()


class _Outside:
    """What has been called besides the model."""

    def __init__(self, model: nn.Module, stack: ExitStack) -> None:
        own = list(model.modules())
        self._known = {id(module): module for module in own}  # held, so that no id is given again
        self._devices = devices_of(own)
        self._stack = stack
        self._buffers: list[tuple[nn.Module, dict[str, Tensor | None]]] = []

    def called(self, module: nn.Module) -> None:
        """Looks after a module and what is in it, before its first forward."""
        if id(module) in self._known or _under_way.get() is not self:
            return
        found = [item for item in module.modules() if id(item) not in self._known]
        self._known |= {id(item): item for item in found}
        places = devices_of(found) - self._devices
        self._devices |= places
        if places:
            self._stack.enter_context(kept_random_states(places))
        self._stack.enter_context(kept_attributes(found))
        held = [(item, dict(vars(item)["_buffers"])) for item in found if not _is_script(item)]
        _copy(held)
        self._buffers += held
        for item in filter(_is_script, found):
            for buffer in item.buffers(recurse=False):
                self._stack.callback(_write, buffer, buffer.detach().clone())

    def renew(self) -> None:
        """Copies the buffers again, as they were before the first call."""
        _copy(self._buffers)


def _tell_calls(original: Any, tell: Callable[..., None]) -> Any:
    @wraps(original)
    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tell(module)
        return original(module, *args, **kwargs)

    return call


# No global hook of torch: a compiled module warns of those, and the training would be told.
_calls: Final = Patch(nn.Module, "__call__", _tell_calls)


def _copy(held: list[tuple[nn.Module, dict[str, Tensor | None]]]) -> None:
    copies: dict[int, Tensor] = {}  # one tensor may be the buffer of several modules
    for module, buffers in held:
        used = vars(module)["_buffers"]
        used.clear()
        for name, item in buffers.items():
            if item is not None and id(item) not in copies:
                copies[id(item)] = item.detach().clone()
            used[name] = None if item is None else copies[id(item)]


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)  # its buffers cannot be replaced


def _write(buffer: Tensor, copy: Tensor) -> None:
    buffer.data.copy_(copy)  # of no concern to a graph that holds the buffer: it is as it was
