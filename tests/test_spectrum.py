"""`gradwatch.spectral_density` against whole Hessians."""

import copy
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gradwatch
from gradwatch.capture.forward.gate import tensors_in
from gradwatch.numerics.flat import flatten, unflatten
from gradwatch.numerics.hvp import Hessian

Batch = tuple[Tensor, Tensor]


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture(name="network")
def trained_network() -> tuple[nn.Module, Batch]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = (torch.randn(40, 6), torch.randint(3, (40,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(30):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return model, batch


def exact(model: nn.Module, batch: Batch) -> Tensor:
    point = list(model.parameters())
    hessian = Hessian(loss_fn(model, batch), point)
    size = sum(item.numel() for item in point)
    rows = [flatten(hessian(unflatten(unit, point))) for unit in torch.eye(size)]
    values: Tensor = torch.linalg.eigvalsh(torch.stack(rows).double())
    return values


def test_ends_moments_and_trace(network: tuple[nn.Module, Batch]) -> None:
    values = exact(*network)
    found = gradwatch.spectral_density(*network[:1], loss_fn, network[1], products=20, samples=60)
    assert found.parameters == len(values) == 83
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-3)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-2)
    assert 0 < found.largest_error < 1e-3 * found.largest
    assert math.fsum(found.weights) == pytest.approx(1.0, rel=1e-12)
    assert list(found.eigenvalues) == sorted(found.eigenvalues)
    assert found.trace == pytest.approx(float(values.sum()), abs=3 * found.trace_error)
    assert found.trace_error < 0.15 * float(values.sum())
    second = np.dot(found.weights, np.square(found.eigenvalues))
    assert second == pytest.approx(float(values.square().mean()), rel=0.2)
    near = 0.1 * found.largest
    assert found.share(near, math.inf) == pytest.approx(
        float((values >= near).double().mean()), abs=0.03
    )
    assert found.share(-math.inf, math.inf) == pytest.approx(1.0)


def test_the_density_is_a_law_where_the_eigenvalues_are(network: tuple[nn.Module, Batch]) -> None:
    found = gradwatch.spectral_density(*network[:1], loss_fn, network[1], samples=2)
    grid = np.linspace(found.smallest - 1, found.largest + 1, 4001)
    curve = found.density(grid, 0.05)
    assert curve.shape == grid.shape
    step = grid[1] - grid[0]
    assert curve.sum() * step == pytest.approx(1.0, rel=1e-6)
    assert (curve * grid).sum() * step * 83 == pytest.approx(found.trace, rel=1e-6)
    assert abs(grid[curve.argmax()]) < 0.1, "most directions are flat"
    with pytest.raises(gradwatch.ConfigError, match="width"):
        found.density(grid, 0.0)


def test_a_normal_law_around_a_single_node() -> None:
    """One parameter with the curvature 2: the density is that of the normal law."""
    model = nn.Linear(1, 1, bias=False)
    found = gradwatch.spectral_density(
        model, lambda model, batch: model(batch).square().sum(), torch.ones(1, 1)
    )
    assert found.eigenvalues == pytest.approx((2.0,) * 4)
    expected = math.exp(-0.5) / (0.5 * math.sqrt(2 * math.pi))
    assert found.density([2.5], 0.5)[0] == pytest.approx(expected, rel=1e-5)


def test_it_prints_as_a_table(network: tuple[nn.Module, Batch]) -> None:
    printed = str(gradwatch.spectral_density(*network[:1], loss_fn, network[1]))
    for text in (
        "parameters               83",
        "largest eigenvalue",
        "trace",
        " ± ",
        "share above",
    ):
        assert text in printed
    assert len(printed.splitlines()) == 8
    single = gradwatch.spectral_density(*network[:1], loss_fn, network[1], samples=1)
    assert "nan" not in str(single)
    assert math.isnan(single.trace_error)


def test_nothing_is_disturbed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    batch = (torch.randn(20, 6), torch.randint(3, (20,)))
    loss_fn(model, batch).backward()

    def everything() -> list[Any]:
        gradients = [item.grad for item in model.parameters()]
        state = copy.deepcopy([*model.state_dict().values(), *gradients, *tensors_in(batch)])
        return [state, torch.get_rng_state()]

    def streams() -> str:
        return f"{random.getstate()} {np.random.get_state()}"

    before, drawn = everything(), streams()
    one, other = (
        gradwatch.spectral_density(model, loss_fn, batch, products=5, samples=2) for _ in range(2)
    )
    torch.testing.assert_close(everything(), before, rtol=0, atol=0)
    assert streams() == drawn
    assert one == other, "the same every time, the dropout masks included"
    assert one != gradwatch.spectral_density(model, loss_fn, batch, products=5, samples=2, seed=1)
    assert model.training
    evaluated = gradwatch.spectral_density(model.eval(), loss_fn, batch, products=5, samples=2)
    assert evaluated.largest != one.largest, "in the mode that the model is in"


def test_frozen_parameters_are_no_directions(network: tuple[nn.Module, Batch]) -> None:
    model, batch = network
    next(model.parameters()).requires_grad_(False)
    found = gradwatch.spectral_density(model, loss_fn, batch, products=5)
    assert found.parameters == 83 - 48


def test_no_more_products_than_parameters() -> None:
    model = nn.Linear(2, 1, bias=False)
    found = gradwatch.spectral_density(
        model,
        lambda model, batch: model(batch).square().sum() / 2,
        torch.tensor([[1.0, 0.0], [0.0, 3.0]]),
        samples=3,
    )
    assert found.eigenvalues == pytest.approx((1.0,) * 3 + (9.0,) * 3, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "net"}, "model must be a torch.nn.Module, got a str"),
        ({"model": nn.ReLU()}, "has no parameters to train"),
        ({"loss_fn": None}, "loss_fn must be a function"),
        ({"loss_fn": nn.MSELoss()}, "loss_fn must be a function"),
        ({"products": 0}, "products must be a whole number of at least 1, got 0"),
        ({"samples": 2.0}, "samples must be a whole number"),
        ({"samples": True}, "samples must be a whole number"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"loss_fn": lambda model, batch: model(batch)}, "the loss must be a scalar tensor"),
        ({"loss_fn": lambda model, batch: batch.sum()}, "does not depend on the parameters"),
        (
            {"loss_fn": lambda model, batch: (model(batch) * math.nan).square().sum()},
            "the Hessian must be finite",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "model": nn.Linear(2, 3),
        "loss_fn": lambda model, batch: model(batch).square().sum(),
        "batch": torch.ones(4, 2),
    }
    with pytest.raises(gradwatch.ConfigError, match=message):
        gradwatch.spectral_density(**{**given, **changes})
