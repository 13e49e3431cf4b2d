"""L2 norms of lists of tensors: exact to 1e-5 at 1e8 elements, and cheap on their device.

On the CPU a norm by dot products reads the memory once at full bandwidth, where the fused norm
takes twice as long; float32 accumulation over more than some 1e7 elements loses digits, so long
tensors are cut into chunks. On a GPU one fused call serves all tensors. Half precision is
accumulated in float32: in float16 a norm above 65504 would be infinite.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

DOT_CHUNK: Final = 2**20
FUSED_CHUNK: Final = 2**18


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor.

    Args:
        tensors: n tensors of any shape, type, layout and device, sparse ones included.

    Returns:
        (n,) float32, on the device of the first tensor, in the unit of the entries. Entries
        beyond 1.8e19 overflow to infinity, below 1e-23 they count as 0.

    Example:
        >>> norms([torch.tensor([3.0, 4.0]), torch.zeros(2, 2)])
        tensor([5., 0.])
    """
    if not tensors:
        return torch.zeros(0)
    flat = [_flatten(tensor.detach()) for tensor in tensors]
    device = flat[0].device
    if all(item.device == device for item in flat):
        return _norms_on_device(flat)
    result = torch.zeros(len(flat), device=device)
    for place in dict.fromkeys(item.device for item in flat):
        members = [index for index, item in enumerate(flat) if item.device == place]
        part = _norms_on_device([flat[index] for index in members]).to(device)
        for index, value in zip(members, part.unbind(), strict=True):
            result[index] = value
    return result


def norm(tensor: Tensor) -> Tensor:
    """L2 norm of one tensor.

    Args:
        tensor: any shape, type and layout.

    Returns:
        () float32, on the device of the tensor.
    """
    return norms([tensor])[0]


def total_norm(parts: Tensor) -> Tensor:
    """Norm of a whole from the norms of its parts, `sqrt(sum_i parts_i²)`.

    Args:
        parts: (n,) float32.

    Returns:
        () float32.

    Example:
        >>> total_norm(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    whole: Tensor = torch.linalg.vector_norm(parts)
    return whole


def _flatten(tensor: Tensor) -> Tensor:
    """A one-dimensional view where the memory allows it, a copy otherwise."""
    if tensor.layout != torch.strided:
        tensor = _stored_values(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.dim() > 1 and not tensor.is_contiguous():
        order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        tensor = tensor.permute(order)
    return tensor.reshape(-1)


def _stored_values(tensor: Tensor) -> Tensor:
    # An uncoalesced gradient lists a row twice; only the sum of both is the gradient.
    return tensor.coalesce().values() if tensor.is_sparse else tensor.values()


def _norms_on_device(flat: Sequence[Tensor]) -> Tensor:
    if flat[0].device.type == "cpu" and all(_has_accurate_dot(item) for item in flat):
        squares = [_squared_by_dots(item) for item in flat]
        return torch.stack(squares).sqrt_().to(torch.float32)
    return _fused_norms(flat)


def _has_accurate_dot(item: Tensor) -> bool:
    return item.dtype == torch.float32


def _squared_by_dots(item: Tensor) -> Tensor:
    if item.numel() <= DOT_CHUNK:
        return torch.dot(item, item)
    return torch.stack([torch.dot(part, part) for part in torch.split(item, DOT_CHUNK)]).sum()


def _fused_norms(flat: Sequence[Tensor]) -> Tensor:
    real = [item if item.is_floating_point() else item.float() for item in flat]
    pieces = [piece for item in real for piece in torch.split(item, FUSED_CHUNK)]
    counts = [max(1, -(-item.numel() // FUSED_CHUNK)) for item in real]
    parts = [part.to(torch.float32) for part in _foreach(pieces)]
    if len(parts) == len(real):
        return torch.stack(parts)
    stacked = torch.split(torch.stack(parts), counts)
    return torch.stack([part[0] if len(part) == 1 else total_norm(part) for part in stacked])


def _foreach(pieces: list[Tensor]) -> list[Tensor]:
    """One fused call per element type; float64 keeps its precision."""
    results: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(piece.dtype for piece in pieces):
        members = [index for index, piece in enumerate(pieces) if piece.dtype == dtype]
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch._foreach_norm([pieces[index] for index in members], 2, dtype=accumulate)
        results.update(zip(members, values, strict=True))
    return [results[index] for index in range(len(pieces))]
