"""Forward passes that are transformed, recorded or compiled instead of trained on."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, jvp, vmap

import gradwatch

INPUTS = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def watched(model: nn.Module, every: int = 1) -> tuple[gradwatch.Watch, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watch = gradwatch.watch(
        model, optimizer, every_n_steps=every, log_every_n_steps=every, on_error="raise"
    )
    return watch, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
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


class PartlyCompiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(16, 16)
        self.fast = torch.compile(
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), backend="aot_eager"
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fast(self.plain(values))
        return result


def whole() -> nn.Module:
    return torch.compile(net(), backend="aot_eager")  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    model = net()
    model.compile(backend="aot_eager")
    return model


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs(build: Callable[[], nn.Module], watch_it: bool) -> tuple[dict[str, int], list[float]]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = build()
    if watch_it:
        watch, optimizer = watched(model, every=2)
        with watch:
            train(model, optimizer, steps=6)
        assert watch.failures == {}
        norm = watch.summary().value("gradient_norm_used")
        assert norm is not None
        assert norm > 0
    else:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=6)
    stats = {"breaks": sum(counters["graph_break"].values()), **counters["stats"]}
    return stats, [float(weight.detach().double().sum()) for weight in model.parameters()]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("build", [PartlyCompiled, whole, compiled_in_place])
def test_compiled_parts_get_no_graph_break_and_no_recompilation(
    build: Callable[[], nn.Module],
) -> None:
    assert graphs(build, watch_it=True) == graphs(build, watch_it=False)


def test_a_compiled_model_says_that_its_activations_are_out_of_reach() -> None:
    model = whole()
    watch, optimizer = watched(model)
    with watch:
        train(model, optimizer)
    assert any("compiled model" in note for note in watch.summary().notes)
