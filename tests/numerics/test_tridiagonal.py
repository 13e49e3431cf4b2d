"""Ritz values of tridiagonal matrices against `numpy.linalg.eigh`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.numerics.tridiagonal import Tridiagonal, largest_ritz

ENTRIES = st.floats(-1e3, 1e3).map(lambda value: round(value, 6))


def tridiagonal(
    diagonal: list[float], beside: list[float], *, alive: int | None = None, precision: float = 0.0
) -> Tridiagonal:
    """Element i of `beside` couples rows i and i + 1; the last one is the residual's."""
    count = len(diagonal)
    return Tridiagonal(
        torch.tensor(diagonal, dtype=torch.float64),
        torch.tensor(beside, dtype=torch.float64),
        torch.arange(count) < (count if alive is None else alive),
        torch.tensor(True),
        precision,
    )


def dense(diagonal: list[float], beside: list[float]) -> np.ndarray:
    inner = beside[: len(diagonal) - 1]
    return np.diag(diagonal) + np.diag(inner, 1) + np.diag(inner, -1)


ROWS = st.lists(st.tuples(ENTRIES, ENTRIES.map(abs)), min_size=1, max_size=25)


@given(ROWS)
def test_all_leading_parts_at_once(rows: list[tuple[float, float]]) -> None:
    diagonal, beside = ([row[place] for row in rows] for place in (0, 1))
    sizes = torch.arange(1, len(rows) + 1)
    for sign, given_matrix in (
        (1, tridiagonal(diagonal, beside)),
        (-1, tridiagonal(diagonal, beside).negated()),
    ):
        found = largest_ritz(given_matrix, sizes)
        for size in sizes.tolist():
            matrix = sign * dense(diagonal[:size], beside[:size])
            values, vectors = np.linalg.eigh(matrix)
            scale = np.abs(matrix).sum(1).max() + 1e-300
            vector = found.vectors[size - 1].numpy()
            assert float(found.values[size - 1]) == pytest.approx(values[-1], abs=1e-9 * scale)
            assert not vector[size:].any()
            assert np.linalg.norm(vector) == pytest.approx(1.0, rel=1e-9)
            residual = matrix @ vector[:size] - values[-1] * vector[:size]
            assert np.linalg.norm(residual) <= 1e-7 * scale
            if size == 1 or values[-1] - values[-2] > 1e-3 * scale:
                own = beside[size - 1] * abs(vectors[-1, -1])
                assert float(found.errors[size - 1]) <= own + 1e-9 * scale


def test_the_residual_is_the_error_of_a_single_row() -> None:
    found = largest_ritz(tridiagonal([2.0], [0.5]), torch.tensor([1]))
    assert found.values.tolist() == [2.0]
    assert found.errors.tolist() == [0.5]


def test_the_gap_makes_the_error_smaller() -> None:
    """Residuals are the last components of the eigenvectors, coupled outward by 1."""
    found = largest_ritz(tridiagonal([10.0, 0.0], [0.1, 1.0]), torch.tensor([2]))
    values, vectors = np.linalg.eigh(dense([10.0, 0.0], [0.1]))
    residual, other = np.abs(vectors[1, ::-1])
    expected = residual**2 / ((values[1] - residual) - (values[0] + 2 * other))
    assert float(found.errors) == pytest.approx(expected, rel=1e-9)
    assert expected < residual / 50


def test_a_gap_that_the_second_residual_closes_is_none() -> None:
    found = largest_ritz(tridiagonal([1.0, 0.9], [0.01, 1.0]), torch.tensor([2]))
    _, vectors = np.linalg.eigh(dense([1.0, 0.9], [0.01]))
    assert float(found.errors) == pytest.approx(abs(vectors[1, 1]), rel=1e-9)


def test_rows_that_are_not_alive_do_not_count() -> None:
    found = largest_ritz(
        tridiagonal([-3.0, 0.0, 0.0], [0.0, 0.0, 0.0], alive=1), torch.arange(1, 4)
    )
    assert found.values.tolist() == [-3.0] * 3, "not the 0 of the rows that are not there"
    none = largest_ritz(tridiagonal([0.0], [0.0], alive=0), torch.tensor([1]))
    assert none.values.isnan().all()
    assert none.errors.isnan().all()
    assert not none.vectors.any()


def test_the_rounding_of_the_products_is_part_of_the_error() -> None:
    found = largest_ritz(tridiagonal([2.0, -6.0], [0.0, 0.0], precision=1e-7), torch.tensor([2]))
    assert float(found.errors) == pytest.approx(32 * 6 * 1e-7)
    nothing = largest_ritz(tridiagonal([0.0, 0.0], [0.0, 0.0], precision=1e-7), torch.tensor([2]))
    assert float(nothing.errors) == 0.0


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_the_unit_does_not_matter(scale: float) -> None:
    one = largest_ritz(tridiagonal([1.0, -2.0, 0.5], [0.3, 0.2, 0.1]), torch.tensor([3]))
    rows = [[scale * value for value in row] for row in ([1.0, -2.0, 0.5], [0.3, 0.2, 0.1])]
    other = largest_ritz(tridiagonal(rows[0], rows[1]), torch.tensor([3]))
    torch.testing.assert_close(other.values, scale * one.values, rtol=1e-9, atol=0)
    torch.testing.assert_close(other.errors, scale * one.errors, rtol=1e-6, atol=0)


def test_what_was_not_finite_is_nan() -> None:
    good = tridiagonal([1.0], [0.0])
    bad = Tridiagonal(good.diagonal, good.beside, good.alive, torch.tensor(False), 0.0)
    found = largest_ritz(bad, torch.tensor([1]))
    assert found.values.isnan().all()
    assert found.errors.isnan().all()
