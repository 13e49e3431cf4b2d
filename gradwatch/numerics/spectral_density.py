"""The density of all eigenvalues of an operator that can only be multiplied with vectors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradwatch.numerics.lanczos import Operator, cold_start, decompose
from gradwatch.numerics.tridiagonal import Tridiagonal, largest_ritz


@dataclass(frozen=True, slots=True)
class Quadrature:
    """Nodes and weights that stand for the spectrum as one random vector sees it.

    The sum of `weight x f(node)` estimates the mean of f over all eigenvalues.

    Attributes:
        nodes: (k,) float64 on the host, rising; Ritz values.
        weights: (k,) float64 on the host, with sum 1.
        largest: Ritz value and error.
        smallest: Ritz value and error.
    """

    nodes: Tensor
    weights: Tensor
    largest: tuple[float, float]
    smallest: tuple[float, float]


def lanczos_quadratures(
    operator: Operator, like: Sequence[Tensor], products: int, samples: int, seed: int = 0
) -> list[Quadrature]:
    """Stochastic Lanczos quadrature. Reads the host.

    For a random direction v the spectral measure `sum_i (v . e_i)² delta(lambda_i)` has the density
    of eigenvalues as its mean. The Lanczos iteration from v gives its Gauss quadrature, whose
    first `2 products - 1` moments are exact; the scatter between samples is what is left.

    Memory: `products` vectors.

    Args:
        operator: symmetric, such as a `Hessian`.
        like: one tensor for each that the operator takes.
        products: of each sample, at least 1.
        samples: random directions, at least 1.
        seed: of the first direction.

    Returns:
        One quadrature a sample, of nodes that are NaN if a product was not finite.

    References:
        Golub & Welsch 1969; Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38; Ghorbani,
        Krishnan & Xiao 2019, arXiv:1901.10159 (of networks).
    """
    found = []
    for sample in range(samples):
        start = cold_start(like, seed + sample)
        found.append(_quadrature(decompose(operator, start, products).tridiagonal))
    return found


def _quadrature(tridiagonal: Tridiagonal) -> Quadrature:
    count = int(tridiagonal.alive.sum())
    matrix = tridiagonal.matrix()[:count, :count].cpu()
    nodes, vectors = torch.linalg.eigh(matrix.double())
    if not bool(tridiagonal.finite):
        nodes = torch.full_like(nodes, torch.nan)
    size = torch.tensor([len(tridiagonal.diagonal)], device=tridiagonal.diagonal.device)
    ends = []
    for sign, one in ((1.0, tridiagonal), (-1.0, tridiagonal.negated())):
        ritz = largest_ritz(one, size)
        ends.append((sign * float(ritz.values), float(ritz.errors)))
    return Quadrature(nodes, vectors[0].square(), *ends)
