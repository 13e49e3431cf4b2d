"""The covariance of gradients from a few of them, on their device and without a host read.

Of the D x D matrix nothing is needed but its trace and its largest eigenvalue. Those of the n x n
Gram matrix of n gradients are estimates of them.
"""

from typing import Final

import torch
from torch import Tensor

from gradwatch.numerics.dominant import dominant_projectors

FEWEST: Final = 4
"""Fewer gradients say nothing about the largest eigenvalue."""

MOST: Final = 64
"""More are added up in groups, so that the Gram matrix stays small."""


def covariance_estimate(contributions: Tensor, weights: Tensor, examples: float) -> Tensor:
    """Trace and largest eigenvalue of the covariance of the gradient of one example.

    The whole is `S = sum_b c_b`, the mean gradient of T examples, with a share
    `p_b = w_b/sum(w)` of them in contribution b. The rows `y_b = c_b/sqrt(p_b) - sqrt(p_b) S`
    are those of n - 1 independent draws of covariance `K/T`, turned. So the Gram matrix
    `G_ab = T/(n-1) y_a . y_b` has an expected trace of `tr K`. For equal shares this is
    `M/(n-1) (g_a - gbar) . (g_b - gbar)` with the mean gradients g of M examples each.

    The factor is M and not `M (N-1)/(N-M)`, which is that of independent batches out of N
    examples: the parts of one step have no example in common, and what the finite number takes
    from their variance, their covariance gives back, up to `1/N`.

    The largest eigenvalue of G is too large by about `(tr K - lambda)/(n-1)`, which is taken off.

    Args:
        contributions: (n, d) of n parts of different examples, n at least 2 [L/P]; more than 64
            are added up in groups. Projections serve as well, with their error.
        weights: (n,) of each in the whole, 0 or more in any unit.
        examples: T, of the whole.

    Returns:
        (4,) `tr K` [L²/P²], unbiased; the largest eigenvalue `lambda` of K [L²/P²], to first order
        in 1/n; the variances of the two [L⁴/P⁴], from the scatter of the rows. The second one is
        good to 30 % from 8 rows on, and too large where the eigenvalue is lost among others.

    References:
        Jastrzebski et al. 2020, arXiv:2002.09572 (the Gram matrix); factor and correction are
        derived here.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]) / 4
        >>> covariance_estimate(rows, torch.ones(4), 12.0)[:2].tolist()
        [4.0, 4.0]
    """
    with torch.autocast(contributions.device.type, enabled=False):
        wide = _wide(contributions.device)
        parts, shares = _grouped(contributions, weights.to(contributions.device))
        rows = _centred(parts, shares).to(wide)
        taken = (shares > 0).to(wide)
        count = taken.sum()
        gram = examples / (count - 1.0) * (rows @ rows.T)
        top, squares = dominant(gram)
        pieces = torch.stack([torch.diagonal(gram), top * squares])
        return _corrected(pieces.sum(1), _covariance(pieces, taken), count - 1.0)


def dominant(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of a small positive semidefinite matrix, see `dominant_projectors`.

    Args:
        matrix: (n, n), symmetric, without negative eigenvalues.

    Returns:
        () the eigenvalue, and (n,) the squared entries of its eigenvector of length 1: their mean
        over the space, where several eigenvalues are equal; zeros for a matrix of zeros.

    Example:
        >>> dominant(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        (tensor(2.), tensor([1., 0.]))
    """
    (projector,) = dominant_projectors(matrix[None])
    # Of trace 1, so that this is the quotient of Rayleigh.
    return (matrix * projector).sum(), projector.diagonal()


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _grouped(contributions: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """At most 64 sums of neighbours, and their shares."""
    count = len(contributions)
    shares = weights / weights.sum()
    if count <= MOST:
        return contributions, shares
    group = torch.arange(count, device=contributions.device) * MOST // count
    sums = (part.new_zeros(MOST, *part.shape[1:]) for part in (contributions, shares))
    first, second = sums
    return first.index_add_(0, group, contributions), second.index_add_(0, group, shares)


def _centred(contributions: Tensor, shares: Tensor) -> Tensor:
    """Centred before any product: the mean may be far larger than the noise."""
    roots = shares.to(contributions.dtype).sqrt()[:, None]
    inverse = torch.where(roots > 0, 1.0 / roots, 0.0)
    return contributions * inverse - roots * contributions.sum(0)


def _covariance(pieces: Tensor, taken: Tensor) -> Tensor:
    """(2, 2) of the two sums, from the scatter of what they are the sums of."""
    count = taken.sum()
    away = (pieces - pieces.sum(1, keepdim=True) / count) * taken
    return count / (count - 1.0) * (away @ away.T)


def _corrected(sums: Tensor, covariance: Tensor, freedom: Tensor) -> Tensor:
    """Trace, corrected eigenvalue `(1 + 1/(n-1)) lambda - tr/(n-1)`, and their variances."""
    trace, top = sums.unbind()
    less = 1.0 / freedom
    more = 1.0 + less
    variance = (
        more.square() * covariance[1, 1]
        + less.square() * covariance[0, 0]
        - 2.0 * more * less * covariance[0, 1]
    )
    found = [trace, more * top - less * trace, covariance[0, 0], variance.clamp_min(0.0)]
    return torch.stack(found).to(torch.float32)
