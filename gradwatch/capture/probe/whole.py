"""A sharded model that computes with whole parameters for a while, on each rank by itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradwatch.capture.joint_sums import JointSums
from gradwatch.numerics.sharding import is_sharded, local_part

_HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks")
_OF_SHARDING: Final = "torch.distributed.fsdp"


def sharded_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are distributed over the ranks.

    Args:
        model: the user's own module.

    Returns:
        Name and tensor.
    """
    return {name: item for name, item in model.named_parameters() if is_sharded(item)}


def whole_parameters(model: nn.Module, sums: JointSums) -> dict[str, Tensor]:
    """Copies of all parameters, of the sharded ones as a whole by one sum over the ranks.

    Args:
        model: the user's own module.
        sums: over the ranks.

    Returns:
        Name and leaf tensor, which needs a gradient if the parameter does.
    """
    sharded = sharded_parameters(model)
    found = sums.sum([padded(item, sums.share(item)) for item in sharded.values()])
    whole = dict(zip(sharded, found, strict=True))
    return {
        name: whole.get(name, item).detach().clone().requires_grad_(item.requires_grad)
        for name, item in model.named_parameters()
    }


@torch.no_grad()
def padded(tensor: Tensor, share: float, part: Tensor | None = None) -> Tensor:
    """This rank's share of a sum over the ranks that makes a tensor whole.

    Args:
        tensor: sharded or plain.
        share: the weight of its part here.
        part: another tensor that is distributed like it, its part here; None for its own.

    Returns:
        Of the whole shape, 0 where other ranks hold it.
    """
    mine = local_part(tensor) if part is None else part
    if not is_sharded(tensor):
        return mine.detach() * share
    from torch.distributed.tensor._utils import (  # noqa: PLC0415 - takes 0.3 s to import
        compute_local_shape_and_global_offset,
    )

    sharding: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, sharding.device_mesh, sharding.placements
    )
    whole = mine.new_zeros(tensor.shape)
    place = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
    whole[place] = mine.detach() * share
    return whole


@contextmanager
def without_sharding(model: nn.Module) -> Iterator[None]:
    """Takes the hooks off that would gather the parameters, and puts them back.

    Args:
        model: the user's own module.

    Yields:
        None.
    """
    taken: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for module in model.modules():
            for kind in _HOOKS:
                hooks: dict[int, Callable[..., Any]] = vars(module)[kind]
                if any(map(_is_of_sharding, hooks.values())):
                    taken.append((hooks, dict(hooks)))
                    for key in [key for key, hook in hooks.items() if _is_of_sharding(hook)]:
                        del hooks[key]
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def _is_of_sharding(hook: Callable[..., Any]) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_OF_SHARDING)
