"""Norms of lists of tensors, against float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.numerics.norms import norm, norms, total_norm


def exact(tensor: torch.Tensor) -> float:
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    parts = torch.split(dense.reshape(-1), 2**22)
    squares = torch.stack([(part.abs().double() ** 2).sum() for part in parts])
    return float(squares.sum().sqrt())


TENSORS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "vector": lambda g: torch.randn(7, generator=g),
    "matrix": lambda g: torch.randn(30, 40, generator=g),
    "scalar": lambda g: torch.randn((), generator=g),
    "transposed": lambda g: torch.randn(30, 40, generator=g).T,
    "channels last": lambda g: torch.randn(4, 3, 8, 8, generator=g).to(
        memory_format=torch.channels_last
    ),
    "strided": lambda g: torch.randn(30, 40, generator=g)[::2, ::3],
    "expanded": lambda g: torch.randn(1, 40, generator=g).expand(30, 40),
    "empty": lambda g: torch.zeros(0, 5),
    "float64": lambda g: torch.randn(33, generator=g, dtype=torch.float64),
    "complex": lambda g: torch.randn(33, generator=g, dtype=torch.complex64),
    "integer": lambda g: torch.randint(9, (33,), generator=g),
    "longer than a chunk": lambda g: torch.randn(2**20 + 3, generator=g),
}


@pytest.mark.parametrize("name", TENSORS)
def test_each_kind_of_tensor(name: str) -> None:
    tensor = TENSORS[name](torch.Generator().manual_seed(0))
    assert float(norm(tensor)) == pytest.approx(exact(tensor), rel=1e-6, abs=1e-12)


def test_a_mixed_list_gives_each_its_own_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = [make(generator) for make in TENSORS.values()]
    result = norms(tensors)
    assert result.dtype == torch.float32
    assert result.tolist() == pytest.approx([exact(tensor) for tensor in tensors], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_rounds(dtype: torch.dtype) -> None:
    tensor = torch.full((100, 100), 1000.0, dtype=dtype)
    assert float(norm(tensor)) == pytest.approx(1e5, rel=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("equal", [False, True])
def test_exact_at_1e8_elements(dtype: torch.dtype, equal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.full((10**8,), 0.3) if equal else torch.randn(10**8, generator=generator)
    tensor = tensor.to(dtype)
    assert float(norm(tensor)) == pytest.approx(exact(tensor), rel=1e-5)


def test_rows_listed_twice_in_a_sparse_gradient_are_added_first() -> None:
    indices = torch.tensor([[0, 2, 0]])
    values = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    gradient = torch.sparse_coo_tensor(indices, values, (5, 2), check_invariants=True)
    assert float(norm(gradient)) == pytest.approx((4.0**2 + 2.0**2) ** 0.5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bad: float) -> None:
    values = norms([torch.tensor([1.0, bad]), torch.tensor([3.0, 4.0])])
    assert not torch.isfinite(values[0])
    assert values[1] == 5.0


def test_an_empty_list_has_no_norms() -> None:
    assert norms([]).shape == (0,)


def test_autocast_does_not_lower_the_precision() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = norm(tensor)
    assert float(value) == pytest.approx(exact(tensor), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40))
def test_the_whole_is_the_norm_of_its_parts(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    parts = norms(list(torch.split(tensor, 7)))
    assert float(total_norm(parts)) == pytest.approx(exact(tensor), rel=1e-5, abs=1e-20)
