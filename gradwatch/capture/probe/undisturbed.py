"""A second evaluation of the loss that the training does not notice."""

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_OWNED_BY_TORCH: Final = frozenset({"_parameters", "_buffers", "_modules"})


@contextmanager
def undisturbed(
    model: nn.Module,
    *,
    pause: Callable[[], AbstractContextManager[Any]] = nullcontext,
    autocast: torch.dtype | None = None,
) -> Iterator[None]:
    """Protects a training while its loss and the derivatives of it are evaluated again.

    Restored afterwards, also after an error: the random streams of PyTorch (CPU and the devices of
    the model), Python and NumPy; the train or eval mode and every other attribute of the modules
    that is a plain value, a tensor, a list, a dictionary or a set. Gradients are on; attention and
    recurrent layers use kernels that have second derivatives; compiled functions run uncompiled.

    Not protected: what the model holds in objects of other types, generators of its own, and
    the user's own hooks, which run. Within the block `backward()` must not be called: an
    `Objective` takes derivatives by `torch.autograd.grad`.

    Args:
        model: the user's own module, without wrappers.
        pause: gives a context in which the watch's hooks do nothing.
        autocast: evaluate under autocast to this type; None for none.

    Yields:
        None. Each block begins with the same random state, so that two blocks draw the same
        dropout masks; within a block each evaluation draws its own.
    """
    devices = _devices_of(model)
    with ExitStack() as everything:
        everything.enter_context(pause())
        everything.enter_context(_kept_attributes(model))
        everything.enter_context(_kept_random_states(devices))
        everything.enter_context(torch.inference_mode(False))
        everything.enter_context(torch.enable_grad())
        for kind in {device.type for device in devices} | {"cpu"}:
            everything.enter_context(
                torch.autocast(kind, autocast or torch.bfloat16, enabled=autocast is not None)
            )
        everything.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            everything.enter_context(torch.backends.cudnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:
            everything.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def same_draws(model: nn.Module) -> AbstractContextManager[None]:
    """Two evaluations with the same random draws, such as dropout masks.

    To be used inside `undisturbed`: what is evaluated first within this context draws the same as
    what is evaluated first after it.

    Args:
        model: the user's own module.

    Returns:
        The context.
    """
    return _kept_random_states(_devices_of(model))


def _devices_of(model: nn.Module) -> set[torch.device]:
    return {tensor.device for tensor in chain(model.parameters(), model.buffers())}


@contextmanager
def _kept_random_states(devices: set[torch.device]) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=()))
        for kind in {device.type for device in devices} - {"cpu", "meta"}:
            places = [device.index or 0 for device in devices if device.type == kind]
            forks.enter_context(torch.random.fork_rng(devices=places, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _kept_attributes(model: nn.Module) -> Iterator[None]:
    """Puts back what the modules hold besides parameters, buffers and modules.

    A forward may count its calls or fill a cache; metrics add up what they have seen.
    """
    kept = [(vars(module), _copies(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, copies in kept:
            _restore(attributes, copies)


def _copies(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute itself, and a copy of what it contains, for those that can be changed."""
    return {
        name: (value, _copy(value))
        for name, value in attributes.items()
        if name not in _OWNED_BY_TORCH
    }


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value._version, value.detach().clone()) if _is_plain(value) else None
    return value.copy() if type(value) in {list, dict, OrderedDict, set} else None


def _is_plain(value: Tensor) -> bool:
    """A leaf that is no parameter: a parameter would be large, and nobody may change it."""
    return (
        not isinstance(value, nn.Parameter) and value.grad_fn is None and not value.is_inference()
    )


def _restore(attributes: dict[str, Any], copies: dict[str, tuple[Any, Any]]) -> None:
    for name in attributes.keys() - copies.keys() - _OWNED_BY_TORCH:
        del attributes[name]
    for name, (value, copy) in copies.items():
        attributes[name] = value
        if copy is not None:
            _refill(value, copy)


@torch.no_grad()
def _refill(value: Any, copy: Any) -> None:
    if isinstance(value, Tensor):
        version, content = copy
        if value._version != version:
            value.copy_(content)
    elif isinstance(value, list) and not _same(value, copy):
        value[:] = copy
    elif isinstance(value, set) or (isinstance(value, dict) and not _same_items(value, copy)):
        value.clear()
        value.update(copy)


def _same_items(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return _same(one.keys(), other.keys()) and _same(one.values(), other.values())


def _same(one: Collection[Any], other: Collection[Any]) -> bool:
    """The same objects: comparing tensors by value would read them."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
