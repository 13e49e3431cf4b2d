"""What the first training forward shows of a model: chains, residual blocks, facts, gains.

The references are computed here in float64 from the weights and the inputs alone.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import gradwatch

pytestmark = pytest.mark.usefixtures("one_thread")

Function = Callable[[Tensor], Tensor]
Layer = nn.Linear | nn.Conv2d


def watch_one_step(
    model: nn.Module, *inputs: Tensor, steps: int = 1
) -> tuple[gradwatch.ModelInfo, gradwatch.Report]:
    told = gradwatch.MemorySink()
    optimizer = SGD(model.parameters(), lr=1e-3)
    with gradwatch.watch(
        model, optimizer, sinks=[told], every_n_steps=1, log_every_n_steps=1, on_error="raise"
    ) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            model(*inputs).square().mean().backward()
            optimizer.step()
    return watch.model_info, told.reports[0]


@dataclass(frozen=True)
class Link:
    """A layer of a chain, with what stands between it and the next one."""

    name: str
    activation: str = "relu"
    dropout: float = 0.0
    slope: float = 0.0


def chains(info: gradwatch.ModelInfo) -> list[list[Link]]:
    return [
        [
            Link(layer.name, layer.activation or "", layer.dropout, layer.negative_slope)
            for layer in chain
        ]
        for chain in info.chains
    ]


class Applied(nn.Module):
    """A function as a module of its own, without being one of torch's activations."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Tensor:
        return self.function(values)


def between(*parts: nn.Module | Function) -> nn.Sequential:
    """Three layers, with the same things between the first two and the last two."""
    torch.manual_seed(0)
    inner = [part if isinstance(part, nn.Module) else Applied(part) for part in parts]
    model = nn.Sequential(nn.Linear(6, 16), *inner)
    model.append(nn.Linear(16, 16))
    for part in inner:
        model.append(part)
    return model.append(nn.Linear(16, 2))


def linear(model: nn.Sequential, place: int) -> nn.Linear:
    layer = model[place]
    assert isinstance(layer, nn.Linear)
    return layer


def expected_chain(count: int, activation: str, **more: float) -> list[list[Link]]:
    return [[Link("0", activation, **more), Link(str(count + 1), activation, **more)]]


# --- What stands between two layers ------------------------------------------------------------

ACTIVATIONS: dict[str, tuple[nn.Module | Function, str, float]] = {
    "nothing": (nn.Identity(), "identity", 0.0),
    "ReLU": (nn.ReLU(), "relu", 0.0),
    "ReLU in place": (nn.ReLU(inplace=True), "relu", 0.0),
    "relu": (functional.relu, "relu", 0.0),
    "relu_": (torch.relu_, "relu", 0.0),
    "method": (lambda x: x.relu(), "relu", 0.0),
    "LeakyReLU": (nn.LeakyReLU(0.2), "leaky_relu", 0.2),
    "LeakyReLU in place": (nn.LeakyReLU(0.05, inplace=True), "leaky_relu", 0.05),
    "leaky_relu": (lambda x: functional.leaky_relu(x, 0.3), "leaky_relu", 0.3),
    "GELU": (nn.GELU(), "gelu", 0.0),
    "GELU tanh": (nn.GELU(approximate="tanh"), "gelu_tanh", 0.0),
    "gelu": (functional.gelu, "gelu", 0.0),
    "SiLU": (nn.SiLU(), "silu", 0.0),
    "silu in place": (lambda x: functional.silu(x, inplace=True), "silu", 0.0),
    "Tanh": (nn.Tanh(), "tanh", 0.0),
    "tanh": (torch.tanh, "tanh", 0.0),
    "ELU": (nn.ELU(), "elu", 0.0),
    "ELU in place": (nn.ELU(inplace=True), "elu", 0.0),
}


@pytest.mark.parametrize(
    ("part", "activation", "slope"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys()
)
def test_activations_are_recognised_as_modules_and_as_functions(
    part: nn.Module | Function, activation: str, slope: float
) -> None:
    info, _ = watch_one_step(between(part), torch.randn(8, 6))
    assert chains(info) == expected_chain(1, activation, slope=slope)
    assert [layer.position for layer in info.layers] == [0, 1, 0]
    assert info.layers[-1].activation is None


SHAPES: dict[str, tuple[list[nn.Module | Function], float]] = {
    "dropout behind": ([nn.ReLU(), nn.Dropout(0.25)], 0.25),
    "dropout before": ([nn.Dropout(0.25), nn.ReLU()], 0.25),
    "dropout of nothing": ([nn.ReLU(), nn.Dropout(0.0)], 0.0),
    "dropout that is off": ([nn.ReLU(), nn.Dropout(0.3).eval()], 0.0),
    "view": ([lambda x: x.view(2, -1, 16), nn.ReLU(), lambda x: x.reshape(-1, 16)], 0.0),
    "flatten": ([nn.Unflatten(1, (4, 4)), nn.ReLU(), nn.Flatten()], 0.0),
    "transposed twice": ([lambda x: x.t(), nn.ReLU(), lambda x: x.t().contiguous()], 0.0),
    "permuted": ([lambda x: x[None].permute(1, 0, 2), nn.ReLU(), lambda x: x.squeeze(1)], 0.0),
    "cloned": ([lambda x: x.clone(), nn.ReLU(), nn.Identity()], 0.0),
}


@pytest.mark.parametrize(("parts", "dropout"), SHAPES.values(), ids=SHAPES.keys())
def test_reshaping_and_dropout_do_not_break_a_chain(
    parts: list[nn.Module | Function], dropout: float
) -> None:
    info, _ = watch_one_step(between(*parts), torch.randn(8, 6))
    assert chains(info) == expected_chain(len(parts), "relu", dropout=dropout)


def test_dropout_in_place_is_right_or_not_there() -> None:
    info, _ = watch_one_step(between(nn.Dropout(0.5, inplace=True), nn.ReLU()), torch.randn(8, 6))
    assert chains(info) in ([], expected_chain(2, "relu", dropout=0.5))


BREAKS: dict[str, list[nn.Module | Function]] = {
    "two activations": [nn.ReLU(), nn.Tanh()],
    "batch norm": [nn.BatchNorm1d(16), nn.ReLU()],
    "layer norm": [nn.ReLU(), nn.LayerNorm(16)],
    "sigmoid": [nn.Sigmoid()],
    "softmax": [nn.Softmax(-1)],
    "a factor": [lambda x: 2 * x, nn.ReLU()],
    "a sum": [nn.ReLU(), lambda x: x + 1],
    "a power": [lambda x: x.square()],
    "another ELU": [nn.ELU(alpha=0.5)],
    "pooling": [nn.ReLU(), lambda x: functional.avg_pool1d(x, 3, 1, 1)],
    "noise": [nn.ReLU(), lambda x: x + torch.randn_like(x)],
    "functional dropout": [nn.ReLU(), lambda x: functional.dropout(x, 0.3)],
    "detached": [nn.ReLU(), lambda x: x.detach()],
    "clamped": [lambda x: x.clamp(min=0)],
    "a part": [nn.ReLU(), lambda x: torch.cat([x[:, :8], x[:, :8]], 1)],
    "alpha dropout": [nn.SELU()],
}


@pytest.mark.parametrize("parts", BREAKS.values(), ids=BREAKS.keys())
def test_what_theory_has_no_law_for_breaks_the_chain(parts: list[nn.Module | Function]) -> None:
    info, report = watch_one_step(between(*parts), torch.randn(8, 6))
    assert chains(info) == []
    assert {item.metric for item in report.measurements} >= {"activation_norm"}
    assert "activation_gain" not in {item.metric for item in report.measurements}


# --- Networks that are no chains ---------------------------------------------------------------


class Block(nn.Module):
    """A residual block: its input plus a branch, with an optional norm and activation."""

    def __init__(self, width: int = 8, where: str = "pre", scale: float | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 16)
        self.second = nn.Linear(16, width)
        self.where = where

    def forward(self, values: Tensor) -> Tensor:
        branch: Tensor = self.norm(values) if self.where == "pre" else values
        branch = self.second(torch.relu(self.first(branch)))
        if self.where == "in place":
            branch += values
            return branch
        whole = values + branch
        last: dict[str, Function] = {"post": self.norm, "activated": torch.relu}
        output: Tensor = last.get(self.where, nn.Identity())(whole)
        return output


@pytest.mark.parametrize("where", ["pre", "post", "activated", "in place", "plain"])
def test_residual_blocks_are_found(where: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Block(where=where), Block(where=where), nn.Linear(8, 2))
    info, _ = watch_one_step(model, torch.randn(8, 6))
    assert info.residual_blocks == ("1", "2")
    ends = [chain[-1] for chain in chains(info)]
    assert {Link("1.first"), Link("2.first")} <= set(ends)
    inner = [link.name for chain in chains(info) for link in chain]
    assert not {"1.second", "2.second"} & set(inner)  # nothing is chained across the sum


def test_a_block_without_a_sum_is_no_residual_block() -> None:
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2)
    )
    assert watch_one_step(model, torch.randn(8, 6))[0].residual_blocks == ()


def test_only_the_innermost_residual_block_counts() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, values: Tensor) -> Tensor:
            output: Tensor = self.inner(values)
            return output

    model = nn.Sequential(nn.Linear(6, 8), Wrapper(), nn.Linear(8, 2))
    assert watch_one_step(model, torch.randn(8, 6))[0].residual_blocks == ("1.inner",)


class Fork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.trunk = nn.Linear(8, 8)
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)
        self.far_left = nn.Linear(8, 4)
        self.far_right = nn.Linear(8, 4)

    def forward(self, values: Tensor) -> Tensor:
        trunk = torch.relu(self.trunk(torch.relu(self.stem(values))))
        left, right = torch.relu(self.left(trunk)), torch.tanh(self.right(trunk))
        output: Tensor = self.far_left(left) + self.far_right(right)
        return output


def test_a_fork_begins_new_chains() -> None:
    torch.manual_seed(0)
    info, _ = watch_one_step(Fork(), torch.randn(8, 6))
    assert chains(info) == [
        [Link("stem"), Link("trunk")],
        [Link("left")],
        [Link("right", "tanh")],
    ]


def test_a_layer_that_feeds_others_in_different_ways_is_in_no_chain() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 8)
            self.left = nn.Linear(8, 4)
            self.right = nn.Linear(8, 4)

        def forward(self, values: Tensor) -> Tensor:
            stem = self.stem(values)
            output: Tensor = self.left(torch.relu(stem)) + self.right(torch.tanh(stem))
            return output

    assert chains(watch_one_step(Both(), torch.randn(8, 6))[0]) == []


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.again = nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, values: Tensor) -> Tensor:
        hidden = torch.relu(self.first(values))
        for _ in range(3):
            hidden = torch.relu(self.again(hidden))
        output: Tensor = self.last(hidden)
        return output


def test_a_layer_that_runs_several_times_is_in_no_chain() -> None:
    torch.manual_seed(0)
    info, report = watch_one_step(Shared(), torch.randn(8, 6))
    assert chains(info) == []
    assert report.value("activation_norm", "again") is not None


def test_the_order_of_execution_counts_and_not_that_of_definition() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 2)
            self.middle = nn.Linear(8, 8)
            self.first = nn.Linear(6, 8)

        def forward(self, values: Tensor) -> Tensor:
            hidden = torch.relu(self.middle(torch.tanh(self.first(values))))
            output: Tensor = self.last(hidden)
            return output

    info, report = watch_one_step(Backwards(), torch.randn(8, 6))
    assert chains(info) == [[Link("first", "tanh"), Link("middle", "relu")]]
    norms = [item.scope for item in report.measurements if item.metric == "activation_norm"]
    assert norms == ["first", "middle", "last"]


@pytest.mark.parametrize("frozen", [["0"], ["2"], ["0", "2"], ["0.bias", "2.bias"]])
def test_frozen_layers_are_named_and_do_no_harm(frozen: list[str]) -> None:
    model = between(nn.ReLU())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(frozen)))
    info, _ = watch_one_step(model, torch.randn(8, 6))
    assert set(info.frozen) == {
        name for name, item in model.named_parameters() if not item.requires_grad
    }
    linked = [link.name for chain in chains(info) for link in chain]
    # What no gradient flows through has no graph, so nothing is known of it.
    assert linked == {"0": ["2"], "2": ["0", "2"], "0.bias": ["0", "2"]}.get(frozen[0], []) or (
        frozen == ["0", "2"] and linked == []
    )


def test_a_transformer_block() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True),
        nn.Linear(8, 2),
    )
    info, _ = watch_one_step(model, torch.randn(4, 5, 6))
    assert [Link("1.linear1", "relu", dropout=0.1)] in chains(info)
    assert info.normalisations == ("1.norm1", "1.norm2")
    assert [item.probability for item in info.dropouts] == pytest.approx([0.1] * 3)
    assert not any("out_proj" in link.name for chain in chains(info) for link in chain)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant: bool) -> None:
    """Repeated forwards do not count as runs of a layer."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.last = nn.Linear(8, 2)

        def forward(self, values: Tensor) -> Tensor:
            hidden = torch.relu(self.first(values))
            output: Tensor = self.last(checkpoint(self.block, hidden, use_reentrant=reentrant))
            return output

    info, report = watch_one_step(Checkpointed(), torch.randn(8, 6))
    norms = [item.scope for item in report.measurements if item.metric == "activation_norm"]
    assert norms == ["first", "block.0", "block.2", "last"]
    if not reentrant:
        assert chains(info) == [[Link("first"), Link("block.0"), Link("block.2")]]


def test_parametrised_layers_are_layers_and_their_parts_are_not() -> None:
    parametrised = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), parametrised, nn.ReLU(), nn.Linear(16, 2))
    info, report = watch_one_step(model, torch.randn(8, 6))
    assert [layer.name for layer in info.layers] == ["0", "2", "4"]
    norms = [item.scope for item in report.measurements if item.metric == "activation_norm"]
    assert norms == ["0", "2", "4"]
    assert "2" not in [link.name for chain in chains(info) for link in chain]


def test_the_facts_of_the_first_step_stay() -> None:
    class Growing(nn.Module):
        """Skips a layer in all forwards but the first."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.middle = nn.Linear(8, 8)
            self.last = nn.Linear(8, 2)
            self.passes = 0

        def forward(self, values: Tensor) -> Tensor:
            self.passes += 1
            hidden = torch.relu(self.first(values))
            if self.passes == 1:
                hidden = torch.relu(self.middle(hidden))
            output: Tensor = self.last(hidden)
            return output

    torch.manual_seed(0)
    model = Growing()
    inputs = torch.randn(8, 6)
    first = watch_one_step(model, inputs)[0]
    model.passes = 0
    assert chains(watch_one_step(model, inputs, steps=4)[0]) == chains(first)
    assert chains(first) == [[Link("first"), Link("middle")]]


def test_an_evaluation_first_does_not_count() -> None:
    model = between(nn.ReLU())
    told = gradwatch.MemorySink()
    optimizer = SGD(model.parameters(), lr=1e-3)
    watch = gradwatch.watch(model, optimizer, sinks=[told], on_error="raise")
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            model.eval()(torch.full((3, 6), 1e6))
    with torch.no_grad():
        model.train()(torch.full((3, 6), 1e6))
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    watch.close()
    assert told.reports[0].info.batch_size == 8
    assert (told.reports[0].value("activation_norm", "0") or 1e6) < 100
    assert chains(watch.model_info) == expected_chain(1, "relu")


# --- Facts about layers ------------------------------------------------------------------------


def test_facts_that_need_no_forward() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 6, (3, 5), groups=2, bias=False),
            "norm": nn.BatchNorm2d(6),
            "linear": nn.Linear(7, 3),
            "words": nn.Embedding(11, 5),
            "rnn": nn.LSTM(5, 9),
            "act": nn.GELU(),
            "drop": nn.Dropout(0.3),
        }
    )
    model["linear"].weight.requires_grad_(False)
    optimizer = SGD(model["conv"].parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, train_size=10) as watch:
        info = watch.model_info
    layers = {item.name: item for item in info.layers}
    fans = {name: (item.fan_in, item.fan_out, item.width) for name, item in layers.items()}
    assert fans == {
        "conv": (2 * 15, 3 * 15, 6),
        "norm": (0, 0, 0),
        "linear": (7, 3, 3),
        "words": (0, 0, 5),
        "rnn": (5, 9, 9),
    }
    assert [name for name, item in layers.items() if item.has_bias] == ["norm", "linear"]
    assert (info.parameters, info.frozen) == (("conv.weight",), ("linear.weight",))
    assert set(info.not_optimized) >= {"linear.bias", "words.weight", "rnn.weight_ih_l0"}
    assert (info.activations, info.normalisations) == (("act",), ("norm",))
    assert (info.recurrent, info.train_size) == (("rnn",), 10)
    assert [(item.name, item.probability) for item in info.dropouts] == [("drop", 0.3)]
    assert info.untouched_optimizer


PADDINGS: list[tuple[int, dict[str, Any]]] = [
    (7, {"kernel_size": 3}),
    (7, {"kernel_size": 3, "padding": 1}),
    (8, {"kernel_size": 5, "padding": 2, "stride": 2}),
    (9, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    (6, {"kernel_size": (3, 5), "padding": (1, 2)}),
    (6, {"kernel_size": 3, "padding": "same"}),
    (6, {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)}),
    (6, {"kernel_size": 4, "padding": "same"}),
    (6, {"kernel_size": 3, "padding": "valid"}),
    (4, {"kernel_size": 7, "padding": 3}),
    (6, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (6, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("size", "options"), PADDINGS, ids=[str(row) for row in PADDINGS])
def test_the_padding_factor_is_the_share_of_taps_inside(size: int, options: dict[str, Any]) -> None:
    """Counted by convolving ones with ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, **options), nn.ReLU(), nn.Conv2d(8, 2, 1))
    info, _ = watch_one_step(model, torch.randn(4, 2, size, size))
    counting = nn.Conv2d(1, 1, **options, bias=False, dtype=torch.float64)
    nn.init.ones_(counting.weight)
    inside = counting(torch.ones(1, 1, size, size, dtype=torch.float64))
    expected = float(inside.detach().mean()) / counting.weight.numel()
    assert info.layers[0].padding_factor == pytest.approx(expected, rel=1e-9)


def test_facts_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 2)).double().float()
    inputs = torch.randn(50, 40) * 3
    weight, bias = (item.detach().double() for item in model[0].parameters())
    layer = watch_one_step(model, inputs)[0].layers[0]
    power = (inputs.double() @ weight.T).square().mean()
    arriving = inputs.double().square().mean()
    variance = weight.square().mean()
    expected = {
        "weight_variance": variance,
        "weight_kurtosis": weight.pow(4).mean() / variance**2,
        "alignment": torch.log(power / (arriving * variance * 40)),
        "bias_share": bias.square().mean() / (bias.square().mean() + power),
        "input_mean_square": arriving,
    }
    for name, value in expected.items():
        assert getattr(layer, name) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    assert not layer.one_hot_input


@pytest.mark.parametrize(("made", "expected"), [("one-hot", True), ("two", False), ("0", False)])
def test_one_hot_inputs_are_noticed(made: str, expected: bool) -> None:
    inputs = functional.one_hot(torch.arange(12) % 6, 6).float()
    if made == "two":
        inputs[3, :2] = 1
    elif made == "0":
        inputs[3] = 0
    info, _ = watch_one_step(between(nn.ReLU()), inputs)
    assert info.layers[0].one_hot_input == expected


# --- Norms and gains against float64 -----------------------------------------------------------


def default(layer: Layer) -> None:
    """As PyTorch made it."""


def bias_of(layer: Layer) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def he(layer: Layer) -> None:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(bias_of(layer))


def xavier(layer: Layer) -> None:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.constant_(bias_of(layer), 0.1)


def large(layer: Layer) -> None:
    nn.init.normal_(layer.weight, std=3.0)
    nn.init.normal_(bias_of(layer), std=30.0)


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], Function]] = {
    "relu": (nn.ReLU, lambda x: x.clamp(min=0)),
    "in place": (lambda: nn.ReLU(inplace=True), lambda x: x.clamp(min=0)),
    "leaky": (lambda: nn.LeakyReLU(0.1), lambda x: torch.where(x > 0, x, 0.1 * x)),
    "tanh": (nn.Tanh, lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())),
    "gelu": (nn.GELU, lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
    "silu": (nn.SiLU, lambda x: x / (1 + (-x).exp())),
    "elu": (nn.ELU, lambda x: torch.where(x > 0, x, x.exp() - 1)),
    "nothing": (nn.Identity, lambda x: x),
}


def dense(width: int, depth: int) -> tuple[list[Layer], Tensor]:
    layers = [nn.Linear(6 if number == 0 else width, width) for number in range(depth)]
    return [*layers, nn.Linear(width, 2)], torch.randn(70, 6)


def convolutional(width: int, depth: int) -> tuple[list[Layer], Tensor]:
    layers = [
        nn.Conv2d(2 if number == 0 else width, width, 3, padding=1, stride=1 + (number == 1))
        for number in range(depth)
    ]
    return [*layers, nn.Conv2d(width, 2, 1)], torch.randn(70, 2, 6, 6)


def without_bias(layer: Layer, values: Tensor) -> Tensor:
    """`W h` in double precision."""
    weight = layer.weight.detach().double()
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(values, weight, stride=layer.stride, padding=layer.padding)
    return values @ weight.T


def with_bias(layer: Layer, values: Tensor) -> Tensor:
    shape = [1, -1, *[1] * (values.dim() - 2)]
    return without_bias(layer, values) + bias_of(layer).detach().double().reshape(shape)


def mean_squares(values: Tensor) -> Tensor:
    return values.flatten(1).square().mean(1)


@pytest.mark.parametrize("kind", [dense, convolutional])
@pytest.mark.parametrize("initialise", [default, he, xavier, large])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_norms_and_gains_agree_with_double_precision(
    function: str,
    initialise: Callable[[Layer], None],
    kind: Callable[[int, int], tuple[Sequence[Layer], Tensor]],
) -> None:
    torch.manual_seed(0)
    layers, inputs = kind(17, 3)
    module, exact = FUNCTIONS[function]
    for layer in layers:
        initialise(layer)
    model = nn.Sequential(
        *itertools.chain(*[(layer, module()) for layer in layers[:-1]]), layers[-1]
    )
    if initialise is large and function in {"tanh", "silu", "elu"}:
        inputs = inputs / 100  # the exact formulas above overflow
    norms, gains = reference(layers, exact, inputs.double())
    _, report = watch_one_step(model, inputs)
    names = [str(2 * number) for number in range(len(layers))]
    found = [report.value("activation_norm", name) for name in names]
    assert found == pytest.approx(norms, rel=1e-5)
    found = [report.value("activation_gain", name) for name in names[:-1]]
    assert found == pytest.approx(gains, rel=1e-4)
    found = [report.value("activation_gain_cumulative", name) for name in names[:-1]]
    assert found == pytest.approx(list(itertools.accumulate(gains, float.__mul__)), rel=1e-4)
    assert report.value("activation_gain", names[-1]) is None


def reference(
    layers: Sequence[Layer], function: Function, hidden: Tensor
) -> tuple[list[float], list[float]]:
    """Norms of all outputs; gains of all layers but the last, on the first 64 examples."""
    norms, gains = [], []
    for layer in layers:
        output = with_bias(layer, hidden)
        norms.append(float(output.flatten(1).square().sum(1).mean().sqrt()))
        leaving = mean_squares(function(without_bias(layer, hidden[:64])))
        gains.append(float(torch.log(leaving / mean_squares(hidden[:64])).mean().exp()))
        hidden = function(output)
    return norms, gains[:-1]


def test_the_gain_is_of_the_signal_that_dropout_lets_through() -> None:
    torch.manual_seed(0)
    model = between(nn.ReLU(), nn.Dropout(0.5))
    inputs = torch.randn(16, 6)
    seen: list[Tensor] = []
    model[3].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    middle = linear(model, 3).weight.detach().clone().double()
    _, report = watch_one_step(model, inputs)
    leaving = mean_squares((seen[0] @ middle.T).clamp(min=0))
    expected = float(torch.log(leaving / mean_squares(seen[0])).mean().exp())
    assert report.value("activation_gain", "3") == pytest.approx(expected, rel=1e-5)


def test_an_example_of_zeros_does_not_count() -> None:
    torch.manual_seed(0)
    model = between(nn.ReLU())
    inputs = torch.randn(8, 6)
    gain = watch_one_step(model, inputs)[1].value("activation_gain", "0")
    torch.manual_seed(0)
    model = between(nn.ReLU())
    padded = torch.cat([inputs[:4], torch.zeros(3, 6), inputs[4:]])
    assert watch_one_step(model, padded)[1].value("activation_gain", "0") == pytest.approx(gain)


def test_a_layer_that_lets_nothing_through_has_gain_zero() -> None:
    model = between(nn.ReLU())
    nn.init.zeros_(linear(model, 0).weight)
    _, report = watch_one_step(model, torch.randn(8, 6))
    assert report.value("activation_gain", "0") == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gains_in_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = between(nn.ReLU())
    inputs = torch.randn(32, 6)
    expected = watch_one_step(model, inputs)[1].value("activation_gain", "0")
    torch.manual_seed(0)
    model = between(nn.ReLU()).to(dtype)
    found = watch_one_step(model, inputs.to(dtype))[1].value("activation_gain", "0")
    assert found == pytest.approx(expected, rel=0.02)


def test_a_model_that_is_one_layer_has_a_name() -> None:
    model = nn.Linear(16, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_error="raise") as watch:
        model(torch.ones(8, 16)).sum().backward()
        optimizer.step()
    scopes = {m.scope for m in watch.summary().measurements if m.metric == "activation_norm"}
    assert scopes == {layer.name for layer in watch.model_info.layers} == {"root"}
