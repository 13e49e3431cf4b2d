"""Stochastic Lanczos quadrature against spectra that are known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradwatch.numerics.lanczos import Operator
from gradwatch.numerics.spectral_density import Quadrature, lanczos_quadratures


def diagonal(values: Tensor) -> Operator:
    return lambda vector: [values * vector[0]]


def moment(found: Quadrature, order: int) -> float:
    return float((found.weights * found.nodes**order).sum())


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.integers(1, 8), st.integers(0, 99)
)
def test_each_is_a_law_inside_the_spectrum(entries: list[float], products: int, seed: int) -> None:
    values = torch.tensor(entries, dtype=torch.float64)
    (found,) = lanczos_quadratures(diagonal(values), [values], products, 1, seed)
    assert len(found.nodes) == len(found.weights) <= min(products, len(values))
    assert float(found.weights.sum()) == pytest.approx(1.0, rel=1e-12)
    rounding = 1e-9 * float(values.abs().max())
    assert float(found.nodes.min()) >= float(values.min()) - rounding
    assert float(found.nodes.max()) <= float(values.max()) + rounding
    assert found.nodes.tolist() == sorted(found.nodes.tolist())


def test_gauss_quadrature_has_exact_moments() -> None:
    """2 k - 1 of them, of the spectral measure of its random vector."""
    values = torch.linspace(-1.0, 2.0, 40, dtype=torch.float64)
    seen: list[Tensor] = []

    def product(vector: list[Tensor]) -> list[Tensor]:
        seen.append(vector[0])
        return [values * vector[0]]

    (found,) = lanczos_quadratures(product, [values], 4, 1)  # type: ignore[arg-type]
    measure = seen[0].square()
    for order in range(8):
        expected = float((measure * values**order).sum())
        assert moment(found, order) == pytest.approx(expected, rel=1e-9)
    assert moment(found, 8) != pytest.approx(float((measure * values**8).sum()), rel=1e-9)


def test_the_mean_of_many_has_the_moments_of_the_spectrum() -> None:
    values = torch.linspace(-1.0, 2.0, 40, dtype=torch.float64) ** 3
    many = lanczos_quadratures(diagonal(values), [values], 4, 200)
    for order in (1, 2, 3):
        found = torch.tensor([moment(one, order) for one in many])
        error = float(found.std()) / math.sqrt(len(many))
        assert float(found.mean()) == pytest.approx(float((values**order).mean()), abs=3 * error)


def test_the_ends_come_with_errors() -> None:
    values = torch.cat([torch.tensor([9.0, -4.0]), torch.linspace(-1.0, 1.0, 60)]).double()
    for found in lanczos_quadratures(diagonal(values), [values], 20, 3):
        assert found.largest[0] == pytest.approx(9.0, abs=1e-6)
        assert found.smallest[0] == pytest.approx(-4.0, abs=1e-6)
        assert 0 < found.largest[1] < 1e-6
        assert (found.nodes[-1], found.nodes[0]) == pytest.approx((9.0, -4.0), abs=1e-6)


def test_a_few_distinct_eigenvalues_are_found_with_their_shares() -> None:
    values = torch.tensor([5.0] * 10 + [0.0] * 85 + [-1.0] * 5, dtype=torch.float64)
    many = lanczos_quadratures(diagonal(values), [values], 6, 150)
    assert all(len(one.nodes) == 3 for one in many), "the subspace ends after three products"
    nodes = torch.stack([one.nodes for one in many]).mean(0)
    torch.testing.assert_close(nodes, torch.tensor([-1.0, 0.0, 5.0]).double(), atol=1e-9, rtol=0)
    shares = torch.stack([one.weights for one in many]).mean(0)
    torch.testing.assert_close(shares, torch.tensor([0.05, 0.85, 0.1]).double(), atol=0.015, rtol=0)


def test_the_same_seed_gives_the_same() -> None:
    values = torch.linspace(0.0, 1.0, 20)
    one, same, other = (
        lanczos_quadratures(diagonal(values), [values], 3, 1, seed)[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one.nodes, same.nodes)
    assert not torch.equal(one.nodes, other.nodes)


def test_what_is_not_finite_is_nan() -> None:
    (found,) = lanczos_quadratures(lambda v: [v[0] * torch.inf], [torch.zeros(4)], 3, 1)
    assert found.nodes.isnan().all()
    assert math.isnan(found.largest[0])
