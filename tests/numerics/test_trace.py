"""Hutchinson's estimate of a trace against traces that are known."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradwatch.numerics.trace import hutchinson_trace


def symmetric(size: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return root + root.T


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.integers(2, 5))
def test_a_diagonal_is_exact(curvatures: list[float], samples: int) -> None:
    diagonal = torch.tensor(curvatures, dtype=torch.float64)
    found = hutchinson_trace(lambda v: [diagonal * v[0]], [diagonal], samples)
    scale = 1e-12 * float(diagonal.abs().sum())
    assert float(found.value) == pytest.approx(float(diagonal.sum()), abs=scale)
    assert float(found.standard_error) <= scale


@pytest.mark.parametrize("shift", [-100.0, 0.0, 3.0])
def test_it_is_unbiased_with_the_error_that_it_says(shift: float) -> None:
    """The variance of a sample is twice the sum of squares beside the diagonal, in closed form.

    With the shift of -100 the trace is negative: an estimate that ends there would still be right,
    one that returns the first sample would miss the error.
    """
    matrix = symmetric(12) + shift * torch.eye(12, dtype=torch.float64)
    beside = matrix - torch.diag(matrix.diagonal())
    deviation = math.sqrt(2 * float(beside.square().sum()))
    found = hutchinson_trace(lambda v: [matrix @ v[0]], [torch.zeros(12).double()], 4000)
    error = deviation / math.sqrt(4000)
    assert float(found.standard_error) == pytest.approx(error, rel=0.05)
    assert float(found.value) == pytest.approx(float(matrix.trace()), abs=3 * error)


def test_all_samples_are_drawn_and_differ() -> None:
    seen: list[Tensor] = []

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        seen.append(torch.cat([part.flatten() for part in vector]))
        return [-1.0 * part for part in vector]

    like = [torch.zeros(3, 4), torch.zeros(30)]
    found = hutchinson_trace(product, like, 5)
    assert float(found.value) == -42.0
    assert len({tuple(item.tolist()) for item in seen}) == 5
    assert all(set(item.tolist()) == {-1.0, 1.0} for item in seen)
    first = seen[0]
    hutchinson_trace(product, like, 1)
    assert torch.equal(seen[-1], first), "the same signs each time"
    hutchinson_trace(product, like, 1, seed=1)
    assert not torch.equal(seen[-1], first)


def test_the_random_streams_of_the_training_stay() -> None:
    state = torch.get_rng_state()
    hutchinson_trace(lambda v: v, [torch.zeros(3)], 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_single_sample_has_no_error() -> None:
    found = hutchinson_trace(lambda v: [2.0 * v[0]], [torch.zeros(3)], 1)
    assert float(found.value) == 6.0
    assert found.standard_error.isnan()


def test_what_is_not_finite_comes_out_as_nan() -> None:
    found = hutchinson_trace(lambda v: [v[0] * torch.nan], [torch.zeros(3)], 3)
    assert found.value.isnan()
    assert found.standard_error.isnan()


def test_no_number_is_read_on_the_host() -> None:
    """Fake tensors have no numbers: whatever depends on one raises."""
    with FakeTensorMode():
        matrix = torch.randn(30, 30)
        hutchinson_trace(lambda v: [matrix @ v[0]], [torch.randn(30)], 3)
