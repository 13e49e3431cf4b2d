"""The estimators of gradient noise: closed forms, and gradients of single examples as the truth."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from gradwatch.numerics.noise import (
    inner_product,
    mean_squared_norm,
    split_by_halves,
    split_by_moments,
    split_by_parts,
    squared_distance,
    top_second_moment,
)

DRAWS = 3000


@dataclass(frozen=True)
class Population:
    """Gradients of single examples, to draw batches from with replacement."""

    gradients: Tensor

    @property
    def square(self) -> float:
        return float(self.gradients.mean(0).square().sum())

    @property
    def variance(self) -> float:
        return float((self.gradients - self.gradients.mean(0)).square().sum(1).mean())

    def batch_means(self, size: int, generator: torch.Generator) -> Tensor:
        count = len(self.gradients)
        return self.gradients[torch.randint(count, (DRAWS, size), generator=generator)].mean(1)


@pytest.fixture(scope="module")
def population() -> Population:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs = torch.randn(40, 4).double() + 0.3
    targets = (inputs[:, 0] > 1.0).long()  # one class is rare, so that the gradient is not small
    named = {name: item.detach() for name, item in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(output, y[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))(named, inputs, targets)
    return Population(torch.cat([part.flatten(1) for part in each.values()], 1))


def agrees(values: Tensor, truth: float) -> bool:
    """Within three standard errors of the truth, which are not too wide to tell anything."""
    error = float(values.std()) / len(values) ** 0.5
    return bool(abs(float(values.mean()) - truth) < 3 * error < 0.15 * abs(truth))


def norms(gradients: Tensor) -> Tensor:
    return gradients.square().sum(-1)


@pytest.mark.parametrize("sizes", [(4, 4), (4, 4, 4, 4), (8, 2), (6, 3, 1)])
def test_parts_of_any_sizes_give_gradient_and_noise(
    population: Population, sizes: tuple[int, ...]
) -> None:
    generator, whole = torch.Generator().manual_seed(1), sum(sizes)
    shares = [size / whole for size in sizes]
    parts = [
        share * population.batch_means(size, generator)
        for size, share in zip(sizes, shares, strict=True)
    ]
    total, squares = norms(torch.stack(parts).sum(0)), norms(torch.stack(parts)).sum(0)
    square, noise = split_by_parts(total, squares, sum(share**2 for share in shares))
    assert agrees(square, population.square)
    assert agrees(noise * whole, population.variance)
    # The norm of the batch gradient is not it.
    assert float(total.mean()) > population.square + 0.5 * population.variance / whole


def test_parts_of_equal_size_are_the_u_statistic() -> None:
    parts = torch.tensor([[1.0, 0, 2], [0, 1, 1], [1, 1, 0], [2, 0, 1]], dtype=torch.float64) / 4
    square, noise = split_by_parts(norms(parts.sum(0)), norms(parts).sum(), 1 / 4)
    assert float(square) == pytest.approx(1.83333333333333, rel=1e-9)
    assert float(noise) * 4 * 8 == pytest.approx(13.3333333333333, rel=1e-9)  # b = 8


def test_halves_give_gradient_and_noise(population: Population) -> None:
    generator = torch.Generator().manual_seed(2)
    first, second = (population.batch_means(8, generator) for _ in range(2))
    pairs = [
        split_by_halves([one[:7], one[7:]], [two[:7], two[7:]], 8)
        for one, two in zip(first, second, strict=True)
    ]
    squares, variances = (torch.stack(column) for column in zip(*pairs, strict=True))
    assert agrees(squares, population.square)
    assert agrees(variances, population.variance)


def test_the_state_of_adam_gives_gradient_and_noise(population: Population) -> None:
    """With bias correction from the very first steps on, for gradients of one law."""
    generator = torch.Generator().manual_seed(3)
    beta1, beta2, size, steps = 0.9, 0.99, 8, 30
    first = torch.zeros(DRAWS, population.gradients.shape[1], dtype=torch.float64)
    second = torch.zeros_like(first)
    for _ in range(steps):
        gradient = population.batch_means(size, generator)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient.square()
    first, second = first / (1 - beta1**steps), second / (1 - beta2**steps)
    shrink = (1 - beta1) * (1 + beta1**steps) / ((1 + beta1) * (1 - beta1**steps))
    square, noise = split_by_moments(norms(first), second.sum(1), shrink)
    assert agrees(square, population.square)
    assert agrees(noise * size, population.variance)


def test_the_state_of_adam_after_many_steps() -> None:
    shrink = (1 - 0.9) / (1 + 0.9)
    square, noise = split_by_moments(torch.tensor(1.0).double(), torch.tensor(3.0).double(), shrink)
    assert 32 * float(noise) == pytest.approx(67.55555555555556, rel=1e-9)
    assert float(square) == pytest.approx(0.8888888888888888, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_products_and_distances_of_long_tensors_keep_their_digits(dtype: torch.dtype) -> None:
    one, two = torch.full((300_001,), 0.5, dtype=dtype), torch.full((300_001,), 0.25, dtype=dtype)
    rest = torch.ones(2, 3, dtype=dtype)
    product = inner_product([one, rest], [two, 2 * rest])
    assert float(product) == pytest.approx(300_001 / 8 + 12, rel=1e-6)
    distance = squared_distance([one, rest], [two, 2 * rest])
    assert float(distance) == pytest.approx(300_001 / 16 + 6, rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [lambda item: item.to_sparse(), lambda item: item.T.contiguous().T],
    ids=["sparse", "strides"],
)
def test_entries_meet_their_partners_in_any_layout(change: Callable[[Tensor], Tensor]) -> None:
    one, two = torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)
    assert float(inner_product([change(one)], [two])) == float((one * two).sum())
    assert float(squared_distance([change(one)], [two])) == 6 * 36.0


def test_complex_entries_count_as_two_real_ones() -> None:
    one, two = torch.tensor([1.0 + 2.0j]), torch.tensor([3.0 - 1.0j])
    assert float(inner_product([one], [two])) == 1.0
    assert float(squared_distance([one], [two])) == 13.0


def test_no_tensors_have_no_product() -> None:
    assert float(inner_product([], [])) == 0.0


def test_the_squared_mean_of_rows_is_unbiased() -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(DRAWS, 6, 5, generator=generator, dtype=torch.float64) + 0.5
    values = torch.stack([mean_squared_norm(item) for item in rows])
    assert agrees(values, 5 * 0.25)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_the_top_eigenvalue_of_the_second_moment(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(*shape, generator=generator, dtype=torch.float64) + 1.0
    expected = float(torch.linalg.eigvalsh(rows.T @ rows / shape[0])[-1])
    assert float(top_second_moment(rows)) == pytest.approx(expected, rel=1e-6)


def test_rows_that_are_centred_exactly_or_zero_have_a_top_eigenvalue_too() -> None:
    generator = torch.Generator().manual_seed(6)
    half = torch.randn(15, 4, generator=generator, dtype=torch.float64)
    rows = torch.stack([half, -half], 1).flatten(0, 1)
    assert not rows.sum(0).any()
    expected = float(torch.linalg.eigvalsh(rows.T @ rows / 30)[-1])
    assert float(top_second_moment(rows)) == pytest.approx(expected, rel=1e-3)
    assert float(top_second_moment(torch.zeros(3, 4))) == 0.0


def test_power_iteration_is_exact_under_autocast() -> None:
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(20, 5, generator=generator)
    expected = float(top_second_moment(rows))
    with torch.autocast("cpu", torch.bfloat16):
        assert float(top_second_moment(rows)) == expected
