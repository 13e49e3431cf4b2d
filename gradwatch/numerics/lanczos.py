"""Extreme eigenvalues of a symmetric operator by the Lanczos iteration, with error bars.

Nothing here reads a number on the host unless it is asked to stop early: a fixed number of products
is enqueued on a GPU without waiting for one of them. What could fail is masked: after an invariant
subspace was found the vectors are zero, and what is not finite comes out as NaN.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gradwatch.numerics.flat import flatten, unflatten
from gradwatch.numerics.noise import inner_product
from gradwatch.numerics.tridiagonal import ROUNDING, Tridiagonal, largest_ritz

Operator = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""A symmetric linear map of lists of tensors to lists of the same shapes."""
TOLERANCE: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Eigenpair:
    """An eigenvalue at an end of the spectrum, with its vector.

    Attributes:
        value: (), from within the spectrum, so that the largest one is approached from below; NaN
            where a product was not finite or the start vector was zero.
        error: () estimate of how far the eigenvalue of the operator, as it is computed, may be off
            (see `largest_ritz`); NaN where the value is.
        vector: of length 1, one tensor for each of the start vector, or zeros where the start
            vector was; none without reorthogonalisation.
        needed: () from how many products on the error was within the tolerance, or one more than
            were made.
    """

    value: Tensor
    error: Tensor
    vector: tuple[Tensor, ...]
    needed: Tensor


@dataclass(frozen=True, slots=True)
class Extremes:
    """Both ends of the spectrum.

    Attributes:
        largest: signed, not by size.
        smallest: signed.
        products: how many products were made.
    """

    largest: Eigenpair
    smallest: Eigenpair
    products: int


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A tridiagonal matrix and the vectors on which the operator acts as it.

    Attributes:
        tridiagonal: the matrix, of as many rows as there were products.
        basis: (products, D) orthonormal rows, or (0, D) if none was kept.
    """

    tridiagonal: Tridiagonal
    basis: Tensor


def extreme_eigenpairs(
    operator: Operator,
    start: Sequence[Tensor],
    products: int,
    *,
    tolerance: float = TOLERANCE,
    reorthogonalise: bool = True,
    stop: bool = False,
) -> Extremes:
    """Largest and smallest eigenvalue, by products with the operator only.

    Started from the last eigenvector, it takes a few products to follow an eigenvalue; started from
    a random vector some ten. What the start vector holds nothing of is not found.

    Memory: `products` vectors, or four without reorthogonalisation. Then rounding makes copies of
    eigenvalues that have converged, which leaves the extreme ones as they are.

    Args:
        operator: symmetric, such as a `Hessian`.
        start: one tensor for each that the operator takes, of its shape; need not be of length 1.
        products: how many to make, at least 1; no more than the vector has entries are.
        tolerance: relative error of the largest eigenvalue from which on it counts as found.
        reorthogonalise: keep all vectors orthogonal to one another; see above.
        stop: make no more products once the largest eigenvalue is found. Reads the host.

    Returns:
        The two eigenpairs, in the precision of the vectors and on the device of the first one.

    References:
        Lanczos 1950; Paige 1980, Linear Algebra Appl. 34 (rounding); Parlett 1998, "The Symmetric
        Eigenvalue Problem", chapters 10 and 13 (error bars).

    Example:
        >>> matrix = torch.diag(torch.tensor([-5.0, 1.0]))
        >>> found = extreme_eigenpairs(lambda v: [matrix @ v[0]], [torch.ones(2)], 20)
        >>> round(float(found.largest.value), 4), round(float(found.smallest.value), 4)
        (1.0, -5.0)
    """
    found = decompose(
        operator,
        start,
        products,
        keep=reorthogonalise,
        tolerance=tolerance if stop else None,
    )
    return _extremes(found, start, tolerance)


def decompose(
    operator: Operator,
    start: Sequence[Tensor],
    products: int,
    *,
    keep: bool = True,
    tolerance: float | None = None,
) -> Decomposition:
    """The Lanczos iteration.

    Args:
        operator: symmetric.
        start: one tensor for each that the operator takes, of its shape.
        products: how many to make, at least 1; no more than the vector has entries are.
        keep: keep the vectors, and each orthogonal to all before it.
        tolerance: stop when the relative error of the largest eigenvalue is as small, or nothing
            more can be found; this reads the host. None for never.

    Returns:
        The tridiagonal matrix and the vectors.
    """
    recurrence = _Recurrence(start, products, keep)
    for _ in range(recurrence.limit):
        recurrence.advance(operator)
        if tolerance is not None and _settled(recurrence.tridiagonal(), tolerance):
            break
    return Decomposition(recurrence.tridiagonal(), recurrence.basis())


def cold_start(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A random vector that is the same every time, and leaves PyTorch's random streams alone.

    Args:
        like: tensors whose shapes, types and devices it takes.
        seed: of the draw; another kind of device gives other numbers.

    Returns:
        Independent normal entries.

    Example:
        >>> first, second = (cold_start([torch.zeros(2)], seed=3) for _ in range(2))
        >>> torch.equal(first[0], second[0])
        True
    """
    generators = {
        place: torch.Generator(place).manual_seed(seed)
        for place in dict.fromkeys(item.device for item in like)
    }
    return [
        torch.randn(
            item.shape, generator=generators[item.device], dtype=item.dtype, device=item.device
        )
        for item in like
    ]


class _Recurrence:
    """The three-term recurrence of Lanczos on flat vectors.

    Subtracting the two neighbours and then, once more, all vectors is a Gram-Schmidt process of two
    passes, which keeps the vectors orthogonal to the precision of their numbers.
    """

    def __init__(self, start: Sequence[Tensor], products: int, keep: bool) -> None:
        self._like = [item.detach() for item in start]
        vector = flatten(self._like)
        self.limit = min(products, vector.numel())
        self._rows = vector.new_zeros(self.limit if keep else 0, vector.numel())
        self._diagonal: list[Tensor] = []
        self._beside: list[Tensor] = []
        self._alive: list[Tensor] = []
        length = _length(vector)
        self._finite = torch.isfinite(length)
        self._back = self._scale = torch.zeros_like(length)
        self._before = torch.zeros_like(vector)
        self._enter(vector, length, self._finite & (length > 0))

    def advance(self, operator: Operator) -> None:
        """One more product."""
        vector, alive = self._vector, self._alive[-1]
        count = len(self._diagonal) + 1
        image = flatten(operator(unflatten(vector, self._like))).to(vector)
        with torch.autocast(vector.device.type, enabled=False):
            centre = torch.where(alive, inner_product([vector], [image]), 0.0)
            rest = image.sub_(centre * vector).sub_(self._back * self._before)
            if len(self._rows):
                rows = self._rows[:count]
                rest = rest.sub_(rows.T @ (rows @ rest))
            length = torch.where(alive, _length(rest), 0.0)
            self._finite = self._finite & torch.isfinite(centre) & torch.isfinite(length)
            self._scale = torch.maximum(self._scale, torch.maximum(centre.abs(), length))
            # Below this the rest is rounding: the vectors so far are an invariant subspace.
            rounding = ROUNDING * torch.finfo(vector.dtype).eps * self._scale
            follows = torch.isfinite(length) & (length > rounding)
            self._back = torch.where(follows, length, 0.0)
            self._diagonal.append(centre)
            self._beside.append(self._back)
            self._before = vector
            if count < self.limit:
                self._enter(rest, length, follows)

    def _enter(self, vector: Tensor, length: Tensor, alive: Tensor) -> None:
        self._vector = torch.where(alive, vector / length, 0.0)
        self._alive.append(alive)
        if len(self._rows):
            self._rows[len(self._alive) - 1] = self._vector

    def tridiagonal(self) -> Tridiagonal:
        """Of the products so far."""
        # Some accelerators have no float64.
        wide = torch.float32 if self._vector.device.type == "mps" else torch.float64
        count = len(self._diagonal)
        diagonal, beside = (
            torch.stack(items).to(wide).nan_to_num(0.0, 0.0, 0.0)
            for items in (self._diagonal, self._beside)
        )
        precision = torch.finfo(self._vector.dtype).eps
        alive = torch.stack(self._alive[:count])
        return Tridiagonal(diagonal, beside, alive, self._finite, precision)

    def basis(self) -> Tensor:
        """The vectors so far."""
        return self._rows[: len(self._diagonal)]


def _settled(tridiagonal: Tridiagonal, tolerance: float) -> bool:
    """Whether further products are of no use. Reads the host."""
    count = len(tridiagonal.diagonal)
    newest = largest_ritz(tridiagonal, torch.tensor([count], device=tridiagonal.diagonal.device))
    found = newest.errors <= tolerance * newest.values.abs()
    ended = ~tridiagonal.finite | (tridiagonal.beside[-1] == 0)
    return bool(found.squeeze() | ended)


def _extremes(found: Decomposition, start: Sequence[Tensor], tolerance: float) -> Extremes:
    count = len(found.tridiagonal.diagonal)
    sizes = torch.arange(1, count + 1, device=found.tridiagonal.diagonal.device)
    pairs = []
    for sign, tridiagonal in ((1.0, found.tridiagonal), (-1.0, found.tridiagonal.negated())):
        ritz = largest_ritz(tridiagonal, sizes)
        good = ritz.errors <= tolerance * ritz.values.abs()
        # A start near two eigenvectors looks settled before a third one comes to light.
        needed = torch.where(good, 0, sizes).amax() + 1
        coefficients = ritz.vectors[-1].to(found.basis.dtype)
        vector: tuple[Tensor, ...] = ()
        if len(found.basis):
            with torch.autocast(found.basis.device.type, enabled=False):
                flat = coefficients @ found.basis
            vector = tuple(unflatten(flat, start))
        value, error = (item[-1].to(found.basis.dtype) for item in (ritz.values, ritz.errors))
        pairs.append(Eigenpair(sign * value + 0.0, error, vector, needed))
    return Extremes(pairs[0], pairs[1], count)


def _length(vector: Tensor) -> Tensor:
    return inner_product([vector], [vector]).sqrt()
