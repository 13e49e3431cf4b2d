"""Ritz values: what the tridiagonal matrix of a Lanczos iteration says of its operator.

Without a host read.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from gradwatch.numerics.dominant import dominant_vectors

ROUNDING: Final = 32.0
"""Rounding of a product with the operator, in units of the precision of its vectors."""


@dataclass(frozen=True, slots=True)
class Tridiagonal:
    """What k products with a symmetric operator have shown of it.

    Attributes:
        diagonal: (k,) of the tridiagonal matrix.
        beside: (k,) beside the diagonal: element i couples rows i and i + 1, and the last one to
            what has not been seen.
        alive: (k,) bool, which rows belong to a vector; the others came after an invariant
            subspace was found, and are 0.
        finite: () bool, whether all products were.
        precision: of the vectors that were multiplied, relative.
    """

    diagonal: Tensor
    beside: Tensor
    alive: Tensor
    finite: Tensor
    precision: float

    def matrix(self) -> Tensor:
        """(k, k) in full."""
        inner = self.beside[:-1]
        return torch.diag(self.diagonal) + torch.diag(inner, 1) + torch.diag(inner, -1)

    def negated(self) -> "Tridiagonal":
        """Of the negative operator, whose largest eigenvalue is the smallest of this one."""
        return Tridiagonal(-self.diagonal, -self.beside, self.alive, self.finite, self.precision)


@dataclass(frozen=True, slots=True)
class Ritz:
    """Approximations to the largest eigenvalue of an operator, from tridiagonal matrices.

    Attributes:
        values: (m,) Ritz values, NaN where there is none.
        errors: (m,) how far the eigenvalue may be off.
        vectors: (m, k) coefficients of the Ritz vectors, of length 1, or zeros.
    """

    values: Tensor
    errors: Tensor
    vectors: Tensor


def largest_ritz(tridiagonal: Tridiagonal, sizes: Tensor) -> Ritz:
    """The largest Ritz value of leading parts of a tridiagonal matrix, with error bars.

    With `r = ||H y - theta y||` the residual of a Ritz vector y, an eigenvalue lambda of H lies
    within r of theta, and within `r²/gap` if all others are at least the gap away. That gap is
    taken as `(theta - r) - (theta2 + 2 r2)`, with the second Ritz value and its residual: each is
    allowed to move towards the other, the second one, which converges later, twice as far. The
    smaller error is given, plus the rounding of the products.

    It is an estimate, not a bound: that lambda is the largest eigenvalue is assumed, and a start
    vector that holds nothing of an eigenvalue never shows it. Of random spectra with random start
    vectors, the error was too small for 1 % at 4 to 6 products and for none of 600 from 8 on.

    Args:
        tridiagonal: of k rows.
        sizes: (m,) integers from 1 to k, how many rows each part has.

    Returns:
        m values, errors and vectors.

    References:
        Parlett 1998, "The Symmetric Eigenvalue Problem", theorem 4.5.1 (residual) and section 10.1
        (the gap theorem).

    Example:
        >>> matrix = Tridiagonal(
        ...     torch.tensor([1.0, 1.0]),
        ...     torch.tensor([2.0, 0.0]),
        ...     torch.tensor([True, True]),
        ...     torch.tensor(True),
        ...     0.0,
        ... )
        >>> largest_ritz(matrix, torch.tensor([1, 2])).values.round(decimals=3)
        tensor([1., 3.])
    """
    with torch.autocast(tridiagonal.diagonal.device.type, enabled=False):
        return _largest_ritz(tridiagonal, sizes)


def _largest_ritz(tridiagonal: Tridiagonal, sizes: Tensor) -> Ritz:
    whole = tridiagonal.matrix()
    rows = torch.arange(len(whole), device=whole.device)
    active = (rows < sizes[:, None]) & tridiagonal.alive
    matrices = whole * active[:, :, None] * active[:, None, :]
    outward = tridiagonal.beside * (rows == sizes[:, None] - 1)
    shifted, span = _positive(matrices, active)
    first = dominant_vectors(shifted)
    value, residual = _quotients(first, matrices, outward)
    rest = dominant_vectors(_deflated(shifted, first))
    second, other = _quotients(rest, matrices, outward)
    gap = torch.where(active.sum(1) > 1, (value - residual) - (second + 2 * other), 0.0)
    squared = residual.square() / gap
    error = torch.where(gap > 0, torch.minimum(residual, squared), residual)
    error = error + ROUNDING * tridiagonal.precision * span
    known = tridiagonal.finite & active[:, 0]
    value = torch.where(known, value, torch.nan)
    return Ritz(value, torch.where(known, error, torch.nan), first)


def _positive(matrices: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Shifted and scaled to eigenvalues from about 1/2 to 1, and 0 outside of the active part.

    Also the largest absolute value that Gershgorin's circles allow an eigenvalue.
    """
    centre = torch.diagonal(matrices, dim1=1, dim2=2)
    radius = matrices.abs().sum(2) - centre.abs()
    low = torch.where(active, centre - radius, torch.inf).amin(1)
    high = torch.where(active, centre + radius, -torch.inf).amax(1)
    some = active[:, 0]
    low, high = torch.where(some, low, 0.0), torch.where(some, high, 0.0)
    span = torch.maximum(low.abs(), high.abs())
    limits = torch.finfo(matrices.dtype)
    width = torch.maximum(high - low, 4 * limits.eps * span).clamp_min(limits.tiny)
    lifted = matrices - torch.diag_embed(active * (low - width)[:, None])
    return lifted / width[:, None, None], span


def _quotients(vectors: Tensor, matrices: Tensor, outward: Tensor) -> tuple[Tensor, Tensor]:
    """Rayleigh quotients and residuals; what is wrong with the vectors themselves counts, too."""
    images = (matrices @ vectors[:, :, None]).squeeze(2)
    values = (images * vectors).sum(1)
    inside = torch.linalg.vector_norm(images - values[:, None] * vectors, dim=1)
    return values, torch.hypot(inside, (outward * vectors).sum(1))


def _deflated(matrices: Tensor, vectors: Tensor) -> Tensor:
    """The matrices without their eigenvectors."""
    images = (matrices @ vectors[:, :, None]).squeeze(2)
    values = (images * vectors).sum(1)
    return matrices - values[:, None, None] * vectors[:, :, None] * vectors[:, None, :]
