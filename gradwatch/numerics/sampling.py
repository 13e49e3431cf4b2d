"""What an optimizer step changed, from a fixed sample of coordinates of each tensor.

A copy of all parameters would double the memory; 4096 coordinates a tensor give the norm of
the update to about a percent (small tensors exactly) and show which weights did not move.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

COORDINATES: Final = 4096
_DOUBLE: Final = frozenset({torch.float64, torch.complex128})


class CoordinateSample:
    """The same randomly chosen coordinates of a list of tensors, step after step.

    Args:
        tensors: the n tensors, for their sizes and devices; they are not kept. A complex entry
            is two coordinates.
        coordinates: how many to take of each; a tensor that has no more is taken whole.
        seed: of the choice, which does not touch PyTorch's own random stream.
    """

    def __init__(
        self, tensors: Sequence[Tensor], coordinates: int = COORDINATES, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = [tensor.numel() * (2 if tensor.is_complex() else 1) for tensor in tensors]
        draw = partial(torch.randint, size=(coordinates,), generator=generator, device="cpu")
        self._indices = [
            None if size <= coordinates else draw(size).to(tensor.device)
            for size, tensor in zip(sizes, tensors, strict=True)
        ]
        self.counts = [min(size, coordinates) for size in sizes]
        device = tensors[0].device if tensors else torch.device("cpu")
        self._device = device
        self._owner = torch.repeat_interleave(torch.tensor(self.counts)).to(device)
        scale = [size / max(count, 1) for size, count in zip(sizes, self.counts, strict=True)]
        self._scale = torch.tensor(scale, dtype=torch.float32).to(device)
        self._taken = torch.tensor(self.counts, dtype=torch.float32).to(device)

    def gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Copies the sampled coordinates.

        Args:
            tensors: n dense tensors of the sizes that the sample was made for; None counts
                as zeros.

        Returns:
            (sum of counts,) float32, or float64 if any tensor is; lower precisions are
            represented exactly.
        """
        wide = any(tensor is not None and tensor.dtype in _DOUBLE for tensor in tensors)
        dtype = torch.float64 if wide else torch.float32
        parts = [
            torch.zeros(count) if tensor is None else _pick(_flat(tensor.detach()), index)
            for tensor, index, count in zip(tensors, self._indices, self.counts, strict=True)
        ]
        return torch.cat([part.to(self._device, dtype) for part in parts])

    def change_norms(self, before: Tensor, after: Tensor) -> Tensor:
        """Estimates `||after - before||` of each tensor.

        Args:
            before: what `gather` returned before the step.
            after: what it returned after the step.

        Returns:
            (n,) float32; exact for tensors of at most `coordinates` entries.
        """
        squares = self._sum_by_tensor((after - before).square_())
        return (squares * self._scale).sqrt_()

    def unmoved_counts(
        self, before: Tensor, after: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Estimates how many entries with a non-zero gradient the step left bit-identical.

        Args:
            before: what `gather` returned before the step.
            after: what it returned after the step.
            gradient: the same coordinates of the gradients.

        Returns:
            (n,) float32, their number, and (n,) float32, the number of entries that had a
            gradient; exact for tensors of at most `coordinates` entries.
        """
        pushed = gradient != 0
        stuck = (before == after).logical_and_(pushed)
        counts = (self._sum_by_tensor(part.float()) * self._scale for part in (stuck, pushed))
        return next(counts), next(counts)

    def _sum_by_tensor(self, values: Tensor) -> Tensor:
        sums = torch.zeros(len(self.counts), device=self._device, dtype=torch.float32)
        return sums.index_add_(0, self._owner, values.to(torch.float32))


def _flat(tensor: Tensor) -> Tensor:
    """A complex number is two coordinates."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _pick(flat: Tensor, index: Tensor | None) -> Tensor:
    return flat if index is None else flat.index_select(0, index)
