"""L2 norms of lists of tensors: exact to 1e-5 at 1e8 elements, and cheap on their device.

On the CPU a norm by dot products reads the memory once at full bandwidth, where the fused norm
takes twice as long; accumulation in float32 loses digits with the length, so long tensors are
cut into chunks. On a GPU, whose kernels add up in a tree, one fused call serves all tensors. Half
precision is accumulated in float32: in float16 a norm above 65504 would be infinite.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

CHUNK: Final = 2**16
"""Longest dot product that is exact to 4e-6 even for equal entries, whose roundings add up."""


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
    if flat[0].device.type == "cpu":
        return torch.stack([_norm_by_dots(item) for item in flat])
    return _fused_norms(flat)


def _norm_by_dots(item: Tensor) -> Tensor:
    """Half precision is widened chunk by chunk: the fused norm is 1e-4 off for equal entries."""
    if item.numel() <= CHUNK:
        return _squared(item).sqrt_().to(torch.float32)
    squares = torch.stack([_squared(part) for part in torch.split(item, CHUNK)])
    return squares.sum().sqrt_().to(torch.float32)


def _squared(part: Tensor) -> Tensor:
    wide = part if part.dtype in {torch.float32, torch.float64} else part.float()
    return torch.dot(wide, wide)


def _fused_norms(flat: Sequence[Tensor]) -> Tensor:
    """One fused call per element type; float64 keeps its precision."""
    results: dict[int, Tensor] = {}
    real = [item if item.is_floating_point() else item.float() for item in flat]
    for dtype in dict.fromkeys(item.dtype for item in real):
        members = [index for index, item in enumerate(real) if item.dtype == dtype]
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        values = torch._foreach_norm([real[index] for index in members], 2, dtype=accumulate)
        results.update(zip(members, values, strict=True))
    return torch.stack([results[index].to(torch.float32) for index in range(len(real))])
