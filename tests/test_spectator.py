"""The watch is a spectator: a watched training is bit-identical to one that nobody watches."""

import copy
import itertools
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch import monitors

os.environ["HF_HUB_OFFLINE"] = "1"

Batch = tuple[Tensor, Tensor]
Traces = Callable[..., dict[str, Any]]
Compare = Callable[[Any, Any], None]

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


# --- What is trained ---------------------------------------------------------------------------


class Classifier(nn.Module):
    """A recurrence whose last state is classified, a frozen parameter and one never used."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.recurrence = kind(
            input_size=4, hidden_size=8, num_layers=2, dropout=0.2, batch_first=True
        )
        self.head = nn.Linear(8, CLASSES)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, values: Tensor) -> Tensor:
        states, _ = self.recurrence(values)
        logits: Tensor = self.head(states[:, -1])
        return logits


class Encoder(nn.Module):
    """Two transformer blocks with dropout; the fused kernel of PyTorch may serve evaluation."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(
            8, nhead=2, dim_feedforward=16, dropout=0.1, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(block, num_layers=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, values: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(values).mean(1))
        return logits


class Checkpointed(nn.Module):
    """Two blocks that are run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2)
        )
        self.head = nn.Linear(12, CLASSES)
        self.reentrant = reentrant

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.first(values)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=self.reentrant)
        logits: Tensor = self.head(hidden)
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, CLASSES)
    )


def cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.2),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(4 * 4 * 4, CLASSES),
    )
    model[5].eval()  # a layer whose statistics the user has fixed
    return model


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Linear(16, CLASSES),
    )


def spectral() -> nn.Module:
    return nn.Sequential(
        spectral_norm(nn.Linear(6, 16)),
        nn.ReLU(inplace=True),
        spectral_norm(nn.Linear(16, 8)),
        nn.Tanh(),
        nn.Linear(8, CLASSES),
    )


SHAPES: dict[str, tuple[int, ...]] = {
    "cnn": (5, 2, 6, 6),
    "gru": (5, 7, 4),
    "lstm": (5, 7, 4),
    "encoder": (5, 7, 8),
    "teacher": (24, 6),
    "noisy": (7, 6),  # a third of it is still a batch to normalise
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "teacher": lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES)),
    "noisy": noisy,
    "gru": lambda: Classifier(nn.GRU),
    "lstm": lambda: Classifier(nn.LSTM),
    "encoder": Encoder,
    "spectral": spectral,
    "reentrant": lambda: Checkpointed(reentrant=True),
    "non_reentrant": lambda: Checkpointed(reentrant=False),
}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "slow": lambda model: torch.optim.SGD(model.parameters(), lr=1e-3),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "lbfgs": lambda model: torch.optim.LBFGS(
        model.parameters(), lr=0.5, max_iter=3, line_search_fn="strong_wolfe"
    ),
}


def draw(name: str) -> Batch:
    """A batch that depends on all three random streams, so that none may be disturbed."""
    size = SHAPES.get(name, (5, 6))
    inputs = torch.randn(size) * (1 + 0.1 * random.random()) + 0.1 * float(np.random.rand())
    targets = torch.randint(CLASSES, size[:1])
    return inputs, targets if name != "teacher" else (inputs[:, 0] > 0).long()


def seed() -> None:
    torch.manual_seed(0)
    random.seed(1)
    np.random.seed(2)


# --- How it is trained -------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    name: str
    model: nn.Module
    optimizer: Optimizer
    watch: gradwatch.Watch | None

    def loss(self) -> Tensor:
        return self.tell(draw(self.name))

    def tell(self, batch: Batch) -> Tensor:
        """The loss of a batch that the watch is told of, so that it can probe."""
        if self.watch is not None:
            self.watch.observe(batch=batch, gradients=False)
        return loss_fn(self.model, batch)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


Loop = Callable[[Training, int], Iterator[Tensor]]


def plain(training: Training, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        training.optimizer.step()
        yield loss


def evaluating(training: Training, steps: int) -> Iterator[Tensor]:
    """Validation before the first step, between forward and backward, and after each step."""
    yield evaluation(training)
    for _ in range(steps):
        training.optimizer.zero_grad()
        loss = training.loss()
        yield evaluation(training)
        loss.backward()
        yield evaluation(training)
        training.optimizer.step()
        yield evaluation(training)


def evaluation(training: Training) -> Tensor:
    flags = [(module, module.training) for module in training.model.modules()]
    training.model.eval()
    with torch.no_grad():
        output: Tensor = training.model(draw(training.name)[0])
    for module, flag in flags:
        module.training = flag
    return output


def accumulating(training: Training, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        for _ in range(4):
            loss = training.loss() / 4
            loss.backward()
            yield loss
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=False)


def clipping(training: Training, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        yield clip_grad_norm_(training.model.parameters(), 0.1)
        training.optimizer.step()
        yield loss


def clipping_by_watch(training: Training, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        training.optimizer.zero_grad()
        loss = training.loss()
        loss.backward()
        if training.watch is None:
            yield clip_grad_norm_(training.model.parameters(), 0.1)
        else:
            training.watch.observe(loss=loss, batch_size=5, epoch=0.5)
            yield training.watch.clip_grad_norm_(0.1)
        training.optimizer.step()
        yield loss


def closure(training: Training, steps: int) -> Iterator[Tensor]:
    losses: list[Tensor] = []

    def evaluate() -> Tensor:
        training.optimizer.zero_grad()
        loss = training.tell(batch)
        loss.backward()
        losses.append(loss)
        return loss

    for _ in range(steps):
        batch = draw(training.name)
        training.optimizer.step(evaluate)  # type: ignore[arg-type]  # a closure may give a tensor
    yield from losses


def scaling(training: Training, steps: int) -> Iterator[Tensor]:
    """Loss scaling that overflows now and then, so that some steps are skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=2)
    scales = [scaler.get_scale()]
    for step in range(steps):
        training.optimizer.zero_grad()
        loss = 8 * training.loss()
        scaler.scale(loss).backward()
        if step % 2:
            scaler.unscale_(training.optimizer)
            clip_grad_norm_(training.model.parameters(), 0.5)
        scaler.step(training.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        yield loss
    skipped = sum(new < old for old, new in itertools.pairwise(scales))
    assert 0 < skipped < steps
    yield torch.tensor(scales)


def autocasting(training: Training, steps: int) -> Iterator[Tensor]:
    for _ in range(steps):
        training.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = training.loss()
        loss.backward()
        training.optimizer.step()
        yield loss


def penalising(training: Training, steps: int) -> Iterator[Tensor]:
    """A gradient penalty, by double backward."""
    for _ in range(steps):
        training.optimizer.zero_grad()
        batch = draw(training.name)
        if training.watch is not None:
            training.watch.observe(batch=batch, gradients=False)
        whole = penalised(training.model, batch)
        whole.backward()
        training.optimizer.step()
        yield whole


def penalised(model: nn.Module, batch: Batch) -> Tensor:
    loss = loss_fn(model, batch)
    parameters = [item for item in model.parameters() if item.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    penalty = torch.stack([item.square().sum() for item in gradients if item is not None])
    return loss + 0.01 * penalty.sum()


LOOPS: dict[str, Loop] = {
    "plain": plain,
    "evaluating": evaluating,
    "accumulating": accumulating,
    "clipping": clipping,
    "clipping_by_watch": clipping_by_watch,
    "closure": closure,
    "scaling": scaling,
    "autocasting": autocasting,
    "penalising": penalising,
}


def every_monitor() -> list[gradwatch.Monitor]:
    found = gradwatch.presets.full()
    assert {type(item).__name__ for item in found} == set(monitors.__all__)
    return found


def full_watch(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], **options: Any
) -> gradwatch.Watch:
    """A watch that does all it can, on every step, and hides no error of its own."""
    settings: dict[str, Any] = {
        "monitors": every_monitor(),
        "loss_fn": loss_fn,
        "budget": None,
        "every_n_steps": 1,
        "log_every_n_steps": 5,
        "track_loss": True,
        "track_clipping": True,
        "on_error": "raise",
    }
    return gradwatch.watch(model, optimizer, **settings | options)


Run = Callable[..., tuple[dict[str, Any], list[gradwatch.Report]]]


@pytest.fixture(scope="module")
def baselines() -> dict[tuple[str, str, str, int], dict[str, Any]]:
    return {}


@pytest.fixture
def run(training_state: Traces, tmp_path: Path) -> Run:
    """Train, watched or not; gives the end state with all losses, and the reports."""

    def train(
        name: str, optimizer: str, loop: str, steps: int, *, watched: bool
    ) -> tuple[dict[str, Any], list[gradwatch.Report]]:
        seed()
        model = MODELS[name]()
        chosen = OPTIMIZERS[optimizer](model)
        told = gradwatch.MemorySink()
        options = {"loss_fn": penalised if loop == "penalising" else loss_fn}
        watch = None
        if watched:
            watch = full_watch(model, chosen, logdir=tmp_path, sinks=[told], **options)
        training = Training(name, model, chosen, watch)
        values = [item.detach().clone() for item in LOOPS[loop](training, steps)]
        if watch is not None:
            watch.close()
            assert not watch.failures
        return {"losses": values, **training_state(model, chosen)}, told.reports

    return train


GRID = [
    *[
        (name, optimizer, "plain", 20)
        for name in ("mlp", "cnn", "gru", "encoder")
        for optimizer in ("sgd", "adam", "adamw")
    ],
    ("noisy", "sgd", "plain", 60),
    ("lstm", "adam", "plain", 12),
    *[(name, "sgd", "plain", 12) for name in ("spectral", "reentrant", "non_reentrant")],
    *[(name, "adam", "evaluating", 6) for name in ("cnn", "gru", "encoder", "spectral")],
    ("cnn", "adamw", "accumulating", 12),
    ("encoder", "sgd", "clipping", 12),
    ("gru", "adam", "clipping_by_watch", 12),
    ("mlp", "sgd", "closure", 12),
    ("mlp", "lbfgs", "closure", 8),
    ("mlp", "sgd", "scaling", 12),
    ("cnn", "fused", "scaling", 12),
    ("noisy", "sgd", "autocasting", 12),
    ("lstm", "adamw", "autocasting", 6),
    ("mlp", "adam", "penalising", 12),
    ("noisy", "lbfgs", "closure", 6),
    ("non_reentrant", "adam", "accumulating", 6),
    ("reentrant", "adam", "clipping", 6),
]


@pytest.mark.parametrize(
    ("name", "optimizer", "loop", "steps"), GRID, ids=["-".join(map(str, row)) for row in GRID]
)
def test_a_watched_training_is_bit_identical(
    name: str, optimizer: str, loop: str, steps: int, run: Run, assert_identical: Compare
) -> None:
    alone, _ = run(name, optimizer, loop, steps, watched=False)
    watched, reports = run(name, optimizer, loop, steps, watched=True)
    assert_identical(alone, watched)
    # The promise is empty unless the watch did look: at this step, at those parameters.
    assert len(reports) >= steps // 5 - 2
    assert any(report.value("gradient_norm_used") is not None for report in reports[1:])
    assert reports[-1].value("activation_norm", list_of_layers(reports)[-1]) is not None
    if name == "reentrant":
        assert any("use_reentrant=False" in note for note in reports[-1].notes)
    else:
        assert number_of("smoothness_secant", reports) >= len(reports)
        assert number_of("noise_curvature", reports) >= len(reports)


def number_of(metric: str, reports: Sequence[gradwatch.Report]) -> int:
    return sum(item.metric == metric for report in reports for item in report.measurements)


def list_of_layers(reports: Sequence[gradwatch.Report]) -> list[str]:
    found = [item for report in reports for item in report.measurements]
    return [item.scope for item in found if item.metric == "activation_norm"]


def test_every_moment_of_the_grid_was_watched(run: Run) -> None:
    """The comparison above is empty if the watch did not look."""
    measured = set()
    for name, optimizer in (("noisy", "sgd"), ("teacher", "slow"), ("mlp", "adamw")):
        _, reports = run(name, optimizer, "plain", 61, watched=True)
        assert [report.step for report in reports] == list(range(0, 61, 5))
        assert [step.step for report in reports for step in report.steps] == list(range(61))
        measured |= {item.metric for report in reports for item in report.measurements}
    offered = {metric for monitor in every_monitor() for metric in monitor.metrics}
    reached = {"break_even_step"}  # is not told of batches as small as these
    assert measured == offered - reached, offered - measured


def test_a_compiled_training_is_bit_identical(
    training_state: Traces, assert_identical: Compare
) -> None:
    """Probes run uncompiled, and have nothing compiled anew."""

    def train(*, watched: bool) -> tuple[dict[str, Any], list[int]]:
        torch._dynamo.reset()
        captured: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            captured.append(len(graph.graph.nodes))
            return graph.forward

        seed()
        model = noisy()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        compiled: Any = torch.compile(model, backend=backend)
        told = gradwatch.MemorySink()
        watch = full_watch(compiled, optimizer, sinks=[told]) if watched else None
        losses = train_steps(compiled, optimizer, "noisy", 8, watch)
        if watch is not None:
            watch.close()
            assert number_of("smoothness_secant", told.reports) == 8
        state = {"losses": [item.detach() for item in losses], **training_state(model, optimizer)}
        return state, captured

    (alone, graphs), (watched, as_many) = train(watched=False), train(watched=True)
    assert_identical(alone, watched)
    assert graphs == as_many != []


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_language_model_that_returns_its_loss_is_bit_identical(
    checkpointed: bool, training_state: Traces, assert_identical: Compare
) -> None:
    """GPT-2 with dropout and the attention kernels that transformers takes by default."""
    transformers = pytest.importorskip("transformers")

    def train(*, watched: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=31, n_positions=16, n_embd=8, n_layer=2, n_head=2
        )
        model = transformers.GPT2LMHeadModel(config)
        assert model.config._attn_implementation == "sdpa"
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        told = gradwatch.MemorySink()
        watch = full_watch(model, optimizer, sinks=[told], loss_fn=None) if watched else None
        losses = []
        for _ in range(6):
            tokens = torch.randint(31, (6, 10))
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        if watch is not None:
            watch.close()
            assert number_of("smoothness_secant", told.reports) == 6
            assert number_of("noise_curvature", told.reports) == 6
            assert number_of("dropout_variance", told.reports) == 6
        return {"losses": losses, **training_state(model, optimizer)}

    assert_identical(train(watched=False), train(watched=True))


# --- Nothing stays behind ----------------------------------------------------------------------


def train_steps(
    model: nn.Module,
    optimizer: Optimizer,
    name: str,
    steps: int = 3,
    watch: gradwatch.Watch | None = None,
) -> list[Tensor]:
    return list(plain(Training(name, model, optimizer, watch), steps))


def made(name: str) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = MODELS[name]()
    return model, OPTIMIZERS["adam"](model)


@pytest.mark.parametrize("steps", [0, 1, 3, 7])
@pytest.mark.parametrize("name", MODELS)
def test_close_leaves_no_trace(name: str, steps: int, traces_on: Traces) -> None:
    model, optimizer = made(name)
    before = traces_on(model, optimizer)
    watch = full_watch(model, optimizer)
    train_steps(model, optimizer, name, steps, watch)
    assert {"torch.observed"} <= set(traces_on(model, optimizer)["hooks"])
    watch.close()
    after = traces_on(model, optimizer)
    assert after == before
    assert after["hooks"] == {}


class Interrupted(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.inner = mlp()
        self.error = error

    def forward(self, values: Tensor) -> Tensor:
        self.inner(values)
        raise self.error


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
@pytest.mark.parametrize("steps", [1, 2])
def test_an_interrupted_forward_leaves_no_trace(
    error: BaseException, steps: int, traces_on: Traces
) -> None:
    model = Interrupted(error)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = traces_on(model, optimizer)
    watch = full_watch(model, optimizer)
    for _ in range(steps):
        with pytest.raises(type(error)) as caught:
            model(torch.randn(5, 6))
        assert caught.value is error
    watch.close()
    assert traces_on(model, optimizer) == before


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_written_onto_the_users_objects(name: str, traces_on: Traces) -> None:
    model, optimizer = made(name)
    before, keys = traces_on(model, optimizer), list(model.state_dict())
    watch = full_watch(model, optimizer)
    for _ in range(3):
        during = traces_on(model, optimizer)
        assert during["attributes"] == before["attributes"]
        assert during["classes"] == before["classes"]
        assert list(model.state_dict()) == keys
        assert optimizer.state_dict().keys() == {"state", "param_groups"}
        train_steps(model, optimizer, name, 1, watch)
    watch.close()


def test_hooks_are_where_they_belong_while_it_watches(hooks_on: Traces) -> None:
    """Otherwise the two tests above would pass with a watch that does nothing."""
    model, optimizer = made("cnn")
    watch = full_watch(model, optimizer)
    owners = {place.rpartition(".")[0] for place in hooks_on(model, optimizer)}
    assert {"module (root)", "optimizer 0"} <= owners
    assert not {place for place in owners if place.startswith(("parameter", "every"))}
    assert watch.step == 0
    watch.close()


def test_hooks_of_the_user_stay(hooks_on: Traces) -> None:
    model, optimizer = made("mlp")
    called: list[str] = []
    model[0].register_forward_hook(lambda *_: called.append("module"))  # type: ignore[index]
    optimizer.register_step_post_hook(lambda *_: called.append("optimizer"))
    before = hooks_on(model, optimizer)
    with full_watch(model, optimizer, loss_fn=None):  # they run in probes, too
        train_steps(model, optimizer, "mlp", 2)
    assert hooks_on(model, optimizer) == before
    assert called == ["module", "optimizer"] * 2


def test_evaluation_uses_the_kernels_that_it_would_use_unwatched() -> None:
    """A hook on a layer would make the transformer leave its fused kernel."""
    kernels = []
    for watched in (False, True):
        model, optimizer = made("encoder")
        watch = full_watch(model, optimizer) if watched else None
        used: list[str] = []
        for steps in (0, 1, 1):
            train_steps(model, optimizer, "encoder", steps)
            with Operators() as counter:
                evaluation(Training("encoder", model, optimizer, watch))
            used += counter.names
        kernels.append(used)
        if watch is not None:
            watch.close()
    assert any("transformer_encoder_layer" in name for name in kernels[0])
    assert kernels[0] == kernels[1]


class Operators(TorchDispatchMode):
    """The names of the operators that run while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation there
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# --- Copies ------------------------------------------------------------------------------------


def by_deepcopy(model: nn.Module, folder: Path) -> nn.Module:
    return copy.deepcopy(model)


def by_pickle(model: nn.Module, folder: Path) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def by_file(model: nn.Module, folder: Path) -> nn.Module:
    torch.save(model, folder / "model.pt")
    loaded: nn.Module = torch.load(folder / "model.pt", weights_only=False)
    return loaded


def by_averaging(model: nn.Module, folder: Path) -> nn.Module:
    averaged: nn.Module = torch.optim.swa_utils.AveragedModel(model).module
    return averaged


def twice(model: nn.Module, folder: Path) -> nn.Module:
    return by_pickle(by_deepcopy(by_file(model, folder), folder), folder)


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_file, by_averaging, twice])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_a_copy_is_silent_and_trains(
    name: str,
    copied: Callable[[nn.Module, Path], nn.Module],
    tmp_path: Path,
    assert_identical: Compare,
) -> None:
    told = gradwatch.MemorySink()
    model, optimizer = made(name)
    watch = full_watch(model, optimizer, sinks=[told], log_every_n_steps=1, track_loss=False)
    train_steps(model, optimizer, name, 2)

    twin = copied(model, tmp_path)
    assert_identical(model.state_dict(), twin.state_dict())
    loss = Training(name, model, optimizer, watch).loss()  # the copy trains in the midst of a step
    before = {key: value.clone() for key, value in twin.state_dict().items()}
    losses = train_steps(twin, OPTIMIZERS["sgd"](twin), name, 5)
    assert all(torch.isfinite(item) for item in losses)
    assert any(not torch.equal(before[key], value) for key, value in twin.state_dict().items())
    loss.backward()
    optimizer.step()
    watch.close()

    assert watch.step == 3
    assert [report.info.batch_size for report in told.reports] == [5, 5, 5]


class Copying(nn.Module):
    """Copies a part of itself in each forward, when all hooks are on, and runs the copy."""

    def __init__(self, copied: Callable[[nn.Module, Path], nn.Module], folder: Path) -> None:
        super().__init__()
        self.inner = mlp()
        self.copied = copied
        self.folder = folder

    def forward(self, values: Tensor) -> Tensor:
        twin = self.copied(self.inner, self.folder)
        output: Tensor = self.inner(values)
        twin(torch.full((9, 6), 1e6)).sum().backward()
        return output


@pytest.mark.parametrize("copied", [by_deepcopy, by_pickle, by_file, twice])
def test_a_copy_made_in_the_midst_of_a_forward_is_silent(
    copied: Callable[[nn.Module, Path], nn.Module], tmp_path: Path
) -> None:
    model = Copying(copied, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    told = gradwatch.MemorySink()
    with full_watch(model, optimizer, sinks=[told], track_loss=False):
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    norms = [item.value for item in told.reports[0].measurements if item.metric[:4] == "acti"]
    assert len(norms) > 3
    assert max(norms) < 100
    assert told.reports[0].info.batch_size == 5


@pytest.mark.parametrize(
    "load", ["torch.load(path, weights_only=False)", "pickle.load(path.open('rb'))"]
)
def test_a_saved_model_loads_where_gradwatch_is_not_installed(load: str, tmp_path: Path) -> None:
    model, optimizer = made("mlp")
    watch = full_watch(model, optimizer)
    train_steps(model, optimizer, "mlp", 1)
    path = tmp_path / "model.pt"
    if load.startswith("torch"):
        torch.save(model, path)
    else:
        path.write_bytes(pickle.dumps(model))
    watch.close()
    script = f"""
import pathlib, pickle, sys
sys.modules["gradwatch"] = None  # every import of it fails
import torch
path = pathlib.Path({str(path)!r})
model = {load}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
assert not any("gradwatch" in name for name in sys.modules if name != "gradwatch")
print("trained")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("trained\n", "")


def test_a_copy_of_the_optimizer_is_silent() -> None:
    model, optimizer = made("mlp")
    watch = full_watch(model, optimizer)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.step()
    assert watch.step == 0
    watch.close()


def test_checkpoints_of_a_watched_training_load_into_a_plain_one(assert_identical: Compare) -> None:
    model, optimizer = made("cnn")
    with full_watch(model, optimizer):
        train_steps(model, optimizer, "cnn", 3)
        state, optimizer_state = model.state_dict(), optimizer.state_dict()
    plain_model, plain_optimizer = made("cnn")
    assert plain_model.load_state_dict(state, strict=True)
    plain_optimizer.load_state_dict(optimizer_state)
    assert_identical(plain_model.state_dict(), state)
