"""Random projections of gradients: exact where they can be, unbiased where they cannot."""

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gradwatch.numerics.projection import TABLE, Projection

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_small_gradients_lose_nothing() -> None:
    project = Projection(101)
    one, two = (
        {"a": normal(5, 12, seed=seed), "b": normal(40, seed=seed + 10), "c": normal(1, seed=seed)}
        for seed in (1, 2)
    )
    expected = sum(float((one[name] * two[name]).sum()) for name in one)
    assert float(project(one) @ project(two)) == pytest.approx(expected, rel=1e-5)


def test_it_is_linear_whatever_comes_first() -> None:
    project = Projection(11)
    one, two = {"a": normal(30), "b": normal(7, 7)}, {"a": normal(30, seed=1), "b": normal(7, 7)}
    both = {name: 2 * one[name] + two[name] for name in one}
    torch.testing.assert_close(project(both), 2 * project(one) + project(two))
    pieces = project({"b": one["b"]}) + project({"a": one["a"]})
    torch.testing.assert_close(project(one), pieces)


def column(rows: int, width: int) -> Tensor:
    """A gradient that lives in one column of a weight matrix, as that of a one-hot input."""
    gradient = torch.zeros(rows, width)
    gradient[:, 3] = normal(rows)
    return gradient


GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: normal(20_000),
    "one column": lambda: column(500, 1024),
    "equal and long": lambda: torch.ones(20 * TABLE + 17),
}


@pytest.mark.parametrize("kind", GRADIENTS)
def test_squares_are_unbiased_with_the_error_that_it_says(kind: str) -> None:
    gradient = GRADIENTS[kind]()
    truth = float(gradient.square().sum())
    found = []
    for seed in range(60):
        project = Projection(1024, seed=seed)
        project({"before": torch.zeros(3)})
        found.append(float(project({"weight": gradient}).square().sum()) / truth)
    values = torch.tensor(found)
    expected = math.sqrt(2 / 1021)
    # The squares of few entries in one place of the table come in coarse steps.
    assert float(values.std()) < 2 * expected
    assert abs(float(values.mean()) - 1.0) < 3 * max(expected, float(values.std())) / math.sqrt(60)


def test_products_of_orthogonal_gradients_are_nearly_zero() -> None:
    one, two = normal(50_000), normal(50_000, seed=1)
    two -= one * (one @ two) / (one @ one)
    length = float(one.norm() * two.norm())
    found = []
    for seed in range(60):
        project = Projection(1024, seed=seed)
        found.append(float(project({"a": one}) @ project({"a": two})) / length)
    values = torch.tensor(found)
    assert float(values.square().mean().sqrt()) == pytest.approx(math.sqrt(1 / 1021), rel=0.3)


@pytest.mark.parametrize(("limit", "size"), [(2, 2), (4096, 4093), (4093, 4093), (10, 7)])
def test_the_number_of_places_is_prime(limit: int, size: int) -> None:
    assert Projection(limit).size == size
    assert Projection(limit)({"a": torch.ones(5)}).shape == (size,)


def test_it_is_the_same_in_every_process() -> None:
    gradient = {"a": normal(30, 30), "b": normal(400_000)}
    assert torch.equal(Projection(101)(gradient), Projection(101)(gradient))
    assert not torch.equal(Projection(101)(gradient), Projection(101, seed=1)(gradient))


def test_it_draws_from_no_stream_of_the_training() -> None:
    before = torch.get_rng_state(), random.getstate()
    Projection()({"a": normal(10)})
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


@pytest.mark.parametrize(
    "change",
    [
        lambda item: item.to(torch.bfloat16).to(torch.float32).to(torch.bfloat16),
        lambda item: item.t().contiguous().t(),
        lambda item: item.to_sparse(),
        lambda item: item.clone().requires_grad_(),
    ],
    ids=["half", "transposed", "sparse", "with a graph"],
)
def test_every_layout_gives_the_same(change: Callable[[Tensor], Tensor]) -> None:
    project = Projection(23)
    gradient = normal(9, 8).to(torch.bfloat16).float()
    found = project({"a": change(gradient)})
    torch.testing.assert_close(found, project({"a": gradient}))
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_double_precision_is_kept() -> None:
    gradient = {"a": normal(9).double() + 1e-12}
    found = Projection()(gradient)
    assert found.dtype == torch.float64
    assert float(found @ found) == pytest.approx(float(gradient["a"] @ gradient["a"]), rel=1e-15)
