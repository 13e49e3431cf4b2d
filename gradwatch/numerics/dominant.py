"""Dominant eigenvectors of many small matrices, on their device and without a host read.

`torch.linalg.eigh` waits for a GPU to see whether it has converged. Here a fixed number of
squarings does it: the power 2^39 of a matrix has but one eigenvector left.
"""

from typing import Final

import torch
from torch import Tensor

ROUNDS: Final = 13
"""Relative gaps between eigenvalues from 1e-10 on are resolved; within smaller ones any vector of
the two serves as well."""
SQUARINGS: Final = 3
"""In a round, which begins with a trace of 1 and ends with one of at least k^-7."""


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """The largest eigenvalue of a positive semidefinite matrix.

    Args:
        matrix: (k, k), symmetric, such as a Gram matrix.

    Returns:
        () within about the precision of the numbers times the eigenvalue; NaN if the matrix is not
        finite.

    Example:
        >>> largest_eigenvalue(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).round(decimals=3)
        tensor(3.)
    """
    with torch.autocast(matrix.device.type, enabled=False):
        (vector,) = dominant_vectors(matrix[None])
        return torch.dot(vector, matrix @ vector)


def dominant_vectors(matrices: Tensor) -> Tensor:
    """The eigenvectors of the largest eigenvalues of positive semidefinite matrices.

    The error of an eigenvector is the precision of the numbers over the relative gap to the next
    eigenvalue, that of its quotient `v^T A v` the square of it.

    Args:
        matrices: (m, k, k), symmetric.

    Returns:
        (m, k) of length 1; zeros for a matrix of zeros.

    Example:
        >>> dominant_vectors(torch.diag(torch.tensor([2.0, 1.0]))[None])
        tensor([[1., 0.]])
    """
    power = dominant_projectors(matrices)
    # All columns are multiples of the eigenvector; the one of its largest entry is the best.
    place = torch.diagonal(power, dim1=1, dim2=2).argmax(1)
    column = power.gather(2, place[:, None, None].expand(-1, power.shape[1], 1)).squeeze(2)
    length: Tensor = torch.linalg.vector_norm(column, dim=1)
    return column / length.clamp_min(torch.finfo(matrices.dtype).tiny)[:, None]


def dominant_projectors(matrices: Tensor) -> Tensor:
    """The projectors on the eigenvectors of the largest eigenvalues, over their number.

    Args:
        matrices: (m, k, k), symmetric and positive semidefinite.

    Returns:
        (m, k, k) of trace 1; zeros for a matrix of zeros.

    Example:
        >>> dominant_projectors(torch.eye(2)[None])
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
    """
    power = _of_trace_one(matrices)
    for _ in range(ROUNDS):
        for _ in range(SQUARINGS):
            power = power @ power
        power = _of_trace_one(power)
    return power


def _of_trace_one(matrices: Tensor) -> Tensor:
    trace = torch.diagonal(matrices, dim1=1, dim2=2).sum(1)
    return matrices / trace.clamp_min(torch.finfo(matrices.dtype).tiny)[:, None, None]
