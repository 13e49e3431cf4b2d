"""Which steps count: those of the training, each of them once."""

import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

import gradwatch
from gradwatch_lightning import GradwatchCallback

pytest.importorskip("lightning")

BATCHES, SIZE = 6, 4  # of the fixture `data`
EVERY: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}


def test_a_learning_rate_finder_is_not_watched(
    pl: Any,
    told: gradwatch.MemorySink,
    tmp_path: Path,
    traces_on: Any,
    data: Any,
    module: Any,
    trainer: Any,
    values: Any,
) -> None:
    callback = GradwatchCallback(sinks=[told], **EVERY)
    model = module(pl)
    boss = trainer(pl, callback, default_root_dir=tmp_path, max_epochs=2)
    before = traces_on(model)["hooks"]
    finders = importlib.import_module("lightning.pytorch.tuner")
    finders.Tuner(boss).lr_find(model, data(), num_training=4, min_lr=1e-3)
    assert told.reports == []
    assert traces_on(model, *boss.optimizers)["hooks"] == before
    boss.fit(model, data())
    assert sorted(values(told)) == list(range(2 * BATCHES))
    assert told.reports[0].info.lr == model.lr


def test_a_batch_size_finder_is_not_watched(
    pl: Any,
    told: gradwatch.MemorySink,
    tmp_path: Path,
    data: Any,
    module: Any,
    trainer: Any,
    values: Any,
) -> None:
    callback = GradwatchCallback(sinks=[told], **EVERY)
    model = module(pl, val_dataloader=lambda self: data(1))
    boss = trainer(pl, callback, default_root_dir=tmp_path)
    finders = importlib.import_module("lightning.pytorch.tuner")
    finders.Tuner(boss).scale_batch_size(model, init_val=2, max_trials=2, steps_per_trial=1)
    assert told.reports == []
    boss.fit(model)
    assert told.reports[0].info.batch_size == model.batch_size
    assert sorted(values(told)) == list(range(math.ceil(BATCHES * SIZE / model.batch_size)))


@pytest.mark.parametrize("first", [True, False])
def test_finders_that_are_callbacks_are_not_watched(
    pl: Any,
    told: gradwatch.MemorySink,
    tmp_path: Path,
    first: bool,
    data: Any,
    module: Any,
    trainer: Any,
    values: Any,
) -> None:
    callback = GradwatchCallback(sinks=[told], **EVERY)
    finder = pl.callbacks.LearningRateFinder(num_training_steps=4, min_lr=1e-3)
    order = [callback, finder] if first else [finder, callback]
    boss = trainer(pl, *order, default_root_dir=tmp_path)
    boss.fit(module(pl), data())
    # Older releases of Lightning count the batches of the finder towards the epoch.
    trained = BATCHES if boss.global_step == BATCHES else boss.global_step
    assert sorted(values(told)) == list(range(trained))


@pytest.mark.parametrize("settings", [EVERY, EVERY | {"log_every_n_steps": 50}])
def test_a_finder_between_two_epochs_leaves_no_trace(
    pl: Any,
    tmp_path: Path,
    settings: dict[str, Any],
    csv_values: Any,
    data: Any,
    module: Any,
    trainer: Any,
) -> None:
    class Later(pl.callbacks.LearningRateFinder):  # type: ignore[misc]
        def on_fit_start(self, *args: Any) -> None:
            pass

        def on_train_epoch_start(self, boss: Any, model: Any) -> None:
            if boss.current_epoch == 1:
                self.lr_find(boss, model)

    callback = GradwatchCallback(tmp_path / "run", **settings)
    finder = Later(num_training_steps=8, min_lr=1e-3)
    logs = pl.loggers.CSVLogger(tmp_path)
    boss = trainer(pl, callback, finder, default_root_dir=tmp_path, max_epochs=4, logger=logs)
    boss.fit(module(pl), data())
    recorded = gradwatch.read(tmp_path / "run")
    sampled = list(range(0, 4 * BATCHES, settings["every_n_steps"]))
    assert [step for step, _ in recorded.values("loss")] == sampled
    assert [info.step for report in recorded.reports for info in report.steps] == sampled
    assert csv_values(logs) == pytest.approx(dict(recorded.values("loss")))


def test_the_sanity_check_is_no_training(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    trainer(pl, GradwatchCallback(sinks=[told], **EVERY), num_sanity_val_steps=2).fit(
        module(pl), data(), data()
    )
    assert told.reports[0].info.batch_size == SIZE
    assert len(told.reports) == BATCHES


def test_callbacks_of_lightning_that_change_the_training(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    """One copies the module, one changes how many batches make a step."""
    others = [
        pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
        pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2}),
    ]
    callback = GradwatchCallback(sinks=[told], **EVERY)
    trainer(pl, *others, callback, max_epochs=3).fit(module(pl), data())
    sizes = [report.info.batch_size for report in told.reports]
    assert sizes == [SIZE] * BATCHES + [2 * SIZE] * BATCHES
    assert told.run is not None
    assert told.run.model.planned_steps is None


def test_fast_dev_run(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any, values: Any
) -> None:
    trainer(pl, GradwatchCallback(sinks=[told], **EVERY), fast_dev_run=True).fit(
        module(pl), data(), data()
    )
    assert sorted(values(told)) == [0]


def test_steps_that_are_not_sampled_are_left_alone(
    pl: Any,
    told: gradwatch.MemorySink,
    monkeypatch: pytest.MonkeyPatch,
    data: Any,
    module: Any,
    trainer: Any,
) -> None:
    opened = []
    original = gradwatch.Watch.forward_begins

    def spy(self: Any, *args: Any) -> None:
        opened.append(self.step)
        original(self, *args)

    monkeypatch.setattr(gradwatch.Watch, "forward_begins", spy)
    callback = GradwatchCallback(sinks=[told], every_n_steps=3, log_every_n_steps=6)
    trainer(pl, callback, max_epochs=2).fit(module(pl), data())
    assert opened == [0, 3, 6, 9]
    assert [[step.step for step in report.steps] for report in told.reports] == [[0], [3, 6], [9]]


def test_a_second_fit_of_the_same_trainer_goes_on(
    pl: Any,
    told: gradwatch.MemorySink,
    tmp_path: Path,
    data: Any,
    module: Any,
    trainer: Any,
    values: Any,
) -> None:
    callback = GradwatchCallback(sinks=[told], logdir=tmp_path, **EVERY)
    boss, model = trainer(pl, callback), module(pl)
    boss.fit(model, data())
    boss.fit_loop.max_epochs = 2
    boss.fit(model, data())
    assert sorted(values(told)) == list(range(2 * BATCHES))
    assert len(gradwatch.read(tmp_path).values("loss")) == 2 * BATCHES


def test_a_fit_of_another_trainer_begins_at_0(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any, values: Any
) -> None:
    callback = GradwatchCallback(sinks=[told], **EVERY)
    trainer(pl, callback).fit(module(pl), data())
    first = callback.watch
    trainer(pl, callback, limit_train_batches=2).fit(module(pl), data())
    assert callback.watch is not first
    assert sorted(values(told)) == [0, 1]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("without", [0, 1])
def test_a_batch_without_a_loss_counts_no_samples(
    pl: Any, told: gradwatch.MemorySink, without: int, data: Any, module: Any, trainer: Any
) -> None:
    def training_step(self: Any, batch: Any, index: int) -> Any:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        return None if index % 2 == without else loss

    callback = GradwatchCallback(sinks=[told], **EVERY)
    boss = trainer(pl, callback, accumulate_grad_batches=2)
    boss.fit(module(pl, training_step=training_step), data())
    assert [report.info.batch_size for report in told.reports] == [SIZE] * 3


def test_a_module_that_optimizes_nothing_is_not_watched(
    pl: Any, told: gradwatch.MemorySink, data: Any, module: Any, trainer: Any
) -> None:
    callback = GradwatchCallback(sinks=[told], **EVERY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        trainer(pl, callback).fit(module(pl, configure_optimizers=lambda self: None), data())
    assert told.reports == []
    assert callback.watch is None


def test_a_trial_run_leaves_the_record_alone(
    pl: Any, tmp_path: Path, data: Any, module: Any, trainer: Any
) -> None:
    callback = GradwatchCallback(tmp_path, **EVERY)
    trainer(pl, callback).fit(module(pl), data())
    before = gradwatch.read(tmp_path).reports
    trainer(pl, callback, fast_dev_run=True).fit(module(pl), data())
    assert gradwatch.read(tmp_path).reports == before
