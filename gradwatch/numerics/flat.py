"""Lists of tensors as one vector, and back."""

from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector, a copy.

    Args:
        tensors: any shapes, types and layouts, at least one; a complex entry becomes two.

    Returns:
        (D,) float32, or float64 if any of them is, on the device of the first one.

    Example:
        >>> flatten([torch.ones(1, 2), torch.tensor(3.0)])
        tensor([1., 1., 3.])
    """
    dense = [item if item.layout == torch.strided else item.to_dense() for item in tensors]
    real = [torch.view_as_real(item) if item.is_complex() else item for item in dense]
    wide = any(item.dtype == torch.float64 for item in real)
    dtype = torch.float64 if wide else torch.float32
    flat = [item.detach().reshape(-1).to(real[0].device, dtype) for item in real]
    return torch.cat(flat)


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The reverse of `flatten`.

    Args:
        flat: (D,).
        like: tensors whose shapes, types and devices the parts get.

    Returns:
        One tensor each, a view where it can be.
    """
    counts = [item.numel() * (2 if item.is_complex() else 1) for item in like]
    parts = zip(flat.split(counts), like, strict=True)
    return [_shaped(part, item) for part, item in parts]


def _shaped(part: Tensor, item: Tensor) -> Tensor:
    if item.is_complex():
        # A copy: seen as complex numbers, memory must begin at an even place.
        part = torch.view_as_complex(part.reshape(*item.shape, 2).clone())
    return part.reshape(item.shape).to(item.device, item.dtype)
