"""Modules that are used in special ways: in place, in parts, several times, in threads."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, MakeBooks

FAMILY = "Plain PyTorch: modules"
BATCH = 5
UNSEEN = "trained, but no output was seen"


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build()


class InPlace(nn.Module):
    """The output of each layer is overwritten by what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, values: Tensor) -> Tensor:
        hidden: Tensor = self.relu(self.first(values))
        result: Tensor = self.second(hidden)
        result += hidden
        return result.tanh_()


class Shared(nn.Module):
    """One layer that runs several times: its norm is that of the last time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, values: Tensor) -> Tensor:
        for _ in range(3):
            values = torch.tanh(self.layer(values))
        return values


class Llama(nn.Module):
    """A block that gets its input by keyword, and a root that returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(6, 6)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.block(input=values)
        return output


MODELS: dict[str, Callable[[], nn.Module]] = {
    "in-place operations": InPlace,
    "a layer that runs several times": Shared,
    "inputs by keyword": Llama,
    "weight_norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3))),
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 3))),
    "batch normalisation": lambda: nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "a model that is one layer": lambda: nn.Linear(6, 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_books_are_met(name: str, books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(model=seeded(MODELS[name]))
    run.train()
    agrees(name, run)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[[int, int], nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(6, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, values: nn.utils.rnn.PackedSequence) -> Tensor:
        last = self.rnn(values)[1]
        output: Tensor = self.head(last[0] if isinstance(last, tuple) else last)
        return output


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_packed_sequences(kind: type[nn.RNNBase], books: "MakeBooks", agrees: "Agrees") -> None:
    """The batch is the number of sequences, not of time steps."""
    run = books(model=seeded(lambda: Recurrent(kind)))
    for _ in range(3):
        sequences = [torch.randn(length, 6) for length in (7, 4, 2)]
        loss = run.backward(values=nn.utils.rnn.pack_sequence(sequences))
        run.step(loss=loss, batch_size=3)
    agrees(f"packed sequences, {kind.__name__}", run)


def silent_layers(run: Any) -> set[str]:
    """What the notes of the first report name as trained but unseen."""
    notes = [note for note in run.told.reports[0].notes if UNSEEN in note]
    assert len(notes) <= 1
    names = notes[0].removeprefix("activation_norm: ").split(f" {UNSEEN}")[0] if notes else ""
    return set(names.split(", ")) - {""}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.attention(values, values, values, need_weights=False)[0]
        return output


class Functional(nn.Module):
    """The weights of a layer are used by a function, so that its own forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(6, 6, bias=False))
        self.list = nn.ParameterList([nn.Parameter(torch.ones(6))])
        self.head = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        hidden = nn.functional.linear(values, self.layer.weight) * self.list[0]
        output: Tensor = self.head(hidden)
        return output


UNSEEN_LAYERS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "nn.MultiheadAttention": (Attention, {"attention.out_proj"}),
    "nn.TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
        {"self_attn.out_proj"},
    ),
    "weights used by a function": (Functional, {"layer", "list"}),
}


@pytest.mark.parametrize("name", UNSEEN_LAYERS)
def test_layers_whose_forward_never_runs_are_named(
    name: str, books: "MakeBooks", agrees: "Agrees"
) -> None:
    """All the others are measured; these trained without a forward of their own."""
    build, unseen = UNSEEN_LAYERS[name]
    run = books(model=seeded(build))
    for _ in range(3):
        loss = run.backward(values=torch.randn(BATCH, 4, 6))
        run.step(loss=loss)
    assert not unseen & set(run.entries[0].activations)
    assert silent_layers(run) == unseen
    agrees(f"{name} ({', '.join(sorted(unseen))}: not seen, said)", run)


class Answer(nn.Module):
    """The root has a parameter itself, and its output is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.factor = nn.Parameter(torch.ones(3))

    def forward(self, values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(result=self.layer(values) * self.factor)


def test_an_output_that_is_no_tensor_is_named(books: "MakeBooks", agrees: "Agrees") -> None:
    model = seeded(Answer)
    run = books(
        model=model,
        called=lambda values: model(values).result,
        watched=model,
        hears=lambda name: name == "layer",
    )
    run.train()
    assert silent_layers(run) == {"root"}
    agrees("an output that is no tensor (root: not seen, said)", run)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chosen = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.chosen(values)
        return output


def test_layers_that_did_not_run_are_not_named(books: "MakeBooks") -> None:
    """An expert that was not chosen has no gradient either, and that is said already."""
    run = books(model=Experts())
    run.train()
    run.watch.close()
    assert silent_layers(run) == set()


class Replicas(nn.DataParallel[nn.Module]):
    """What DataParallel does on several devices: copies of the module that run in threads."""

    def forward(self, *inputs: Any, **more: Any) -> Any:
        parts = inputs[0].chunk(2)
        results: dict[int, Tensor] = {}

        def work(place: int) -> None:
            with torch.enable_grad():
                results[place] = replica(self.module)(parts[place])

        threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return torch.cat([results[place] for place in range(2)])


def replica(module: nn.Module) -> nn.Module:
    """A copy as `torch.nn.parallel.replicate` makes it: the hooks and parameters are shared."""
    copy: nn.Module = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        copy._modules[name] = replica(child)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(copy, name, parameter.view_as(parameter))
    return copy


def test_data_parallel_on_one_device(books: "MakeBooks", agrees: "Agrees") -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    run = books(model=model, called=nn.DataParallel(model))
    run.train()
    agrees("nn.DataParallel on one device", run)


def test_data_parallel_on_several_devices(books: "MakeBooks", agrees: "Agrees") -> None:
    """Each copy sees a part of the batch, all of them at once: none of them is believed."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    run = books(model=model, called=Replicas(model), hears=lambda name: False)
    run.train()
    agrees(
        "nn.DataParallel on several devices",
        run,
        activation_norm="no training forward of the whole model was seen",
    )
