"""Random projection of gradients to a few thousand numbers, tensor by tensor as they arrive."""

import random
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor

SIZE: Final = 4096

TABLE: Final = 2**18
"""Random signs that are kept; longer tensors use them again, with another sign for each use."""


class Projection:
    """Adds up entries of a gradient with random signs: a count sketch.

    Entry i goes to place i modulo m. Inner products of projections are unbiased estimates of those
    of the gradients, over the draw of the signs, with a standard error of about
    `|x| |y| sqrt(2/m)`, or `sqrt(1/m)` for orthogonal ones: squared norms are good to 2 % with
    4093 places. Gradients of no more than m entries are projected without any error. The error is
    larger where the gradient lives on a few entries with distances that are multiples of m; m is
    prime, so that columns of matrices do not meet in one place.

    It is linear, takes two passes over a gradient, draws no random numbers but its own, and needs
    1 MiB for the signs. The same name must always stand for a tensor of the same layout.

    Args:
        size: upper limit of m, the largest prime up to it; at least 2.
        seed: of the signs.

    Attributes:
        size: m.

    References:
        Charikar, Chen and Farach-Colton 2002 (count sketch); Weinberger et al. 2009,
        arXiv:0902.2206 (inner products).

    Example:
        >>> projection = Projection()
        >>> row = projection({"weight": torch.tensor([3.0, 4.0])})
        >>> row.shape, row.square().sum()
        (torch.Size([4093]), tensor(25.))
    """

    def __init__(self, size: int = SIZE, seed: int = 0) -> None:
        self.size = _largest_prime(size)
        self._seed = seed
        self._taken = 0
        self._places: dict[tuple[str, int], tuple[int, tuple[int, ...]]] = {}
        self._signs: dict[torch.device, Tensor] = {}

    def __call__(self, named: Mapping[str, Tensor]) -> Tensor:
        """Projects a gradient.

        Args:
            named: its tensors by name, at least one; half precision is widened.

        Returns:
            (m,) on the device of the first tensor, in the unit of the entries; the sum of those of
            the single tensors.
        """
        parts = [self._one(name, tensor) for name, tensor in named.items()]
        if len(parts) == 1:
            return parts[0]
        device = parts[0].device
        return torch.stack([part.to(device) for part in parts]).sum(0)

    def _one(self, name: str, tensor: Tensor) -> Tensor:
        flat = _flat(tensor)
        start, turns = self._place(name, flat.numel())
        signs = self._signs_on(flat.device)
        dtype = torch.float64 if flat.dtype == torch.float64 else torch.float32
        result = torch.zeros(self.size, device=flat.device, dtype=dtype)
        for number, part in enumerate(flat.split(TABLE)):
            first = (start + number * TABLE) % self.size
            rows = -(-(first + len(part)) // self.size)
            padded = result.new_zeros(rows * self.size)
            torch.mul(part, signs[: len(part)], out=padded[first : first + len(part)])
            result.add_(padded.view(rows, self.size).sum(0), alpha=turns[number])
        return result

    def _place(self, name: str, length: int) -> tuple[int, tuple[int, ...]]:
        """Where a tensor begins, and the sign of each use of the table for it."""
        key = name, length
        if key not in self._places:
            start = self._taken % self.size
            # Equal signs in all parts of a long tensor would add up what they have in common.
            draw = random.Random(self._seed * 1_000_003 + len(self._places))
            turns = tuple(draw.choice((-1, 1)) for _ in range(0, max(1, length), TABLE))
            self._places[key] = start, turns
            self._taken += length
        return self._places[key]

    def _signs_on(self, device: torch.device) -> Tensor:
        if device not in self._signs:
            generator = torch.Generator().manual_seed(self._seed)
            bits = torch.randint(2, (TABLE,), generator=generator, device="cpu")
            self._signs[device] = (2.0 * bits - 1.0).to(torch.float32).to(device)
        return self._signs[device]


def _flat(tensor: Tensor) -> Tensor:
    """One-dimensional and real, in the order of the indices."""
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).reshape(-1)


def _largest_prime(limit: int) -> int:
    return next(
        number
        for number in range(limit, 1, -1)
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1))
    )
