"""Warnings of values that are not finite."""

import torch
from torch import nn

import gradwatch


def run(model: nn.Module, inputs: list[torch.Tensor]) -> gradwatch.Watch:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(
        model, optimizer, on_error="raise", every_n_steps=1, log_every_n_steps=1
    ) as watch:
        for batch in inputs:
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watch


def test_a_bad_batch_names_the_first_layer_it_reached() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    bad = torch.full((4, 8), float("nan"))
    watch = run(model, [torch.randn(4, 8), torch.randn(4, 8), bad])
    (found,) = watch.recommendations
    assert (found.knob, found.severity, found.scope) == ("numerics", "warning", "0")
    assert "step 2" in found.reason


def test_a_layer_in_the_middle_is_named_when_it_is_the_first() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4))
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = float("inf")
    watch = run(model, [torch.rand(4, 8)])
    assert watch.recommendations[0].scope == "2"


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


def test_a_gradient_that_is_bad_alone_is_named_as_a_gradient() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.last = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = BadGradient.apply(self.first(x))  # type: ignore[no-untyped-call]
            result: torch.Tensor = self.last(hidden)
            return result

    watch = run(Net(), [torch.randn(4, 8)])
    (found,) = watch.recommendations
    assert found.scope.startswith("first.")
    assert "gradient" in found.reason


def test_silent_while_everything_is_finite() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    assert run(model, [torch.randn(4, 8)]).recommendations == ()
