"""What watching costs: no work on unsampled steps, no host read between reports, no growth."""

import gc
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch import monitors

pytestmark = pytest.mark.usefixtures("one_thread")

READS = ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__")
"""The ways from a tensor to Python."""
SYNCHRONISING = ("local_scalar", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
"""Operators that wait for the device because their result, or its shape, is needed at once."""
ALIASES = ("detach", "view", "alias", "permute", "transpose", "split", "unbind", "select", "slice")
"""Operators that compute nothing."""


# --- A training, operator by operator ----------------------------------------------------------


class Operators(TorchDispatchMode):
    """Lists the names of the operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def deep(depth: int) -> nn.Module:
    layers = [[nn.Linear(16, 16), activation()] for activation in ACTIVATIONS for _ in range(depth)]
    return nn.Sequential(*itertools.chain(*layers), nn.Linear(16, 2))


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.LeakyReLU, nn.ELU)


def step(
    model: nn.Module, optimizer: Optimizer, watch: gradwatch.Watch | None, parts: int = 1
) -> None:
    optimizer.zero_grad()
    for _ in range(parts):
        loss = model(torch.ones(4, 16)).square().mean() / parts
        loss.backward()
        if watch is not None and parts > 1:
            watch.weigh_microbatch(4)
    if watch is not None:
        watch.observe(loss=loss, batch_size=4)
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all reads of a tensor from Python, as they happen."""
    found: list[str] = []

    def listening(name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return original(tensor, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, listening(name))
    return found


Trace = list[tuple[list[str], list[str]]]
"""Operators and reads of each step."""


@pytest.fixture
def trace(reads: list[str]) -> Callable[..., Trace]:
    def follow(
        depth: int = 2, steps: int = 1, optimizer: str = "SGD", parts: int = 1, **options: Any
    ) -> Trace:
        """Train; watched if there are options."""
        torch.manual_seed(0)
        model = deep(depth)
        chosen: Optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
        watch = gradwatch.watch(model, chosen, on_error="raise", **options) if options else None
        found = []
        for _ in range(steps):
            reads.clear()
            with Operators() as operators:
                step(model, chosen, watch, parts)
            found.append((operators.names, list(reads)))
        if watch is not None:
            watch.close()
        return found

    return follow


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


FULL: dict[str, Any] = {
    "track_loss": True,
    "track_clipping": True,
    "loss_fn": loss_fn,
    "budget": None,
}


# --- Steps that are not sampled ----------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_an_unsampled_step_is_the_step_of_an_unwatched_training(
    optimizer: str, parts: int, trace: Callable[..., Trace]
) -> None:
    alone = trace(steps=8, optimizer=optimizer, parts=parts)
    watched = trace(
        steps=8,
        optimizer=optimizer,
        parts=parts,
        monitors=gradwatch.presets.full(),
        every_n_steps=4,
        log_every_n_steps=4,
        **FULL,
    )
    for number in (1, 2, 3, 5, 6, 7):
        assert watched[number] == alone[number]
    # That one is sampled, and the loss evaluated again by the probes.
    assert Counter(watched[4][0])["addmm.default"] > 2 * Counter(alone[4][0])["addmm.default"]


def test_an_unsampled_step_does_not_even_run_python_per_layer() -> None:
    """The number of calls into gradwatch does not depend on the depth, and is small."""
    calls = []
    for depth in (1, 20):
        model = deep(depth)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options: dict[str, Any] = {"monitors": gradwatch.presets.full(), **FULL}
        watch = gradwatch.watch(model, optimizer, every_n_steps=10, log_every_n_steps=10, **options)
        step(model, optimizer, None)
        with Calls() as counter:
            step(model, optimizer, None)
        calls.append(counter.count)
        watch.close()
    assert calls[0] == calls[1] < 70


class Calls:
    """Counts the calls of functions of gradwatch."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "Calls":
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        name = frame.f_globals.get("__name__", "")
        self.count += event == "call" and name.startswith("gradwatch")


# --- Host reads --------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_one_host_read_a_report_and_none_between(
    optimizer: str, parts: int, trace: Callable[..., Trace]
) -> None:
    alone = trace(steps=9, optimizer=optimizer, parts=parts)
    watched = trace(
        steps=9,
        optimizer=optimizer,
        parts=parts,
        monitors=gradwatch.presets.full(),
        every_n_steps=1,
        log_every_n_steps=4,
        **FULL,
    )
    for number, ((_, expected), (operators, found)) in enumerate(zip(alone, watched, strict=True)):
        own = Counter(found) - Counter(expected)
        assert own == ({"tolist": 1} if number % 4 == 0 else {}), f"step {number}"
        waiting = [name for name in operators if name.startswith(SYNCHRONISING)]
        unwatched = [name for name in alone[number][0] if name.startswith(SYNCHRONISING)]
        assert Counter(waiting) - Counter(unwatched) == {}


def test_the_last_report_is_one_host_read(reads: list[str]) -> None:
    model = deep(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch = gradwatch.watch(model, optimizer, every_n_steps=1, log_every_n_steps=10)
    for _ in range(4):
        step(model, optimizer, watch)
    reads.clear()
    watch.close()
    assert reads == ["tolist"]
    watch.summary()
    assert reads == ["tolist"]


def test_a_tensor_as_learning_rate_or_largest_norm_is_not_read(reads: list[str]) -> None:
    model = deep(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.01), foreach=False)
    counts = []
    for watched in (False, True):
        options: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 3, **FULL}
        watch = gradwatch.watch(model, optimizer, **options) if watched else None
        found = []
        for _ in range(3):
            reads.clear()
            optimizer.zero_grad()
            model(torch.ones(4, 16)).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), torch.tensor(0.1))  # type: ignore[arg-type]
            optimizer.step()
            found.append(Counter(reads))
        counts.append(found)
        if watch is not None:
            watch.close()
    extra = [after - before for before, after in zip(*counts, strict=True)]
    assert extra == [{"tolist": 1}, {}, {}]


# --- Operators on sampled steps ----------------------------------------------------------------


def extra_operators(
    trace: Callable[..., Trace], depth: int, **options: Any
) -> tuple[Counter[str], int]:
    """What a sampled step without a report dispatches beyond an unwatched one; parameters."""
    alone = trace(depth, steps=2)[1][0]
    watched = trace(depth, steps=2, every_n_steps=1, log_every_n_steps=5, **options)[1][0]
    return Counter(watched) - Counter(alone), 2 * (len(ACTIVATIONS) * depth + 1)


@pytest.mark.parametrize("depth", [1, 4, 12])
def test_gradient_norms_take_a_dot_product_a_parameter_and_little_else(
    depth: int, trace: Callable[..., Trace]
) -> None:
    """A norm is one dot product and one square root; views and `observe` come on top."""
    extra, parameters = extra_operators(
        trace, depth, monitors=[monitors.GradientNorm()], track_clipping=False
    )
    computing = {name: count for name, count in extra.items() if not name.startswith(ALIASES)}
    twice = 2 * parameters  # `observe` measures once more, before clipping
    assert extra["dot.default"] == twice
    roots = sum(count for name, count in computing.items() if name.startswith("sqrt"))
    assert roots <= twice
    assert sum(computing.values()) - twice - roots <= 12
    assert sum(extra.values()) - sum(computing.values()) <= 2 * twice + 4


SECOND_ORDER = {"Sharpness", "HessianTrace", "GradientCovariance"}
FIRST_ORDER = sorted(set(monitors.__all__) - SECOND_ORDER)


@pytest.mark.parametrize("probed", [False, True], ids=["", "with probes"])
@pytest.mark.parametrize("names", [["GradientNorm"], FIRST_ORDER], ids=["one", "all"])
def test_the_operators_are_a_fixed_number_per_parameter(
    names: list[str], probed: bool, trace: Callable[..., Trace]
) -> None:
    options = FULL if probed else {}
    counts = []
    for depth in (2, 4, 6):
        chosen = [getattr(monitors, name)() for name in names]
        extra, parameters = extra_operators(trace, depth, monitors=chosen, **options)
        counts.append((sum(extra.values()), parameters))
    (first, few), (second, some), (third, many) = counts
    assert third - second == second - first
    assert many - some == some - few
    # Each evaluation of the loss by a probe is a forward and a backward.
    most, most_besides = (10, 80) if len(names) == 1 else (200, 400) if probed else (60, 80)
    assert (third - first) / (many - few) <= most
    assert first - few * (third - first) / (many - few) <= most_besides


def test_the_operators_of_curvature_probes_grow_no_faster_than_the_model(
    trace: Callable[..., Trace],
) -> None:
    """Some twenty products with the Hessian; what autograd leaves out varies with the depth."""
    counts = []
    for depth in (2, 4, 6):
        chosen = [getattr(monitors, name)() for name in sorted(SECOND_ORDER)]
        extra, parameters = extra_operators(trace, depth, monitors=chosen, **FULL)
        counts.append((sum(extra.values()), parameters))
    (first, few), (second, some), (third, many) = counts
    assert third - second <= 1.02 * (second - first)
    assert (second - first) / (some - few) <= 700
    assert first - few * (second - first) / (some - few) <= 2500
    assert third > 20 * many, "or nothing was probed"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_parts_are_compiled_as_they_would_be_unwatched() -> None:
    """A hook inside a compiled region would split it, or have it compiled again and again."""
    graphs = []
    for watched in (False, True):
        torch._dynamo.reset()
        captured: list[int] = []

        def backend(graph: Any, inputs: Any, captured: list[int] = captured) -> Any:
            captured.append(len(graph.graph.nodes))
            return graph.forward

        compiled: Any = torch.compile(deep(1), backend=backend)
        model = nn.Sequential(deep(1), nn.Linear(2, 16), compiled)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        options: dict[str, Any] = {"every_n_steps": 2, "log_every_n_steps": 2, **FULL}
        watch = gradwatch.watch(model, optimizer, **options) if watched else None
        for _ in range(5):
            step(model, optimizer, watch)
        if watch is not None:
            watch.close()
            assert watch.summary().value("activation_norm", "0.0") is not None
            assert watch.summary().value("gradient_norm_used", "2.0.weight") is not None
        graphs.append(captured)
    assert graphs[0] == graphs[1]
    assert len(graphs[0]) == 1


# --- Memory ------------------------------------------------------------------------------------


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


@pytest.fixture(scope="module")
def soak() -> Iterator[dict[int, tuple[int, int]]]:
    """Live tensors and live objects, at some steps of a long training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options = FULL | {"loss_fn": None}  # so many probes take long; there is a test of their own
    watch = gradwatch.watch(
        model, optimizer, every_n_steps=1, log_every_n_steps=10, on_error="raise", **options
    )
    values = torch.randn(8, 3)
    found = {}
    for number in range(3001):
        optimizer.zero_grad()
        model(values).square().mean().backward()
        optimizer.step()
        if number in {100, 1000, 2700, 3000}:
            found[number] = (live_tensors(), len(gc.get_objects()))
    yield found
    watch.close()


def test_no_tensor_stays(soak: dict[int, tuple[int, int]]) -> None:
    tensors = [tensors for tensors, _ in soak.values()]
    # What other tests have left behind may go meanwhile.
    assert tensors == sorted(tensors, reverse=True)


def test_no_tensor_stays_of_a_probe() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    options: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 10, "on_error": "raise"}
    monitors = gradwatch.presets.full()
    watch = gradwatch.watch(model, optimizer, monitors=monitors, **options, **FULL)
    found = []
    for number in range(200):
        step(model, optimizer, watch)
        if number in {60, 130, 190}:
            found.append(live_tensors())
    watch.close()
    assert watch.summary().value("noise_curvature") is not None
    assert found == sorted(found, reverse=True)


def test_memory_is_constant_once_the_history_is_full(soak: dict[int, tuple[int, int]]) -> None:
    """257 reports are kept, so from step 2570 on nothing may come without something going."""
    full, later = soak[2700][1], soak[3000][1]
    assert later - full < 200


def test_the_history_is_bounded() -> None:
    report = gradwatch.Report(step=0)
    history = gradwatch.History(gradwatch.ModelInfo())
    for number in range(3000):
        history.append(gradwatch.Report(step=number))
    assert len(history) <= 257
    assert history[0] == report  # the first one is what statements on the initialisation need
    assert history[-1].step == 2999


def kept_things() -> list[Any]:
    """Large tensors and nodes of autograd graphs."""
    gc.collect()
    return [
        item
        for item in gc.get_objects()
        if type(item).__name__ == "AddmmBackward0"
        or (issubclass(type(item), Tensor) and item.numel() >= 50 * 300)
    ]


def kept_by(chosen: Sequence[gradwatch.Monitor]) -> list[Tensor]:
    (sharpness,) = (item for item in chosen if isinstance(item, monitors.Sharpness))
    vectors = [part for vector in sharpness._vectors.values() for part in vector]
    signs = [item for item in kept_things() if isinstance(item, Tensor) and is_signs(item)]
    assert len(signs) <= 2
    assert not any(item.requires_grad for item in vectors)
    return [*vectors, *signs]


def is_signs(item: Tensor) -> bool:
    return item.dim() == 1 and bool(item.detach().abs().eq(1.0).all())


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("steps", [2, 3])
def test_the_graph_of_a_step_is_let_go(steps: int, told: bool) -> None:
    """Between steps the watch holds numbers only: no batch, no activation, no gradient, no graph.

    But what the monitors of the curvature say they keep: an eigenvector, and random signs. After
    two steps the newest one was not sampled, and what is told in it is let go as well.
    """
    model = nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = kept_things()
    chosen = gradwatch.presets.full()
    options: dict[str, Any] = {"monitors": chosen, **FULL}
    watch = gradwatch.watch(model, optimizer, every_n_steps=2, log_every_n_steps=100, **options)
    for _ in range(steps):
        batch = torch.randn(50, 300)
        loss = loss_fn(model, batch)
        loss.backward()
        if told:
            watch.observe(batch=batch)
        optimizer.step()
        optimizer.zero_grad()
    del loss, batch
    known = set(map(id, [*before, *kept_by(chosen)]))
    assert [item for item in kept_things() if id(item) not in known] == []
    assert watch.summary().value("noise_curvature") is not None
    watch.close()
