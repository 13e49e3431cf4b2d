"""Advice on the initialisation, from networks that are sick and networks that are not."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.records import Recommendation

Build = Callable[[], nn.Module]


def mlp(
    widths: list[int], activation: Callable[[], nn.Module] = nn.ReLU, inputs: int = 64
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), activation()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 10))


def initialised(
    model: nn.Module, init: Callable[[torch.Tensor], object], bias: bool = False
) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init(module.weight)
            if not bias and module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def he(weight: torch.Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def he_fan_out(weight: torch.Tensor) -> None:
    nn.init.kaiming_normal_(weight, nonlinearity="relu", mode="fan_out")


def scaled_he(factor: float) -> Callable[[torch.Tensor], None]:
    def init(weight: torch.Tensor) -> None:
        he(weight)
        with torch.no_grad():
            weight.mul_(factor)

    return init


def orthogonal(weight: torch.Tensor) -> None:
    nn.init.orthogonal_(weight, 2**0.5)


def convolutions(norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1)]
        layers += [nn.BatchNorm2d(outputs)] if norm else []
        layers += [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def transformer() -> nn.Sequential:
    block = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Unflatten(1, (1, 64)), encoder, nn.Flatten(), nn.Linear(64, 10))


def dropout_mlp() -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (64, 256, 256, 256, 256):
        layers += [nn.Linear(inputs, 256), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(*layers, nn.Linear(256, 10))


HEALTHY: dict[str, Build] = {
    "He, deep and wide": lambda: initialised(mlp([256] * 10), he),
    "He, default biases": lambda: initialised(mlp([256] * 10), he, bias=True),
    "He, fan-in, widths vary": lambda: initialised(mlp([512, 128, 1024, 256]), he),
    "He, fan-out, widths vary": lambda: initialised(mlp([512, 128, 1024, 256]), he_fan_out),
    "He, uniform": lambda: initialised(mlp([256] * 8), nn.init.kaiming_uniform_),
    "orthogonal": lambda: initialised(mlp([256] * 8), orthogonal),
    "He, with dropout": lambda: initialised(dropout_mlp(), he),
    "He, GELU": lambda: initialised(mlp([256] * 5, nn.GELU), he),
    "Xavier, tanh": lambda: initialised(mlp([256] * 5, nn.Tanh), nn.init.xavier_normal_),
    "default, SELU, which theory has no law for": lambda: mlp([256] * 6, nn.SELU),
    "He, convolutions": lambda: initialised(convolutions(), he),
    "default, batch norm": lambda: convolutions(norm=True),
    "default, transformer": transformer,
    "default, one hidden layer": lambda: mlp([128]),
}


def advice(build: Build, seed: int = 0, inputs: torch.Tensor | None = None) -> list[Recommendation]:
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if inputs is None:
        first = next(module for module in model.modules() if not list(module.children()))
        images = isinstance(first, nn.Conv2d)
        inputs = torch.randn(32, 3, 8, 8) if images else torch.randn(64, 64)
    with gradwatch.watch(model, optimizer, on_error="raise") as watch:
        labels = torch.randint(10, (len(inputs),))
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return list(watch.recommendations)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", HEALTHY)
def test_silent_on(name: str, seed: int) -> None:
    assert advice(HEALTHY[name], seed) == []


@pytest.mark.parametrize("bias", [True, False])
def test_a_default_initialised_deep_relu_net_is_told_its_gain(bias: bool) -> None:
    def build() -> nn.Module:
        model = mlp([256] * 8)
        if not bias:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.register_parameter("bias", None)
        return model

    (found,) = advice(build)
    assert (found.knob, found.severity, found.unit) == ("init", "warning", "gain")
    assert found.scope == "0 to 14 (8 layers)"
    assert found.current == pytest.approx(3**-0.5, rel=0.02)
    # sqrt(6) times the default, that is He's sqrt(2)
    assert found.proposed == pytest.approx(2**0.5, rel=0.05)
    for verdict in found.evidence:
        assert verdict.measurement.value == pytest.approx(1 / 6, rel=0.3)
        assert verdict.status == "violated"
    assert found.targets == tuple(str(2 * index) for index in range(8))
    assert tuple(verdict.measurement.scope for verdict in found.evidence) == found.targets


@pytest.mark.parametrize("linears", [2, 3])
@pytest.mark.parametrize("width", [64, 128, 512])
@pytest.mark.parametrize("seed", range(3))
def test_the_shallow_default_net_that_everybody_trains_raises_no_alarm(
    linears: int, width: int, seed: int
) -> None:
    found = advice(lambda: mlp([width] * (linears - 1)), seed)
    assert {item.severity for item in found} <= {"info"}


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_the_proposed_gain_undoes_the_wrong_one(factor: float) -> None:
    (found,) = advice(lambda: initialised(mlp([256] * 8), scaled_he(factor)))
    assert found.current is not None
    assert found.proposed == pytest.approx(found.current / factor, rel=0.05)
    assert found.direction == ("up" if factor < 1 else "down")


def test_one_wrong_layer_is_named_alone() -> None:
    def build() -> nn.Module:
        model = initialised(mlp([256] * 6), he)
        with torch.no_grad():
            model.get_parameter("4.weight").mul_(0.1)
        return model

    (found,) = advice(build)
    assert found.scope == "4"
    assert found.current == pytest.approx(0.1 * 2**0.5, rel=0.02)
    assert found.proposed == pytest.approx(2**0.5, rel=0.15)


def test_two_layers_wrong_in_opposite_ways_get_a_recommendation_each() -> None:
    def build() -> nn.Module:
        model = initialised(mlp([256] * 6), he)
        with torch.no_grad():
            model.get_parameter("2.weight").mul_(0.1)
            model.get_parameter("6.weight").mul_(10)
        return model

    assert sorted((item.scope, item.direction) for item in advice(build)) == [
        ("2", "up"),
        ("6", "down"),
    ]


@pytest.mark.parametrize(
    ("layers", "severity"), [(2, "info"), (3, "advice"), (4, "advice"), (8, "warning")]
)
def test_the_severity_follows_what_is_left_of_the_norm(layers: int, severity: str) -> None:
    # the norm shrinks by 0.408 a layer: 0.17, 0.068, 0.028, 0.0008
    (found,) = advice(lambda: mlp([512] * layers))
    assert found.severity == severity


def test_silent_on_trained_weights() -> None:
    def build() -> nn.Module:
        model = mlp([256] * 8)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        inputs = torch.randn(256, 64)
        for _ in range(60):
            loss = nn.functional.cross_entropy(model(inputs), inputs[:, :10].argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model

    assert [item for item in advice(build) if item.severity != "info"] == []


def test_silent_where_training_has_begun_without_the_watch() -> None:
    torch.manual_seed(0)
    model = mlp([256] * 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    watch = None
    for step in range(3):
        if step == 1:
            watch = gradwatch.watch(model, optimizer, on_error="raise")
        model(torch.randn(8, 64)).square().mean().backward()
        optimizer.step()
    assert watch is not None
    watch.close()
    assert watch.recommendations == ()
    verdicts = watch.summary().verdicts
    assert {v.status for v in verdicts if v.bound == "NormPreservation"} == {"undecided"}


def test_silent_on_zero_initialised_branches_and_heads() -> None:
    class LowRank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(64, 64)
            self.down = nn.Linear(64, 16, bias=False)
            self.up = nn.Linear(16, 64, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.base(x) + self.up(self.down(x))
            return result

    assert advice(lambda: nn.Sequential(LowRank(), nn.ReLU(), LowRank(), nn.Linear(64, 10))) == []


def test_silent_on_one_hot_inputs() -> None:
    inputs = torch.eye(64)
    assert advice(lambda: mlp([256] * 8), inputs=inputs) == []


def test_silent_when_a_single_layer_of_the_chain_is_pretrained() -> None:
    def build() -> nn.Module:
        model = mlp([256] * 6)
        with torch.no_grad():  # a low-rank weight that the signal is aligned with
            left, right = torch.randn(256, 2), torch.randn(2, 256)
            model.get_parameter("6.weight").copy_(left @ right)
        return model

    assert [item for item in advice(build) if item.knob == "init"] == []


def test_the_advice_stands_for_the_whole_run() -> None:
    torch.manual_seed(0)
    model = mlp([256] * 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    memory = gradwatch.MemorySink()
    with gradwatch.watch(
        model, optimizer, sinks=[memory], every_n_steps=1, log_every_n_steps=2
    ) as watch:
        for _ in range(7):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [item.knob for item in watch.recommendations] == ["init"]
    assert watch.recommendations[0].since_step == 0
    assert len({report.recommendations for report in memory.reports}) == 1
