"""Small Lightning trainings, and what they leave in loggers."""

import csv
import importlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch

BATCHES, SIZE = 6, 4
NOISE: Final = (
    ".*does not have many workers",
    ".*isinstance.treespec, LeafSpec",
    ".*smaller than the logging interval",
    ".*ended before the epoch ended and your dataloader",
    "Checkpoint directory .* exists and is not empty",
    ".*in eval mode at the start of training",
    ".*lr_scheduler.step.* before .*optimizer.step",
    "You defined a `validation_step` but have no",
)
"""What Lightning says of trainings as small as these."""


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for message in NOISE:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    """All of these are tiny."""


@pytest.fixture(autouse=True)
def own_sigint() -> Iterator[None]:
    """Lightning ignores Ctrl-C after the first one, for good."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def pl() -> Any:
    return importlib.import_module("lightning.pytorch")


@pytest.fixture
def told() -> gradwatch.MemorySink:
    return gradwatch.MemorySink()


@pytest.fixture
def data() -> Callable[..., Any]:
    """The batches, the same at each call: `data(batches, all_equal=False)`."""
    return some_data


@pytest.fixture
def module() -> Callable[..., Any]:
    """A small LightningModule: `module(pl, manual=False, noisy=False, **methods)`."""
    return small_module


@pytest.fixture
def trainer() -> Callable[..., Any]:
    """A quiet Trainer: `trainer(pl, *callbacks, **options)`."""
    return quiet_trainer


@pytest.fixture
def values() -> Callable[..., Any]:
    """The curve of a metric by step: `values(told, metric)`."""
    return curve


@pytest.fixture
def numbers() -> Callable[..., Any]:
    """All that reports measured, by what it is: `numbers(reports)`."""
    return all_numbers


@pytest.fixture
def board_points() -> Callable[..., Any]:
    """The curves of gradwatch in a TensorBoardLogger: `board_points(logger)`."""
    return read_board


@pytest.fixture
def csv_rows() -> Callable[..., Any]:
    """The rows of a CSVLogger: `csv_rows(logger)`."""
    return read_csv


@pytest.fixture
def csv_values() -> Callable[..., Any]:
    """One curve of a CSVLogger by step: `csv_values(logger, tag)`."""
    return read_curve


@pytest.fixture
def always() -> gradwatch.Rule:
    """A rule that always gives the same two recommendations."""
    return Always()


def some_data(batches: int = BATCHES, *, all_equal: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(batches * SIZE, 6, generator=generator)
    if all_equal:
        values = values[:SIZE].repeat(batches, 1)
    return DataLoader(TensorDataset(values, values[:, :3].clone()), batch_size=SIZE)


def small_module(pl: Any, *, manual: bool = False, noisy: bool = False, **hooks: Any) -> Any:
    """A small module; `hooks` replace or add methods."""

    class Small(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            drop = [nn.BatchNorm1d(16), nn.Dropout(0.3)] if noisy else []
            self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), *drop, nn.Linear(16, 3))
            self.lr = 0.05
            self.batch_size = SIZE
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, index: int) -> Any:
            values, wanted = batch
            loss = (self.net(values) - wanted).square().mean()
            self.log("train_loss", loss)
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                return None
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean())

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

        def train_dataloader(self) -> Any:
            return DataLoader(some_data().dataset, batch_size=self.batch_size)

    for name, method in hooks.items():
        setattr(Small, name, method)
    return Small()


def quiet_trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings | options)


def curve(told: gradwatch.MemorySink, metric: str = "loss") -> dict[int, float]:
    return {
        item.step: item.value
        for report in told.reports
        for item in report.measurements
        if item.metric == metric and item.scope == "model"
    }


def all_numbers(reports: Any) -> dict[Any, Any]:
    """Everything that was measured, by what it is; timing and grouping aside."""
    found: dict[Any, Any] = {}
    for report in reports:
        for step in report.steps:
            assert ("step", step.step) not in found
            found["step", step.step] = repr(step)
        for item in report.measurements:
            key = (item.metric, item.scope, item.step)
            assert key not in found
            found[key] = item.value
    return found


class Always(gradwatch.Rule):
    """Two recommendations, always the same."""

    def advise(self, history: Any) -> Any:
        yield gradwatch.Recommendation(knob="clip", reason="too large", severity="advice")
        yield gradwatch.Recommendation(knob="width", reason="too narrow", severity="info")


def read_board(logs: Any) -> dict[str, list[tuple[int, float]]]:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = board.EventAccumulator(logs.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(item.step, item.value) for item in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("gradwatch")
    }


def read_csv(logs: Any) -> list[dict[str, str]]:
    logs.save()
    with Path(logs.log_dir, "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_curve(logs: Any, tag: str = "gradwatch/loss") -> dict[int, float]:
    found: dict[int, float] = {}
    for row in read_csv(logs):
        if row.get(tag):
            assert int(row["step"]) not in found
            found[int(row["step"])] = float(row[tag])
    return found
