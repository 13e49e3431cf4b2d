"""Trace and top eigenvalue of a covariance from a few rows, against the covariance itself."""

import math
from itertools import permutations, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.numerics.gram import FEWEST, MOST, covariance_estimate, dominant
from gradwatch.theory.break_even import corrected_top_eigenvalue

pytestmark = pytest.mark.usefixtures("one_thread")


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(rows: Tensor) -> Tensor:
    away = rows - rows.mean(0)
    return away.T @ away / len(rows)


@pytest.mark.parametrize("count", [2, 4, 25, MOST])
def test_equal_parts_give_the_corrected_sample_covariance(count: int) -> None:
    gradients = normal(count, 40) * torch.linspace(0.1, 3.0, 40, dtype=torch.float64) + 5.0
    examples = 7
    found = covariance_estimate(gradients / count, torch.full((count,), 3.0), examples * count)
    values = examples * torch.linalg.eigvalsh(torch.cov(gradients.T))
    trace, top = float(values.sum()), float(values[-1])
    assert float(found[0]) == pytest.approx(trace, rel=1e-6)
    assert float(found[1]) == pytest.approx(corrected_top_eigenvalue(top, trace, count), rel=1e-6)


def test_the_variances_are_those_of_sums_of_as_many_pieces() -> None:
    rows = normal(6, 40)
    found = covariance_estimate(rows / 6, torch.ones(6), 6.0)
    values, vectors = torch.linalg.eigh((rows - rows.mean(0)) @ (rows - rows.mean(0)).T / 5)
    squares = (rows - rows.mean(0)).square().sum(1) / 5
    along = values[-1] * vectors[:, -1].square()
    assert float(found[2]) == pytest.approx(6 * float(squares.var()), rel=1e-5)
    corrected = 6 / 5 * along - squares / 5
    assert float(found[3]) == pytest.approx(6 * float(corrected.var()), rel=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_disjoint_parts_need_no_correction_for_the_size_of_the_data(parts: int) -> None:
    """The mean over all ways to draw the parts is tr K up to 1/N, however much of N they take."""
    data = normal(8, 3)
    truth = float(covariance(data).trace())
    orders = torch.tensor(list(permutations(range(8), 2 * parts))[:: 1 if parts == 2 else 71])
    total = 0.0
    for rows in orders:
        gradients = data[rows].view(parts, 2, 3).mean(1)
        total += float(covariance_estimate(gradients / parts, torch.ones(parts), 2.0 * parts)[0])
    mean = total / len(orders)
    assert mean == pytest.approx(truth * 8 / 7, rel=1e-5 if parts == 2 else 4e-2)
    independent_batches = mean / 2 * (2 * 7 / 6)
    assert abs(independent_batches / truth - 1) > abs(mean / truth - 1) + 0.1


@pytest.mark.parametrize("sizes", [(1, 2, 1), (3, 1), (2, 2)])
def test_unequal_parts_are_unbiased(sizes: tuple[int, ...]) -> None:
    """The mean over all draws with replacement is tr K."""
    data, total = normal(3, 2), sum(sizes)
    draws = list(product(range(3), repeat=total))
    found = []
    for rows in draws:
        parts = data[list(rows)].split(list(sizes))
        contributions = torch.stack([part.sum(0) / total for part in parts])
        weights = torch.tensor([10.0 * size for size in sizes])
        found.append(float(covariance_estimate(contributions, weights, total)[0]))
    mean = sum(found) / len(found)
    assert mean == pytest.approx(float(covariance(data).trace()), rel=1e-6)


def test_a_part_of_no_weight_is_no_part() -> None:
    rows = normal(5, 6)
    rows[2] = 0.0
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])
    others = [0, 1, 3, 4]
    expected = covariance_estimate(rows[others], weights[others], 10.0)
    torch.testing.assert_close(covariance_estimate(rows, weights, 10.0), expected)


def test_many_parts_are_taken_together() -> None:
    count = 3 * MOST
    gradients = normal(count, 10)
    found = covariance_estimate(gradients / count, torch.ones(count), 2.0 * count)
    groups = gradients.view(MOST, 3, 10).mean(1)
    torch.testing.assert_close(
        found, covariance_estimate(groups / MOST, torch.ones(MOST), 2.0 * count)
    )


def test_a_mean_far_above_the_noise_is_taken_off_first() -> None:
    noise = normal(10, 50)
    rows = (noise + 1e4 * normal(50, seed=1)).float() / 10
    found = covariance_estimate(rows, torch.ones(10), 10.0)
    truth = covariance_estimate(noise / 10, torch.ones(10), 10.0)
    torch.testing.assert_close(found[:2], truth[:2], rtol=3e-3, atol=0)


def test_the_standard_errors_are_those_of_repetition() -> None:
    spectrum = torch.arange(1, 201, dtype=torch.float64) ** -1.5
    draws = [
        covariance_estimate(normal(25, 200, seed=seed) * spectrum.sqrt() / 25, torch.ones(25), 25.0)
        for seed in range(300)
    ]
    found = torch.stack(draws).double()
    scatter, said = found[:, :2].std(0), found[:, 2:].mean(0).sqrt()
    assert float(said[0] / scatter[0]) == pytest.approx(1.0, abs=0.15)
    assert float(said[1] / scatter[1]) == pytest.approx(1.0, abs=0.3)
    error = scatter / math.sqrt(300)
    assert abs(float(found[:, 0].mean() - spectrum.sum())) < 3 * float(error[0])
    assert abs(float(found[:, 1].mean() - spectrum[0])) < 3 * float(error[1])


def test_gradients_that_are_alike_do_not_scatter() -> None:
    rows = torch.ones(FEWEST, 3)
    assert covariance_estimate(rows, torch.ones(FEWEST), 8.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    rows = torch.ones(FEWEST, 3)
    rows[1, 1] = bad
    assert covariance_estimate(rows, torch.ones(FEWEST), 8.0).isnan().all()


def test_nothing_is_read_on_the_host() -> None:
    rows, weights = normal(3 * MOST, 5), torch.ones(3 * MOST)
    with NoHostReads():  # type: ignore[no-untyped-call]
        covariance_estimate(rows, weights, 10.0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.integers(0, 9))
def test_the_dominant_eigenvalue(values: list[float], seed: int) -> None:
    basis, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    top, squares = dominant(basis @ eigenvalues.diag() @ basis.T)
    assert float(top) == pytest.approx(max(values), rel=1e-9, abs=1e-12)
    if max(values) > 1e-6:
        assert float(squares.sum()) == pytest.approx(1.0)
    others = sorted(values)[:-1]
    if max(values) > 1e-6 and (not others or others[-1] < 0.99 * max(values)):
        vector = basis[:, int(eigenvalues.argmax())]
        torch.testing.assert_close(squares, vector.square(), rtol=0, atol=1e-8)
