"""What modules hold besides their parameters and buffers, put back after a probe."""

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.errors import GradwatchError

REGISTERED: Final = ("_parameters", "_buffers", "_modules")
"""What torch keeps in every module; put back by identity."""
_MAPPINGS: Final = frozenset({dict, OrderedDict, defaultdict, Counter})
_SEQUENCES: Final = frozenset({list, deque})
LARGEST_COPY: Final = 2**22
"""Entries of a tensor up to which a copy of it is kept."""
_MOST_ITEMS: Final = 10_000
"""Items of a container up to which what is inside them is looked at."""


class DisturbedError(GradwatchError):
    """A forward changes what a probe cannot put back."""


@contextmanager
def kept_attributes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Puts back what the modules hold when the block ends, also after an error.

    A forward may count its calls, fill a cache, register a module; metrics add up what they have
    seen. Kept are plain values, tensors, lists, dictionaries, sets and deques, nested ones, too,
    and random generators of PyTorch, NumPy and Python.

    Args:
        modules: all of them, not only the roots.

    Yields:
        None.

    Raises:
        DisturbedError: if a large tensor was changed in place.
    """
    undo: list[Callable[[], None]] = []
    seen: dict[int, Any] = {}
    for module in modules:
        attributes = vars(module)
        undo.append(partial(_refill_mapping, attributes, dict(attributes)))
        for name, value in attributes.items():
            if name in REGISTERED:
                if not isinstance(value, dict):
                    continue  # TorchScript's view of what it holds, which Python cannot put back
                undo.append(partial(_refill_mapping, value, dict(value)))
            else:
                _keep(value, undo, seen)
    try:
        yield
    finally:
        failed = None
        for step in undo:
            try:  # whatever happens to one of them, the others are put back
                step()
            except Exception as error:
                failed = error
        if failed is not None:
            raise failed


def _keep(value: Any, undo: list[Callable[[], None]], seen: dict[int, Any]) -> None:
    """Notes how to put back the content of a value that can be changed."""
    if id(value) in seen:
        return
    seen[id(value)] = value  # held, so that its id is not given to another one
    if isinstance(value, Tensor):
        _keep_tensor(value, undo)
    elif type(value) in _MAPPINGS:
        undo.append(partial(_refill_mapping, value, dict(value)))
        _keep_items(value.values(), undo, seen)
    elif type(value) in _SEQUENCES:
        undo.append(partial(_refill_sequence, value, list(value)))
        _keep_items(value, undo, seen)
    elif type(value) is set:
        undo.append(partial(_refill_set, value, set(value)))
    elif isinstance(value, torch.Generator):
        undo.append(partial(_reset_generator, value, value.get_state()))
    elif isinstance(value, np.random.Generator):
        undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
    elif isinstance(value, random.Random):
        undo.append(partial(value.setstate, value.getstate()))


def _keep_items(
    values: Collection[Any], undo: list[Callable[[], None]], seen: dict[int, Any]
) -> None:
    if len(values) <= _MOST_ITEMS:
        for value in values:
            _keep(value, undo, seen)


def _keep_tensor(value: Tensor, undo: list[Callable[[], None]]) -> None:
    # A parameter would be large, and nobody may change it.
    if isinstance(value, nn.Parameter) or value.grad_fn is not None or value.is_inference():
        return
    copy = value.detach().clone() if value.numel() <= LARGEST_COPY else None
    undo.append(partial(_refill_tensor, value, value._version, copy))


@torch.no_grad()
def _refill_tensor(value: Tensor, version: int, copy: Tensor | None) -> None:
    if value._version == version:
        return
    if copy is None:
        raise DisturbedError(
            f"the forward changes a tensor of {value.numel()} entries that the model holds as an "
            "attribute, too large for a copy; a probe cannot put it back"
        )
    value.copy_(copy)


def _reset_generator(value: torch.Generator, state: Tensor) -> None:
    value.set_state(state)


def _refill_mapping(value: dict[Any, Any], copy: dict[Any, Any]) -> None:
    if not (_same(value.keys(), copy.keys()) and _same(value.values(), copy.values())):
        value.clear()
        value.update(copy)


def _refill_sequence(value: Any, copy: list[Any]) -> None:
    if not _same(value, copy):
        value.clear()
        value.extend(copy)


def _refill_set(value: set[Any], copy: set[Any]) -> None:
    value.clear()
    value.update(copy)


def _same(one: Collection[Any], other: Collection[Any]) -> bool:
    """The same objects: comparing tensors by value would read them."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))
