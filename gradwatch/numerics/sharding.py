"""Tensors whose parts lie on several ranks: what is here, and how often it counts.

A sum over the entries of a sharded tensor is the sum over the ranks of the sum over each part,
where a part that several ranks hold counts once: each of them adds its share of it. One sum over
the ranks serves all tensors together; a norm by the tensor's own methods would need one each.
"""

from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of processes that were joined, 1 for a single one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over ranks (a `DTensor`).

    Args:
        tensor: any tensor.

    Returns:
        True for FSDP2 and tensor parallelism, False for plain tensors, also under DDP.
    """
    if not dist.is_available() or not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - takes 0.3 s to import

    return isinstance(tensor, DTensor)


def is_in_parts(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over more than one rank.

    Args:
        tensor: any tensor.

    Returns:
        False also for a `DTensor` on a mesh of one rank.
    """
    return is_sharded(tensor) and tensor.device_mesh.size() > 1  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank; the tensor itself if it is plain.

    Args:
        tensor: any tensor.

    Returns:
        A plain tensor that shares the memory where it can.

    Raises:
        ValueError: if its entries are partial sums: to add them up the ranks would have to meet,
            and some of them may not come.
    """
    if not is_sharded(tensor):
        return tensor
    if any(item.is_partial() for item in tensor.placements):  # type: ignore[attr-defined]
        raise ValueError("a tensor whose entries are partial sums over ranks has no part here")
    part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def share(tensor: Tensor, world_size: int) -> float:
    """The weight of this rank's part in a sum over all ranks.

    Args:
        tensor: plain, and then equal on all ranks, or sharded.
        world_size: number of ranks that the sum goes over.

    Returns:
        1 / (number of ranks that hold the same part): 1 for a tensor sharded over all ranks,
        1/`world_size` for a plain one.
    """
    if not is_sharded(tensor):
        return 1 / world_size
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    copies: int = world_size // mesh.size()
    for dimension, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_replicate() or placement.is_partial():
            copies *= mesh.size(dimension)
    return 1 / copies
