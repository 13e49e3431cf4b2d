"""A run that goes on from a checkpoint is one run."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

BATCHES = 6  # of the fixture `data`
EVERY: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}


def plain_types_only(boss: Any) -> dict[str, bool]:
    """Older releases of Lightning do not have the option."""
    name = "weights_only"
    return {name: True} if name in inspect.signature(boss.fit).parameters else {}


def save_at(step: int, path: Path) -> Callable[..., None]:
    def on_train_batch_end(self: Any, *args: Any) -> None:
        if self.trainer.global_step == step:
            self.trainer.save_checkpoint(path)

    return on_train_batch_end


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("every", "log_every"), [(1, 1), (2, 4), (1, 50)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    pl: Any,
    tmp_path: Path,
    manual: bool,
    every: int,
    log_every: int,
    board_points: Any,
    data: Any,
    module: Any,
    numbers: Any,
    trainer: Any,
    next_second: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, but for what follows an eigenvector, which no checkpoint holds."""
    monkeypatch.setattr("gradwatch.presets.curvature", list)
    half = 15  # in the midst of the third epoch, where Lightning starts the data anew
    recorded, drawn = [], []
    for name, stops in (("whole", [2 * half]), ("parts", [half, 2 * half])):
        state = None
        for steps in stops:
            callback = GradwatchCallback(
                tmp_path / name,
                every_n_steps=every,
                log_every_n_steps=log_every,
                on_error="raise",
                budget=None,
            )
            logs = pl.loggers.TensorBoardLogger(tmp_path / f"{name} drawn", version=0)
            saved = tmp_path / f"{name}.ckpt"
            boss = trainer(pl, callback, max_epochs=-1, max_steps=steps, logger=logs)
            model = module(pl, manual=manual, on_train_batch_end=save_at(half, saved))
            boss.fit(model, data(all_equal=True), ckpt_path=state, **plain_types_only(boss))
            state = saved
            next_second()
        recorded.append(gradwatch.read(tmp_path / name))
        drawn.append(board_points(logs))
    whole, parts = (numbers(run.reports) for run in recorded)
    assert parts == whole
    probed = {"gradient_square", "smoothness_secant"} if not manual else {"gradient_square"}
    assert probed <= {key[0] for key in whole}
    if every == 1:  # so many readings that there is a mean of them
        assert whole["stationarity_recent", "model", 2 * half - 1] is not None
    assert len([key for key in whole if key[0] == "loss"]) == math.ceil(2 * half / every)
    assert recorded[1].header.model == recorded[0].header.model
    assert drawn[1] == drawn[0]
    assert all(len({step for step, _ in points}) == len(points) for points in drawn[1].values())


def test_a_killed_run_loses_nothing_before_its_checkpoint(
    pl: Any, tmp_path: Path, data: Any, module: Any, trainer: Any
) -> None:
    """The samples that wait for their report when a checkpoint is saved are reported then."""

    def die(self: Any, *args: Any) -> None:
        if self.trainer.global_step == 5:
            self.trainer.save_checkpoint(tmp_path / "state.ckpt")
            raise ProcessLookupError

    class Lost(gradwatch.Sink):
        """What has been told when the process is killed."""

        def write(self, report: gradwatch.Report) -> None:
            seen.update(step.step for step in report.steps if open_)

    open_, seen = [True], set[int]()

    def killed(self: Any, *args: Any) -> None:
        open_.clear()

    model = module(pl, on_train_batch_end=die)
    settings: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 50, "on_error": "raise"}
    callback = GradwatchCallback(sinks=[Lost()], **settings)
    callback_after = type("Dead", (pl.Callback,), {"on_exception": killed})()
    with pytest.raises(ProcessLookupError):
        trainer(pl, callback_after, callback).fit(model, data())
    assert seen == {0, 1, 2, 3, 4}


def test_a_state_is_loaded_safely_and_is_plain(
    pl: Any, tmp_path: Path, data: Any, module: Any, trainer: Any
) -> None:
    callback = GradwatchCallback(**EVERY)
    boss = trainer(pl, callback)
    boss.fit(module(pl), data())
    boss.save_checkpoint(tmp_path / "state.ckpt")
    loaded = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert loaded["callbacks"]["gradwatch"]["watch"]["step"] == BATCHES


def test_a_checkpoint_without_it_starts_at_the_step_of_the_trainer(
    pl: Any,
    told: gradwatch.MemorySink,
    tmp_path: Path,
    data: Any,
    module: Any,
    trainer: Any,
    values: Any,
) -> None:
    boss = trainer(pl)
    boss.fit(module(pl), data())
    boss.save_checkpoint(tmp_path / "state.ckpt")
    callback = GradwatchCallback(sinks=[told], **EVERY)
    trainer(pl, callback, max_epochs=2).fit(module(pl), data(), ckpt_path=tmp_path / "state.ckpt")
    assert sorted(values(told)) == list(range(BATCHES, 2 * BATCHES))


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "another version": lambda state: state | {"watch": state["watch"] | {"version": 99}},
    "nothing": lambda state: {},
    "no watch": lambda state: {"global_step": BATCHES},
    "a list": lambda state: [1, 2],
    "no parameters": lambda state: state | {"watch": state["watch"] | {"model": {}}},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_does_not_stop_the_training(
    pl: Any,
    told: gradwatch.MemorySink,
    damage: str,
    data: Any,
    module: Any,
    trainer: Any,
    values: Any,
) -> None:
    callback = GradwatchCallback(sinks=[told], every_n_steps=1, log_every_n_steps=1)
    boss, model = trainer(pl, callback), module(pl)
    boss.fit(model, data())
    callback.load_state_dict(DAMAGES[damage](callback.state_dict()))
    boss.fit_loop.max_epochs = 2
    boss.fit(model, data())
    assert sorted(values(told)) == list(range(2 * BATCHES))
    assert callback.watch is not None
    assert callback.watch.failures == {}
