"""Forward passes that are transformed or recorded instead of trained on."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import gradwatch

INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def watched(model: nn.Module) -> tuple[gradwatch.Watch, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = gradwatch.watch(
        model, optimizer, every_n_steps=1, log_every_n_steps=1, on_error="raise"
    )
    return watch, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(INPUTS).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def per_example_gradients(model: nn.Module) -> None:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor], example: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = functional_call(model, weights, (example[None],))
        return output.square().mean()

    vmap(grad(loss), (None, 0))(weights, INPUTS)


def forward_derivative(model: nn.Module) -> None:
    jvp(model, (INPUTS,), (torch.ones_like(INPUTS),))


def recorded(model: nn.Module) -> None:
    torch.jit.trace(model, INPUTS)


def exported(model: nn.Module) -> None:
    torch.export.export(model, (INPUTS,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    "use", [per_example_gradients, forward_derivative, recorded, exported], ids=lambda f: f.__name__
)
def test_another_use_of_the_model_leaves_the_measurements_alone(
    use: Callable[[nn.Module], None],
) -> None:
    alone, disturbed = net(), net()
    first, optimizer = watched(alone)
    with first:
        train(alone, optimizer)
    second, optimizer = watched(disturbed)
    with second:
        use(disturbed)
        train(disturbed, optimizer)
    assert second.failures == {}
    assert second.summary().measurements == first.summary().measurements
    assert second.summary().info == first.summary().info
