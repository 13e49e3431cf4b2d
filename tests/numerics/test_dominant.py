"""Dominant eigenvectors by repeated squaring against `torch.linalg.eigh`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradwatch.numerics.dominant import dominant_vectors, largest_eigenvalue


def gram(size: int, rank: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return root @ root.T


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 100), st.floats(1e-30, 1e30))
def test_the_largest_eigenvalue_of_a_gram_matrix(
    size: int, rank: int, seed: int, scale: float
) -> None:
    matrix = scale * gram(size, rank, seed)
    expected = torch.linalg.eigvalsh(matrix)[-1]
    torch.testing.assert_close(largest_eigenvalue(matrix), expected, rtol=1e-13, atol=0)


def test_many_matrices_at_once() -> None:
    matrices = torch.stack([gram(6, 6, seed) for seed in range(5)])
    vectors = dominant_vectors(matrices)
    for matrix, vector in zip(matrices, vectors, strict=True):
        expected = torch.linalg.eigh(matrix).eigenvectors[:, -1]
        assert abs(expected @ vector) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9, 1e-3])
def test_nearly_equal_eigenvalues(gap: float) -> None:
    turn, _ = torch.linalg.qr(gram(3, 3, 0))
    matrix = turn @ torch.diag(torch.tensor([1.0, 1.0 - gap, 0.3], dtype=torch.float64)) @ turn.T
    (vector,) = dominant_vectors(matrix[None])
    assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1.0, rel=1e-12)
    assert float(torch.linalg.vector_norm(matrix @ vector - vector)) < 1e-9
    assert float(largest_eigenvalue(matrix)) == pytest.approx(1.0, abs=1e-12)


def test_zeros_and_what_is_not_finite() -> None:
    assert largest_eigenvalue(torch.zeros(3, 3)) == 0.0
    assert largest_eigenvalue(torch.full((3, 3), torch.nan)).isnan()
    assert not dominant_vectors(torch.zeros(2, 3, 3)).any()


def test_autocast_does_not_make_it_rough() -> None:
    matrix = gram(20, 20, 0)
    expected = float(torch.linalg.eigvalsh(matrix)[-1])
    with torch.autocast("cpu", torch.bfloat16):
        found = largest_eigenvalue(matrix.float())
    assert float(found) == pytest.approx(expected, rel=1e-5)
