"""Books that a training loop keeps by itself, in float64, and the reports held against them.

A loop writes down what the optimizer is about to consume, the parameters before and after, and
what the layers put out. `agrees` compares every report with them and fills the matrix.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import SGD, Optimizer

import gradwatch

if TYPE_CHECKING:
    from tests.modes.conftest import Cell

BATCH = 5
ROOT = "root"
Tensors = dict[str, Tensor]


@dataclass
class Entry:
    """What one optimizer step should be reported as."""

    used: Tensors
    moved: Tensors
    activations: dict[str, float]
    lrs: tuple[float, ...]
    loss: float | None = None
    batch_size: int | None = BATCH
    raw: Tensors | None = None
    skipped: bool = False
    epoch: float | None = None


@dataclass
class Books:
    """A watched model and the float64 records of its steps.

    `called` is what the loop calls and `watched` what the watch gets, where that is not the model
    itself. `hears` says which layers the test itself may have hooks on.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    called: Any = None
    watched: Any = None
    hears: Callable[[str], bool] = lambda name: True

    def __post_init__(self) -> None:
        self.told = gradwatch.MemorySink()
        self.entries: list[Entry] = []
        self.used: Tensors = {}
        self.before: Tensors = {}
        self.activations: dict[str, float] = {}
        self.called = self.model if self.called is None else self.called
        self._open = False
        self._listen()
        settings: dict[str, Any] = {
            "track_loss": True,
            "track_clipping": True,
            "on_error": "raise",
            "every_n_steps": 1,
            "log_every_n_steps": 1,
        }
        self.watch = gradwatch.watch(
            self.called if self.watched is None else self.watched,
            self.optimizers if len(self.optimizers) > 1 else self.optimizers[0],
            sinks=[self.told],
            **(settings | self.options),
        )

    @property
    def optimizer(self) -> Optimizer:
        return self.optimizers[0]

    def named(self, optimizer: Optimizer | None = None) -> Tensors:
        """The parameters of one optimizer, or of all."""
        names = {id(item): name for name, item in self.model.named_parameters()}
        found: Tensors = {}
        for item in [optimizer] if optimizer is not None else self.optimizers:
            for number, group in enumerate(item.param_groups):
                for place, parameter in enumerate(group["params"]):
                    name = names.get(id(parameter), f"group{number}.{place}")
                    found[name] = parameter
        return found

    def gradients(self, scale: float = 1.0, optimizer: Optimizer | None = None) -> Tensors:
        """Copies of the gradients in double precision, divided by the loss scale."""
        return {
            name: item.grad.to_dense().detach().to(wide(item), copy=True) / scale
            for name, item in self.named(optimizer).items()
            if item.grad is not None
        }

    def about_to_step(self, scale: float = 1.0, optimizer: Optimizer | None = None) -> None:
        """To be called right before the step, and from the first evaluation of a closure."""
        self.used.update(self.gradients(scale, optimizer))
        parameters = self.named(optimizer)
        self.before.update(
            {name: item.detach().to(wide(item), copy=True) for name, item in parameters.items()}
        )

    def stepped(self, **expected: Any) -> None:
        """To be called right after the step: writes it into the books."""
        now = self.named()
        moved = {
            name: now[name].detach().to(wide(now[name])) - self.before[name] for name in self.used
        }
        lrs = tuple(float(group["lr"]) for item in self.optimizers for group in item.param_groups)
        self.entries.append(Entry(self.used, moved, self.activations, lrs, **expected))
        self.forget()

    def forget(self) -> None:
        """What led here was in vain."""
        self.used, self.before, self.activations = {}, {}, {}

    def step(self, scale: float = 1.0, **expected: Any) -> None:
        """One plain step with the gradients that are there."""
        self.about_to_step(scale)
        self.optimizer.step()
        self.stepped(**expected)

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward that is trained on."""
        self._open = True
        try:
            yield
        except BaseException:
            self.activations = {}
            raise
        finally:
            self._open = False

    def loss(self, batch: int = BATCH, values: Any = None) -> Tensor:
        """The loss of a new batch."""
        with self.forward():
            output: Tensor = self.called(torch.randn(batch, 6) if values is None else values)
        return output.float().square().mean()

    def backward(self, batch: int = BATCH, values: Any = None) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(batch, values)
        loss.backward()
        return loss.item()

    def train(self, steps: int = 3) -> None:
        """Plain steps: zero_grad, forward, backward, step."""
        for _ in range(steps):
            loss = self.backward()
            self.step(loss=loss)

    def _listen(self) -> None:
        for name, module in self.model.named_modules():
            owns = any(True for _ in module.parameters(recurse=False))
            if owns and "parametrizations" not in name and self.hears(name):
                module.register_forward_hook(self._hook(name or ROOT))

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._open:
                self.activations[name] = output_norm(output)

        return hook


def output_norm(output: Any) -> float:
    """sqrt(mean over the first dimension of ||output||²) in double precision."""
    while not isinstance(output, (Tensor, PackedSequence)):
        output = output[0]
    values = output.detach() if isinstance(output, Tensor) else output.data.detach()
    return math.sqrt(float(values.double().flatten(1).square().sum(1).mean()))


def wide(item: Tensor) -> torch.dtype:
    return torch.complex128 if item.is_complex() else torch.float64


def size(values: Tensors) -> float:
    """The norm of all of them together."""
    return math.sqrt(sum(float(item.abs().square().sum()) for item in values.values()))


def sizes(values: Tensors) -> dict[str, float]:
    """The norm of all of them together and of each."""
    return {"model": size(values)} | {name: size({name: item}) for name, item in values.items()}


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


MakeBooks = Callable[..., Books]


@pytest.fixture
def books(one_thread: None) -> MakeBooks:
    """Watch a model and keep books: `books(optimizer=SGD, model=None, **how)`.

    `optimizer` is a class, or a function that makes one or several from the model. `how` are
    `called`, `watched` and `hears` of the books, and options of the watch.
    """

    def make(
        optimizer: Callable[..., Any] = SGD,
        model: nn.Module | None = None,
        *,
        called: Any = None,
        watched: Any = None,
        hears: Callable[[str], bool] = lambda name: True,
        **options: Any,
    ) -> Books:
        trained = mlp() if model is None else model
        if isinstance(optimizer, type):
            made = optimizer(trained.parameters(), lr=0.1)
        else:
            made = optimizer(trained)
        optimizers = made if isinstance(made, list) else [made]
        return Books(trained, optimizers, options, called, watched, hears)

    return make


# --- Reports against books ---------------------------------------------------------------------

Agrees = Callable[..., None]


@pytest.fixture
def agrees(cell: "Cell") -> Agrees:
    """Hold all reports against the books: `agrees(mode, run, batch_size="a note that says why")`.

    A quantity that is given by name must be absent, and a note of each report contain the text.
    """

    def compare(mode: str, run: Books, **unavailable: str) -> None:
        run.watch.close()
        assert not run.watch.failures
        assert run.watch.step == len(run.entries)
        assert [report.step for report in run.told.reports] == list(range(len(run.entries)))
        for report, entry in zip(run.told.reports, run.entries, strict=True):
            assert report.info.skipped == entry.skipped
            if entry.skipped:
                assert_nothing_of_the_step(report, entry)
                continue
            for quantity, (measured, expected) in quantities(report, entry).items():
                if quantity in unavailable:
                    cell.unavailable(mode, quantity, report, unavailable[quantity])
                else:
                    cell.equal(mode, quantity, measured, expected)
            assert_what_follows(report, entry, run)

    return compare


def quantities(report: gradwatch.Report, entry: Entry) -> dict[str, tuple[Any, Any]]:
    """Of each quantity of the matrix, what was measured and what is expected."""
    raw = entry.used if entry.raw is None else entry.raw
    return {
        "gradient_norm_used": (scoped(report, "gradient_norm_used"), sizes(entry.used)),
        "gradient_norm": (scoped(report, "gradient_norm"), sizes(raw)),
        "update_norm": (report.value("update_norm"), size(entry.moved)),
        "activation_norm": (scoped(report, "activation_norm"), entry.activations),
        "loss": (report.info.loss, entry.loss),
        "batch_size": (report.info.batch_size, entry.batch_size),
        "lr": (report.info.lr, max(entry.lrs)),
    }


def scoped(report: gradwatch.Report, metric: str) -> dict[str, float]:
    found = [item for item in report.measurements if item.metric == metric]
    values = {item.scope: item.value for item in found}
    assert len(values) == len(found), f"{metric} has a scope twice"
    return values


def assert_nothing_of_the_step(report: gradwatch.Report, entry: Entry) -> None:
    """A step that the loss scaler skipped has no gradient to speak of."""
    assert size(entry.moved) == 0
    for metric in ("gradient_norm_used", "gradient_norm", "clip_coefficient", "update_norm"):
        assert report.value(metric) is None


def assert_what_follows(report: gradwatch.Report, entry: Entry, run: Books) -> None:
    """Everything that is computed from the quantities of the matrix."""
    info = report.info
    assert size(entry.moved) > 0
    assert info.step == report.step
    assert info.epoch == entry.epoch
    assert info.lrs == pytest.approx(entry.lrs, rel=1e-6)
    assert info.optimizer == "+".join(dict.fromkeys(type(item).__name__ for item in run.optimizers))
    assert scoped(report, "update_ratio").keys() == {"model", *entry.moved}
    raw, used = report.value("gradient_norm"), report.value("gradient_norm_used")
    if raw is None or used is None:
        assert report.value("clip_coefficient") is info.grads_clipped is None
    else:
        assert report.value("clip_coefficient") == pytest.approx(used / raw, rel=1e-5)
        assert info.grads_clipped == (used / raw < 0.999)
    ratio = report.value("lr_batch_ratio")
    if info.batch_size is None:
        assert ratio is None
    else:
        assert ratio == pytest.approx(entry.lrs[0] / info.batch_size, rel=1e-5)
