"""Nothing stays behind, whatever happens to the training or to the adapter."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch.errors import AttachError
from gradwatch_lightning import GradwatchCallback
from gradwatch_lightning.fit import Fit

pytest.importorskip("lightning")

BATCHES = 6  # of the fixture `data`
EVERY: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("manual", [False, True])
def test_an_interrupted_training_leaves_no_hooks(
    pl: Any,
    told: gradwatch.MemorySink,
    traces_on: Any,
    tmp_path: Path,
    error: type[BaseException],
    manual: bool,
    data: Any,
    module: Any,
    trainer: Any,
    values: Any,
) -> None:
    model = module(pl, manual=manual)
    original = type(model).training_step

    def failing(self: Any, batch: Any, index: int) -> Any:
        if index == 3:
            self.net(batch[0])
            raise error("stop")
        return original(self, batch, index)

    type(model).training_step = failing
    before = traces_on(model)
    callback = GradwatchCallback(
        sinks=[told], logdir=tmp_path, every_n_steps=1, log_every_n_steps=50, on_error="raise"
    )
    boss = trainer(pl, callback)
    with pytest.raises((ValueError, SystemExit)):
        boss.fit(model, data())
    after = traces_on(model, *boss.optimizers)
    assert after["hooks"] == before["hooks"]
    assert after["torch"] == before["torch"]
    assert sorted(values(told)) == [0, 1, 2]
    assert len(gradwatch.read(tmp_path).values("loss")) == 3
    assert callback.summary().step == 2


@pytest.mark.parametrize("where", ["batch_begins", "about_to_step", "_stepped"])
def test_a_defect_of_the_adapter_does_not_stop_the_training(
    pl: Any,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    traces_on: Any,
    data: Any,
    module: Any,
    trainer: Any,
) -> None:
    def broken(self: Any, *args: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Fit, where, broken)
    model = module(pl)
    before = traces_on(model)["hooks"]
    boss = trainer(pl, GradwatchCallback(every_n_steps=1, log_every_n_steps=1))
    boss.fit(model, data())
    assert boss.global_step == BATCHES
    assert caplog.text.count("a defect") == 1
    assert traces_on(model, *boss.optimizers)["hooks"] == before


def test_a_defect_at_the_start_does_not_stop_the_training(
    pl: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    data: Any,
    module: Any,
    trainer: Any,
) -> None:
    def broken(trainer: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("gradwatch_lightning.fit.train_size", broken)
    boss = trainer(pl, GradwatchCallback())
    boss.fit(module(pl), data())
    assert boss.global_step == BATCHES
    assert caplog.text.count("a defect") == 1


def test_a_watch_that_is_there_already_is_an_error_before_step_0(
    pl: Any, data: Any, module: Any, trainer: Any
) -> None:
    def also_watched(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        watches.append(gradwatch.watch(self, optimizer))
        return optimizer

    watches: list[gradwatch.Watch] = []
    boss = trainer(pl, GradwatchCallback())
    with pytest.raises(AttachError, match="watched already"):
        boss.fit(module(pl, configure_optimizers=also_watched), data())
    watches[0].close()
    assert boss.global_step == 0


def test_a_recommendation_may_stop_the_training(
    pl: Any, data: Any, module: Any, trainer: Any, always: Any
) -> None:
    callback = GradwatchCallback(rules=[always], on_recommendation="raise", **EVERY)
    with pytest.raises(gradwatch.AdviceError):
        trainer(pl, callback).fit(module(pl), data())


class Mine(GradwatchCallback):
    """A subclass of the user."""

    extra = 3


@pytest.mark.parametrize("cls", [GradwatchCallback, Mine])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copy_made_in_a_training_watches_its_own(
    pl: Any,
    cls: type[GradwatchCallback],
    how: Callable[[Any], Any],
    data: Any,
    module: Any,
    trainer: Any,
) -> None:
    copies = []

    def make_a_copy(self: Any, *args: Any) -> None:
        copies.append(how(callback))

    callback = cls(**EVERY)
    boss = trainer(pl, callback, limit_train_batches=2)
    boss.fit(module(pl, on_train_batch_end=make_a_copy), data())
    made = copies[0]
    assert isinstance(made, cls)
    assert isinstance(made, pl.Callback)
    assert made.watch is None
    assert made.state_dict()["watch"]["step"] == 1
    trainer(pl, made, limit_train_batches=3).fit(module(pl), data())
    assert made.summary().step == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_processes_that_lightning_starts_itself(
    pl: Any, tmp_path: Path, data: Any, module: Any, trainer: Any
) -> None:
    """The callback travels into them; what it measured is in the record."""
    callback = GradwatchCallback(tmp_path, **EVERY)
    boss = trainer(pl, callback, strategy="ddp_fork", devices=2)
    boss.fit(module(pl), data())
    losses = gradwatch.read(tmp_path).values("loss")
    assert [step for step, _ in losses] == list(range(BATCHES // 2))
    assert callback.watch is None
