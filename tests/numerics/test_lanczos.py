"""The Lanczos iteration against closed forms, dense eigenvalue solvers and other packages."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.numerics.flat import flatten, unflatten
from gradwatch.numerics.lanczos import (
    Extremes,
    Operator,
    cold_start,
    decompose,
    extreme_eigenpairs,
)

WAITING = ("_local_scalar_dense", "eigh", "eigvals", "svd", "nonzero", "unique", "masked_select")
"""Parts of the names of operations after which a GPU is waited for."""


def times(matrix: Tensor) -> Operator:
    return lambda vector: [matrix @ vector[0]]


def ones(size: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.ones(size, dtype=dtype)]


def symmetric(eigenvalues: Tensor, seed: int) -> Tensor:
    size = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    matrix: Tensor = (turn * eigenvalues) @ turn.T
    return matrix


def heavy_tailed(size: int, seed: int) -> Tensor:
    """Of both signs, a few of them large, as those of networks are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64) ** 3


def ends(found: Extremes) -> tuple[float, float]:
    return float(found.largest.value), float(found.smallest.value)


# --- Closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eigenvalues", "expected", "products"),
    [
        ([-5.0, 1.0], (1.0, -5.0), 2),
        ([3.0, -3.0, 1.0], (3.0, -3.0), 3),
        ([-1.0, -3.0, -2.0], (-1.0, -3.0), 3),
        ([7.0], (7.0, 7.0), 1),
        ([2.0] * 50, (2.0, 2.0), 20),
        ([0.0] * 50, (0.0, 0.0), 20),
        ([4.0] + [1.0] * 49, (4.0, 1.0), 20),
        ([1e-12, -1e-9], (1e-12, -1e-9), 2),
        ([1e12, -1e9, 5.0], (1e12, -1e9), 3),
    ],
)
@pytest.mark.parametrize("stop", [False, True])
def test_a_diagonal(
    eigenvalues: list[float], expected: tuple[float, float], products: int, stop: bool
) -> None:
    matrix = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64))
    found = extreme_eigenpairs(
        times(matrix), ones(len(eigenvalues)), 20, tolerance=1e-12, stop=stop
    )
    largest = max(map(abs, eigenvalues))
    assert ends(found) == pytest.approx(expected, rel=1e-12, abs=1e-14 * largest)
    assert float(found.largest.error) <= 1e-12 * largest
    assert found.products <= products
    assert stop or found.products == products


def test_a_single_number() -> None:
    found = extreme_eigenpairs(lambda v: [-3.0 * v[0]], [torch.tensor(0.1)], 20)
    assert ends(found) == (-3.0, -3.0)
    assert found.largest.vector[0].shape == ()
    assert found.products == 1


def test_a_vector_in_several_tensors_of_several_shapes() -> None:
    curvatures = [torch.tensor([[1.0, 2.0], [-4.0, 0.5]]), torch.tensor(9.0), torch.zeros(3)]
    found = extreme_eigenpairs(
        lambda v: [a * b for a, b in zip(curvatures, v, strict=True)],
        [torch.ones_like(item) for item in curvatures],
        20,
    )
    assert ends(found) == pytest.approx((9.0, -4.0), rel=1e-5)
    one, other, rest = (item.abs() for item in found.largest.vector)
    torch.testing.assert_close(
        (one, other), (torch.zeros(2, 2), torch.tensor(1.0)), atol=1e-5, rtol=0
    )
    assert rest.shape == (3,)
    torch.testing.assert_close(
        found.smallest.vector[0].abs(), torch.tensor([[0.0, 0.0], [1.0, 0.0]]), atol=1e-5, rtol=0
    )


def test_a_start_without_the_eigenvector_does_not_find_it() -> None:
    matrix = torch.diag(torch.tensor([100.0, 2.0, 1.0], dtype=torch.float64))
    start = [torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)]
    found = extreme_eigenpairs(times(matrix), start, 3)
    assert ends(found) == pytest.approx((2.0, 1.0), rel=1e-12)
    assert int(found.largest.needed) == 2


def test_complex_entries_are_two_numbers() -> None:
    """f(z) = 2 x² + y²/2 has the curvatures 4 and 1 along the real and the imaginary axis."""

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        return [torch.complex(4.0 * vector[0].real, vector[0].imag)]

    found = extreme_eigenpairs(product, [torch.tensor([1.0 + 1.0j])], 20)
    assert ends(found) == pytest.approx((4.0, 1.0), rel=1e-5)
    assert abs(complex(found.largest.vector[0][0])) == pytest.approx(1.0)
    assert abs(found.largest.vector[0][0].imag) < 1e-5


# --- Any matrix -----------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(1e-6, 1e6), st.integers(1, 12))
def test_residuals_are_what_they_say(size: int, seed: int, scale: float, products: int) -> None:
    matrix = scale * symmetric(heavy_tailed(size, seed), seed)
    values = torch.linalg.eigvalsh(matrix)
    found = extreme_eigenpairs(times(matrix), cold_start(ones(size), seed), products)
    rounding = 1e-11 * float(values.abs().max())
    assert float(found.largest.value) <= values[-1] + rounding, "from below"
    assert float(found.smallest.value) >= values[0] - rounding
    for pair in (found.largest, found.smallest):
        (vector,) = pair.vector
        assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1.0, rel=1e-9)
        residual = float(torch.linalg.vector_norm(matrix @ vector - pair.value * vector))
        assert float(pair.error) <= residual + rounding
        assert float((values - pair.value).abs().min()) <= residual + rounding
    if products >= size:
        assert ends(found) == pytest.approx((float(values[-1]), float(values[0])), abs=rounding)


@pytest.mark.parametrize(("products", "most"), [(5, 4), (8, 0), (20, 0)])
def test_the_error_covers_the_truth(products: int, most: int) -> None:
    """At 5 products a few of 200 may miss: an eigenvalue that has hardly shown is not foreseen."""
    missed, shares = 0, []
    for seed in range(200):
        values = heavy_tailed(150, seed)
        # In its eigenbasis; a random start sees no difference.
        operator = times(torch.diag(values))
        found = extreme_eigenpairs(operator, cold_start([values], seed), products).largest
        missed += float(values.max() - found.value) > float(found.error)
        shares.append(float(found.error / found.value))
    assert missed <= most
    # Honest, but not so wide that it would say nothing: the median.
    assert sorted(shares)[100] < {5: 0.1, 8: 1e-3, 20: 1e-10}[products]


def test_needed_is_the_number_of_products_that_were() -> None:
    matrix = symmetric(heavy_tailed(100, 1), 1)
    start = cold_start(ones(100), 3)
    needed = int(extreme_eigenpairs(times(matrix), start, 30).largest.needed)
    assert 3 < needed < 20
    for products, good in ((needed - 1, False), (needed, True)):
        pair = extreme_eigenpairs(times(matrix), start, products).largest
        assert (float(pair.error) <= 1e-3 * float(pair.value)) == good
        assert int(pair.needed) == needed, "one more than were made, or the last one"
    finer = extreme_eigenpairs(times(matrix), start, 30, tolerance=1e-8).largest.needed
    assert needed < int(finer) <= 30


def test_it_stops_when_the_largest_is_found() -> None:
    matrix = symmetric(heavy_tailed(100, 1), 1)
    start = cold_start(ones(100), 3)
    whole = extreme_eigenpairs(times(matrix), start, 30)
    early = extreme_eigenpairs(times(matrix), start, 30, stop=True)
    assert early.products == int(whole.largest.needed) == int(early.largest.needed)
    assert float(early.largest.error) <= 1e-3 * float(early.largest.value)


def test_it_stops_at_the_end_of_an_invariant_subspace() -> None:
    calls = []

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        calls.append(1)
        return [0.0 * vector[0]]

    extreme_eigenpairs(product, ones(50), 20, stop=True)
    assert len(calls) == 1


def test_the_vectors_stay_orthogonal() -> None:
    """In float32 a plain iteration loses orthogonality once an eigenvalue has converged."""
    values = torch.cat([torch.tensor([100.0, -50.0]), torch.linspace(-1, 1, 998)])
    found = decompose(lambda v: [values * v[0]], cold_start([values], 0), 60)
    product = found.basis @ found.basis.T
    torch.testing.assert_close(product, torch.eye(60), rtol=0, atol=1e-5)


def test_without_them_the_ends_are_the_same() -> None:
    values = torch.cat([torch.tensor([100.0, -50.0]), torch.linspace(-1, 1, 998)])
    found = extreme_eigenpairs(
        lambda v: [values * v[0]], cold_start([values], 0), 60, reorthogonalise=False
    )
    assert ends(found) == pytest.approx((100.0, -50.0), rel=1e-5)
    assert float(found.largest.error) < 1e-2
    assert found.largest.vector == ()


def test_a_million_entries_in_float32() -> None:
    """The mean of 10^6 equal entries, whose roundings would add up."""
    size = 10**6
    found = extreme_eigenpairs(
        lambda v: [torch.full_like(v[0], float(v[0].double().mean()))],
        cold_start([torch.ones(size)], 0),
        5,
    )
    assert float(found.largest.value) == pytest.approx(1.0, rel=1e-5)
    assert float(found.smallest.value) == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(
        found.largest.vector[0].abs(), torch.full((size,), 1e-3), rtol=1e-3, atol=0
    )


# --- What can go wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("stop", [False, True])
def test_what_is_not_finite_comes_out_as_nan(bad: float, at: int, stop: bool) -> None:
    matrix = symmetric(heavy_tailed(30, 0), 0)
    calls = []

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        calls.append(1)
        image = matrix @ vector[0]
        return [image * bad if len(calls) == at else image]

    found = extreme_eigenpairs(product, ones(30), 8, stop=stop)
    for pair in (found.largest, found.smallest):
        assert pair.value.isnan()
        assert pair.error.isnan()
        assert int(pair.needed) == found.products + 1
        assert pair.vector[0].isfinite().all()
    assert found.products == (at if stop else 8)


def test_an_overflow_is_not_finite() -> None:
    found = extreme_eigenpairs(lambda v: [v[0] * 1e30 * 1e15], ones(5, torch.float32), 3)
    assert found.largest.value.isnan()


@pytest.mark.parametrize("entry", [0.0, math.nan, math.inf])
def test_a_start_without_a_direction_says_nothing(entry: float) -> None:
    found = extreme_eigenpairs(lambda v: [2.0 * v[0]], [torch.full((5,), entry)], 3)
    for pair in (found.largest, found.smallest):
        assert pair.value.isnan()
        assert pair.error.isnan()
        assert not pair.vector[0].any()
        assert int(pair.needed) == 4


def test_no_number_is_read_on_the_host() -> None:
    """Fake tensors have no numbers: whatever depends on one raises."""
    with FakeTensorMode():
        matrix, start = torch.randn(30, 30), [torch.randn(10), torch.randn(4, 5)]
        found = extreme_eigenpairs(
            lambda v: unflatten(matrix @ flatten(v), start), start, 20, tolerance=1e-4
        )
    assert found.products == 20


def test_nothing_waits_for_a_gpu() -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert not any(name in func.name() for name in WAITING), func.name()
            return func(*args, **(kwargs or {}))

    matrix = symmetric(heavy_tailed(30, 0), 0)
    with Recorder():  # type: ignore[no-untyped-call]
        extreme_eigenpairs(times(matrix), ones(30), 20)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            extreme_eigenpairs(times(matrix), ones(30), 20, stop=True)


def test_nothing_else_is_touched() -> None:
    matrix = symmetric(heavy_tailed(30, 0), 0)
    start, state = ones(30), torch.get_rng_state()
    start[0].requires_grad_()
    before = start[0].detach().clone()
    cold = cold_start(start, 5)
    found = extreme_eigenpairs(lambda v: [matrix.requires_grad_() @ v[0]], start, 5)
    assert torch.equal(start[0], before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not cold[0].requires_grad
    assert not found.largest.value.requires_grad
    assert not found.largest.vector[0].requires_grad


def test_autocast_does_not_make_it_rough() -> None:
    values = heavy_tailed(300, 0).float()
    plain, cast = (
        _under_autocast(
            enabled, lambda: extreme_eigenpairs(lambda v: [values * v[0]], [torch.ones(300)], 20)
        )
        for enabled in (False, True)
    )
    assert torch.equal(plain.largest.value, cast.largest.value)
    assert torch.equal(plain.largest.vector[0], cast.largest.vector[0])


def _under_autocast(enabled: bool, run: Callable[[], Extremes]) -> Extremes:
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return run()


def test_the_parts_keep_their_types() -> None:
    """The arithmetic in between is in the widest of them, in float32 at least."""
    start = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2)]
    seen = []

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        seen.append([part.dtype for part in vector])
        return [2 * vector[0], -1 * vector[1]]

    found = extreme_eigenpairs(product, start, 4)
    assert all(types == [torch.bfloat16, torch.float32] for types in seen)
    assert [part.dtype for part in found.largest.vector] == [torch.bfloat16, torch.float32]
    assert found.largest.value.dtype == torch.float32
    assert ends(found) == pytest.approx((2.0, -1.0), rel=1e-2)


# --- Starting -------------------------------------------------------------------------------------


def test_a_cold_start_is_the_same_every_time() -> None:
    like = [
        torch.zeros(3, 4),
        torch.zeros(1000, dtype=torch.float64),
        torch.zeros((), dtype=torch.cfloat),
    ]
    one, same, other = cold_start(like, 1), cold_start(like, 1), cold_start(like, 2)
    for item, first, second, third in zip(like, one, same, other, strict=True):
        assert (first.shape, first.dtype) == (item.shape, item.dtype)
        assert torch.equal(first, second)
        assert not torch.equal(first, third)
    assert abs(float(one[1].mean())) < 0.1
    assert float(one[1].std()) == pytest.approx(1.0, abs=0.1)
    assert not torch.equal(one[1][:12], one[0].flatten().double())


def test_a_warm_start_needs_fewer_products() -> None:
    before = symmetric(heavy_tailed(200, 4), 4)
    after = before + 0.02 * symmetric(heavy_tailed(200, 5), 5)
    cold = cold_start(ones(200), 0)
    known = extreme_eigenpairs(times(before), cold, 30)
    needed = {
        name: int(extreme_eigenpairs(times(after), list(start), 30).largest.needed)
        for name, start in (("cold", cold), ("warm", known.largest.vector))
    }
    assert needed["warm"] <= needed["cold"] / 2
