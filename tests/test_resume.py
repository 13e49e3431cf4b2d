"""A run that is stopped and continued tells what a run in one piece tells."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import gradwatch

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, EVERY, LOG = 40, 2, 8
SAVED, KILLED = 21, 30  # neither is a step of a report


def net() -> nn.Sequential:
    """Deep and badly initialised, so that advice is given."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def batches() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(8, 32, generator=generator)


class RunningMean(gradwatch.Monitor):
    """A monitor with a memory."""

    metrics = ("mean_norm",)

    def __init__(self) -> None:
        self.total = torch.zeros(())
        self.count = 0

    def read(self, view: gradwatch.StepView) -> gradwatch.Reading:
        self.total = self.total + view.gradient_norms.total()
        self.count += 1
        return gradwatch.Reading("mean_norm", self.total / self.count)

    def state_dict(self) -> dict[str, Any]:
        return {"total": float(self.total), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.total, self.count = torch.tensor(state["total"]), state["count"]


@dataclass(frozen=True)
class Checkpoint:
    """What a user would put on disk."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    watch: dict[str, Any]


def train(
    logdir: Path,
    *,
    start: int = 0,
    save_at: int | None = None,
    killed_at: int | None = None,
    checkpoint: Checkpoint | None = None,
    spoken: list[str] | None = None,
) -> Checkpoint | None:
    """Trains up to `STEPS`; returns the checkpoint of step `save_at`."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = islice(batches(), start, STEPS)
    saved = None
    watch = gradwatch.watch(
        model,
        optimizer,
        logdir=logdir,
        monitors=[*gradwatch.presets.standard(), RunningMean()],
        every_n_steps=EVERY,
        log_every_n_steps=LOG,
        track_loss=True,
        track_clipping=True,
        budget=None,  # or the clock would decide when a note on a probe is told
        on_error="raise",
        on_recommendation=lambda item: None if spoken is None else spoken.append(item.knob),
    )
    if checkpoint is not None:
        model.load_state_dict(checkpoint.model)
        optimizer.load_state_dict(checkpoint.optimizer)
        watch.load_state_dict(json.loads(json.dumps(checkpoint.watch)))
    for step, batch in enumerate(data, start):
        if step == save_at:
            saved = Checkpoint(
                copy.deepcopy(model.state_dict()),
                copy.deepcopy(optimizer.state_dict()),
                watch.state_dict(),
            )
        if step == killed_at:
            watch._pipeline._pending.clear()  # what a killed process takes with it
            watch.close()
            return saved
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    watch.close()
    return saved


def drawn(logdir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(logdir), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(item.step, item.value) for item in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


@pytest.fixture
def two_runs(tmp_path: Path, next_second: Callable[[], None]) -> tuple[Path, Path]:
    """One run in one piece, and one that was killed some steps after its checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, save_at=SAVED)
    checkpoint = train(broken, save_at=SAVED, killed_at=KILLED)
    next_second()
    train(broken, start=SAVED, checkpoint=checkpoint)
    return whole, broken


def test_the_record_has_every_number_once(two_runs: tuple[Path, Path]) -> None:
    whole, broken = (gradwatch.read(logdir) for logdir in two_runs)
    assert broken.header.first_step == SAVED
    assert broken.reports == whole.reports
    steps = [step for step, _ in broken.values("loss")]
    assert steps == list(range(0, STEPS, EVERY))
    assert len(broken.values("mean_norm")) == len(steps)


def test_tensorboard_shows_every_point_once(two_runs: tuple[Path, Path]) -> None:
    whole, broken = (drawn(logdir) for logdir in two_runs)
    assert whole == broken
    steps = [step for step, _ in whole["gradwatch/loss"]]
    assert steps == list(range(0, STEPS, EVERY))


def test_advice_that_was_given_before_is_not_given_again(tmp_path: Path) -> None:
    before: list[str] = []
    after: list[str] = []
    checkpoint = train(tmp_path, save_at=SAVED, killed_at=SAVED, spoken=before)
    train(tmp_path, start=SAVED, checkpoint=checkpoint, spoken=after)
    assert "init" in before
    assert after == []
