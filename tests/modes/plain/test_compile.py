"""Under `torch.compile` the numbers are right or absent, and the graphs are those without a watch.

A hook inside a compiled region would become a part of its graphs. Running a sampled step without
compilation would show the layers, but its losses would differ from those of the compiled model.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Optimizer

import gradwatch

if TYPE_CHECKING:
    from tests.modes.plain.conftest import Agrees, MakeBooks

FAMILY = "Plain PyTorch: torch.compile"
BACKEND = "aot_eager"
INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
WHOLE = "compiled as a whole"
NO_INPUTS = "inputs do not show it"
NO_FORWARD = "no training forward of the whole model was seen"

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(thing: Any, **options: Any) -> Any:
    return torch.compile(thing, backend=BACKEND, **options)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


class Partly(nn.Module):
    """A plain layer and a compiled part, as a wrapper or in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Linear(6, 8)
        part = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        if in_place:
            part.compile(backend=BACKEND)
        self.fast = part if in_place else compiled(part)

    def forward(self, values: Tensor) -> Tensor:
        output: Tensor = self.fast(self.plain(values))
        return output


# --- What is measured --------------------------------------------------------------------------


def nothing(name: str) -> bool:
    return False


def test_a_compiled_model(books: "MakeBooks", agrees: "Agrees") -> None:
    model = net()
    run = books(model=model, called=compiled(model), hears=nothing)
    run.train()
    agrees("torch.compile(model)", run, activation_norm=WHOLE)


@pytest.mark.timeout(60)
def test_a_model_compiled_by_inductor(books: "MakeBooks", agrees: "Agrees") -> None:
    model = net()
    run = books(model=model, called=torch.compile(model), hears=nothing)
    run.train()
    agrees("torch.compile(model), inductor", run, activation_norm=WHOLE)


def test_a_compiled_model_whose_original_is_watched(books: "MakeBooks", agrees: "Agrees") -> None:
    model = net()
    run = books(model=model, called=compiled(model), watched=model, hears=nothing)
    run.train()
    agrees(
        "torch.compile(model), but the original is watched",
        run,
        activation_norm=NO_FORWARD,
        batch_size=NO_INPUTS,
    )


def test_a_model_compiled_in_place(books: "MakeBooks", agrees: "Agrees") -> None:
    """All hooks of the model run inside the compiled call, so its inputs are out of reach."""
    model = net()
    model.compile(backend=BACKEND)
    run = books(model=model, hears=nothing)
    run.train()
    agrees("model.compile()", run, activation_norm=WHOLE, batch_size=NO_INPUTS)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_part(in_place: bool, books: "MakeBooks", agrees: "Agrees") -> None:
    """The rest of the model is measured, and the layers that are not are named."""
    run = books(model=Partly(in_place), hears=lambda name: name == "plain")
    run.train()
    for entry in run.entries:
        for tensors in (entry.used, entry.moved):
            for name in tuple(tensors):
                tensors[name.replace("_orig_mod.", "")] = tensors.pop(name)
    notes = [note for note in run.told.reports[0].notes if "fast.0, fast.2 trained" in note]
    assert len(notes) == 1
    agrees("a compiled submodule (its layers: not seen, said)", run)


def test_a_compiled_loss(books: "MakeBooks", agrees: "Agrees") -> None:
    """The function that is compiled calls the model, so that its hooks would be compiled."""
    model = net()
    run = books(model=model, hears=nothing)
    function = compiled(lambda values: model(values).square().mean())
    for _ in range(3):
        run.optimizer.zero_grad()
        loss = function(INPUTS)
        loss.backward()
        run.step(loss=loss.item())
    agrees(
        "a compiled function that calls the model",
        run,
        activation_norm=NO_FORWARD,
        batch_size=NO_INPUTS,
    )


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_step(whole: bool, books: "MakeBooks", agrees: "Agrees") -> None:
    run = books(lambda model: torch.optim.Adam(model.parameters(), lr=0.01))

    def function() -> None:
        run.optimizer.step()

    step = compiled(function if whole else run.optimizer.step)
    for _ in range(3):
        loss = run.backward()
        run.about_to_step()
        step()
        run.stepped(loss=loss)
    name = "a compiled function with optimizer.step()" if whole else "torch.compile(optimizer.step)"
    agrees(name, run)


# --- What the compiler makes of it -------------------------------------------------------------


Step = Callable[[], None]


def eager_step(model: Any, optimizer: Optimizer) -> Step:
    def step() -> None:
        model(INPUTS).square().mean().backward()
        clip_grad_norm_(optimizer.param_groups[0]["params"], 0.05)
        optimizer.step()
        optimizer.zero_grad()

    return step


def in_place(**options: Any) -> nn.Module:
    model = net()
    model.compile(backend=BACKEND, **options)
    return model


def loss_step(model: nn.Module, optimizer: Optimizer, **options: Any) -> Step:
    function = compiled(lambda values: model(values).square().mean(), **options)

    def step() -> None:
        function(INPUTS).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def optimizer_step(model: nn.Module, optimizer: Optimizer) -> Step:
    stepping = compiled(optimizer.step)

    def step() -> None:
        model(INPUTS).square().mean().backward()
        stepping()
        optimizer.zero_grad()

    return step


LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Step]]] = {
    "wrapper": (net, lambda model, optimizer: eager_step(compiled(model), optimizer)),
    "wrapper without graph breaks": (
        net,
        lambda model, optimizer: eager_step(compiled(model, fullgraph=True), optimizer),
    ),
    "in place": (in_place, eager_step),
    "part": (lambda: Partly(False), eager_step),
    "part in place": (lambda: Partly(True), eager_step),
    "loss": (net, loss_step),
    "loss without graph breaks": (
        net,
        lambda model, optimizer: loss_step(model, optimizer, fullgraph=True),
    ),
    "step": (net, optimizer_step),
    "everything": (net, lambda model, optimizer: compiled(eager_step(model, optimizer))),
}


def compilation(
    loop: str, watched_from: int | None, **options: Any
) -> tuple[dict[str, int], list[Tensor]]:
    """Counters of the compiler and final weights of a training of eight steps."""
    torch._dynamo.reset()
    counters.clear()
    build, make_step = LOOPS[loop]
    model = build()
    optimizer = SGD(model.parameters(), lr=0.1)
    step = make_step(model, optimizer)
    watch = None
    for number in range(8):
        if number == watched_from:
            watch = gradwatch.watch(
                model, optimizer, every_n_steps=2, log_every_n_steps=2, on_error="raise", **options
            )
        step()
    if watch is not None:
        watch.close()
        assert watch.step == 8 - (watched_from or 0)
        assert watch.summary().value("gradient_norm_used")
    stats = {"breaks": sum(counters["graph_break"].values()), **counters["stats"]}
    return stats, [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.parametrize("loop", LOOPS)
def test_graphs_and_weights_are_those_without_a_watch(
    loop: str, assert_identical: Callable[[Any, Any], None]
) -> None:
    """No graph break and no graph more, for a watch from the start or made later.

    To see a clipping inside a compiled function is to take it out of its graph, so the one
    training that has that does without.
    """
    options = {"track_loss": True, "track_clipping": loop != "everything"}
    alone, weights = compilation(loop, None)
    breaks = alone.pop("breaks")
    for start in (0, 3):
        watched, watched_weights = compilation(loop, start, **options)
        assert_identical(watched_weights, weights)
        assert watched.pop("breaks") <= breaks
        assert watched == alone
