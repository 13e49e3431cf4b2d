"""gradwatch in Lightning: the callback in real Trainers of both packages."""

import copy
import importlib
import logging
import math
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch.errors import AttachError, ConfigError, MissingExtraError, RecordError
from gradwatch_lightning import GradwatchCallback
from gradwatch_lightning.fit import Fit

pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_sigint"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended and your dataloader"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.* before .*optimizer.step"),
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

BATCHES = 6
SIZE = 4
EVERY: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1, "on_error": "raise"}


@pytest.fixture
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


# --- Trainings ---------------------------------------------------------------------------------


def data(batches: int = BATCHES, *, all_equal: bool = False) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(batches * SIZE, 6, generator=generator)
    if all_equal:
        values = values[:SIZE].repeat(batches, 1)
    return DataLoader(TensorDataset(values, values[:, :3].clone()), batch_size=SIZE)


def module(pl: Any, *, manual: bool = False, noisy: bool = False, **hooks: Any) -> Any:
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
            return DataLoader(data().dataset, batch_size=self.batch_size)

    for name, method in hooks.items():
        setattr(Small, name, method)
    return Small()


def trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
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


def values(told: gradwatch.MemorySink, metric: str = "loss") -> dict[int, float]:
    return {
        item.step: item.value
        for report in told.reports
        for item in report.measurements
        if item.metric == metric and item.scope == "model"
    }


def numbers(reports: Any) -> dict[Any, Any]:
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


# --- Both packages -----------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_it_watches_in_the_trainer_of_either_package(
    package: str, told: gradwatch.MemorySink
) -> None:
    pl = pytest.importorskip(package)
    callback = GradwatchCallback(sinks=[told], **EVERY)
    assert isinstance(callback, pl.Callback)
    assert isinstance(callback, GradwatchCallback)
    model = module(pl)
    trainer(pl, callback, max_epochs=2, gradient_clip_val=0.1).fit(model, data(), data())
    assert sorted(values(told)) == list(range(2 * BATCHES))
    assert max(values(told, "gradient_norm_used").values()) == pytest.approx(0.1, rel=1e-4)
    assert min(values(told, "gradient_norm").values()) > 0.1
    report = told.reports[-1]
    assert report.info.batch_size == SIZE
    assert report.info.epoch == 1
    assert report.value("activation_norm", "net.0") is not None
    assert report.notes == ()
    assert told.run is not None
    assert told.run.model.train_size == BATCHES * SIZE
    assert told.run.model.planned_steps == 2 * BATCHES


def test_importing_it_imports_no_lightning() -> None:
    code = (
        "import gradwatch, gradwatch_lightning, sys; "
        "assert not [name for name in sys.modules if 'lightning' in name.split('.')[0] "
        "and not name.startswith('gradwatch')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'pip install "torch-gradwatch\[lightning\]"'):
        GradwatchCallback()


# --- Options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"every_n_steps": 7, "log_every_n_steps": 50}, "multiple"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"monitors": [gradwatch.Monitor]}, "monitors"),
        ({"sinks": [print]}, "sinks"),
        ({"rules": 3}, "rules"),
        ({"include": ["no_such_metric"]}, "no_such_metric"),
        ({"train_size": 0}, "train_size"),
        ({"planned_steps": -1}, "planned_steps"),
        ({"per_layer": "yes"}, "per_layer"),
        ({"tag_prefix": ""}, "tag_prefix"),
        ({"on_recommendation": "shout"}, "on_recommendation"),
        ({"on_error": "ignore"}, "on_error"),
    ],
)
def test_a_wrong_option_raises_at_once(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GradwatchCallback(**options)


def test_a_folder_that_cannot_be_one_raises_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError):
        GradwatchCallback(tmp_path / "file")


def test_making_one_draws_no_random_numbers(assert_identical: Any) -> None:
    before = torch.get_rng_state()
    GradwatchCallback()
    assert_identical(torch.get_rng_state(), before)


def test_what_the_user_says_of_the_training_counts(pl: Any, told: gradwatch.MemorySink) -> None:
    callback = GradwatchCallback(sinks=[told], train_size=7, planned_steps=9, **EVERY)
    trainer(pl, callback).fit(module(pl), data())
    assert told.run is not None
    assert (told.run.model.train_size, told.run.model.planned_steps) == (7, 9)


def test_an_endless_training_over_a_stream_has_no_size(pl: Any, told: gradwatch.MemorySink) -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            dataset: Any = data().dataset
            return iter(dataset)

    def stop(self: Any, *args: Any) -> None:
        self.trainer.should_stop = self.trainer.global_step >= 3

    callback = GradwatchCallback(sinks=[told], **EVERY)
    loader = DataLoader(Stream(), batch_size=SIZE)
    model = module(pl, on_train_batch_end=stop)
    trainer(pl, callback, max_epochs=-1).fit(model, loader)
    assert told.run is not None
    assert (told.run.model.train_size, told.run.model.planned_steps) == (None, None)
    assert len(told.reports) == 3


def test_before_any_fit_there_is_an_empty_summary() -> None:
    callback = GradwatchCallback()
    assert callback.watch is None
    assert callback.recommendations == ()
    assert callback.summary().notes == ("nothing has been measured yet",)
    assert callback.state_dict() == {}


# --- The training is the same ------------------------------------------------------------------


def transformer_step(self: Any, batch: Any, index: int) -> Tensor:
    encoded = self.encoder(batch[0].reshape(-1, 1, 6))
    loss: Tensor = (self.net(encoded[:, 0]) - batch[1]).square().mean()
    return loss


def skipping(self: Any, batch: Any, index: int) -> int | None:
    return -1 if index == 3 else None


MODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "automatic": ({}, {"max_epochs": 2}),
    "manual": ({"manual": True}, {"max_epochs": 2}),
    "accumulated": ({}, {"max_epochs": 2, "accumulate_grad_batches": 4, "gradient_clip_val": 0.1}),
    "by value": ({}, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "bf16": ({}, {"precision": "bf16-mixed"}),
    "interrupted epochs": ({"on_train_batch_start": skipping}, {"max_epochs": 3}),
    "validation in between": ({}, {"val_check_interval": 2, "max_epochs": 2}),
}


@pytest.mark.parametrize("mode", MODES)
def test_training_is_bit_identical(
    pl: Any, mode: str, training_state: Any, assert_identical: Any, traces_on: Any
) -> None:
    of_module, of_trainer = MODES[mode]

    def run(*callbacks: Any) -> Any:
        model = module(pl, noisy=True, **of_module)
        torch.manual_seed(7)
        before = traces_on(model)["hooks"]
        boss = trainer(pl, *callbacks, **of_trainer)
        boss.fit(model, data(), data(3))
        logged = {name: value.clone() for name, value in boss.callback_metrics.items()}
        after = traces_on(model, *boss.optimizers)["hooks"]
        return training_state(model, *boss.optimizers), logged, before, after

    alone = run()
    callback = GradwatchCallback(**EVERY)
    assert_identical(run(callback), alone)
    assert callback.summary().measurements


def test_evaluation_keeps_its_fused_kernels(pl: Any, assert_identical: Any) -> None:
    """A hook on an encoder layer makes PyTorch choose another kernel for evaluation."""

    def hooks_on_layers(self: Any) -> int:
        return sum(len(item._forward_hooks) for item in self.encoder.modules())

    def validation_step(self: Any, batch: Any, index: int) -> None:
        self.log("val_loss", transformer_step(self, batch, index))
        hooks.append(hooks_on_layers(self))

    def on_train_epoch_end(self: Any) -> None:
        hooks.append(hooks_on_layers(self))

    def run(*callbacks: Any) -> Any:
        model = module(
            pl,
            training_step=transformer_step,
            validation_step=validation_step,
            on_train_batch_start=skipping,  # also after a batch that has begun and was skipped
            on_train_epoch_end=on_train_epoch_end,
        )
        model.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        boss = trainer(pl, *callbacks, max_epochs=2, val_check_interval=2)
        boss.fit(model, data(), data(3))
        return dict(boss.callback_metrics)

    hooks: list[int] = []
    alone = run()
    assert "val_loss" in alone
    assert_identical(run(GradwatchCallback(**EVERY)), alone)
    assert len(hooks) > 8
    assert not any(hooks)


def test_a_compiled_module_stays_compiled(pl: Any, told: gradwatch.MemorySink) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run(*callbacks: Any) -> int:
        torch._dynamo.reset()
        graphs.clear()

        def training_step(self: Any, batch: Any, index: int) -> Tensor:
            loss: Tensor = (self.net(batch[0]) - batch[1]).square().mean()
            return loss

        model = torch.compile(module(pl, training_step=training_step), backend=backend)
        trainer(pl, *callbacks, limit_train_batches=3).fit(model, data())
        return len(graphs)

    alone = run()
    assert run(GradwatchCallback(sinks=[told], **EVERY)) == alone > 0
    assert sorted(values(told)) == [0, 1, 2]
    assert told.reports[0].info.batch_size == SIZE
    assert any("compiled" in note for note in told.reports[0].notes)


# --- Which steps count -------------------------------------------------------------------------


def test_a_learning_rate_finder_is_not_watched(
    pl: Any, told: gradwatch.MemorySink, tmp_path: Path, traces_on: Any
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
    pl: Any, told: gradwatch.MemorySink, tmp_path: Path
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
    pl: Any, told: gradwatch.MemorySink, tmp_path: Path, first: bool
) -> None:
    callback = GradwatchCallback(sinks=[told], **EVERY)
    finder = pl.callbacks.LearningRateFinder(num_training_steps=4, min_lr=1e-3)
    order = [callback, finder] if first else [finder, callback]
    trainer(pl, *order, default_root_dir=tmp_path).fit(module(pl), data())
    assert sorted(values(told)) == list(range(BATCHES))


@pytest.mark.parametrize("settings", [EVERY, EVERY | {"log_every_n_steps": 50}])
def test_a_finder_between_two_epochs_leaves_no_trace(
    pl: Any, tmp_path: Path, settings: dict[str, Any]
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


def test_the_sanity_check_is_no_training(pl: Any, told: gradwatch.MemorySink) -> None:
    trainer(pl, GradwatchCallback(sinks=[told], **EVERY), num_sanity_val_steps=2).fit(
        module(pl), data(), data()
    )
    assert told.reports[0].info.batch_size == SIZE
    assert len(told.reports) == BATCHES


def test_callbacks_of_lightning_that_change_the_training(
    pl: Any, told: gradwatch.MemorySink
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


def test_fast_dev_run(pl: Any, told: gradwatch.MemorySink) -> None:
    trainer(pl, GradwatchCallback(sinks=[told], **EVERY), fast_dev_run=True).fit(
        module(pl), data(), data()
    )
    assert sorted(values(told)) == [0]


def test_steps_that_are_not_sampled_are_left_alone(
    pl: Any, told: gradwatch.MemorySink, monkeypatch: pytest.MonkeyPatch
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
    pl: Any, told: gradwatch.MemorySink, tmp_path: Path
) -> None:
    callback = GradwatchCallback(sinks=[told], logdir=tmp_path, **EVERY)
    boss, model = trainer(pl, callback), module(pl)
    boss.fit(model, data())
    boss.fit_loop.max_epochs = 2
    boss.fit(model, data())
    assert sorted(values(told)) == list(range(2 * BATCHES))
    assert len(gradwatch.read(tmp_path).values("loss")) == 2 * BATCHES


def test_a_fit_of_another_trainer_begins_at_0(pl: Any, told: gradwatch.MemorySink) -> None:
    callback = GradwatchCallback(sinks=[told], **EVERY)
    trainer(pl, callback).fit(module(pl), data())
    first = callback.watch
    trainer(pl, callback, limit_train_batches=2).fit(module(pl), data())
    assert callback.watch is not first
    assert sorted(values(told)) == [0, 1]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("without", [0, 1])
def test_a_batch_without_a_loss_counts_no_samples(
    pl: Any, told: gradwatch.MemorySink, without: int
) -> None:
    def training_step(self: Any, batch: Any, index: int) -> Any:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        return None if index % 2 == without else loss

    callback = GradwatchCallback(sinks=[told], **EVERY)
    boss = trainer(pl, callback, accumulate_grad_batches=2)
    boss.fit(module(pl, training_step=training_step), data())
    assert [report.info.batch_size for report in told.reports] == [SIZE] * 3


# --- Resume ------------------------------------------------------------------------------------


def save_at(step: int, path: Path) -> Callable[..., None]:
    def on_train_batch_end(self: Any, *args: Any) -> None:
        if self.trainer.global_step == step:
            self.trainer.save_checkpoint(path)

    return on_train_batch_end


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize(("every", "log_every"), [(1, 1), (2, 4), (1, 50)])
def test_a_resumed_run_equals_an_uninterrupted_one(
    pl: Any, tmp_path: Path, manual: bool, every: int, log_every: int
) -> None:
    half = 9  # in the midst of the second epoch, where Lightning starts the data anew
    recorded, drawn = [], []
    for name, stops in (("whole", [2 * half]), ("parts", [half, 2 * half])):
        state = None
        for steps in stops:
            callback = GradwatchCallback(
                tmp_path / name,
                every_n_steps=every,
                log_every_n_steps=log_every,
                on_error="raise",
            )
            logs = pl.loggers.TensorBoardLogger(tmp_path / f"{name} drawn", version=0)
            saved = tmp_path / f"{name}.ckpt"
            boss = trainer(pl, callback, max_epochs=-1, max_steps=steps, logger=logs)
            model = module(pl, manual=manual, on_train_batch_end=save_at(half, saved))
            boss.fit(model, data(all_equal=True), ckpt_path=state, weights_only=True)
            state = saved
        recorded.append(gradwatch.read(tmp_path / name))
        drawn.append(board_points(logs))
    whole, parts = (numbers(run.reports) for run in recorded)
    assert parts == whole
    assert len([key for key in whole if key[0] == "loss"]) == math.ceil(2 * half / every)
    assert recorded[1].header.model == recorded[0].header.model
    assert drawn[1] == drawn[0]
    assert all(len({step for step, _ in points}) == len(points) for points in drawn[1].values())


def test_a_killed_run_loses_nothing_before_its_checkpoint(pl: Any, tmp_path: Path) -> None:
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


def test_a_state_is_loaded_safely_and_is_plain(pl: Any, tmp_path: Path) -> None:
    callback = GradwatchCallback(**EVERY)
    boss = trainer(pl, callback)
    boss.fit(module(pl), data())
    boss.save_checkpoint(tmp_path / "state.ckpt")
    loaded = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert loaded["callbacks"]["gradwatch"]["watch"]["step"] == BATCHES


def test_a_checkpoint_without_it_starts_at_the_step_of_the_trainer(
    pl: Any, told: gradwatch.MemorySink, tmp_path: Path
) -> None:
    boss = trainer(pl)
    boss.fit(module(pl), data())
    boss.save_checkpoint(tmp_path / "state.ckpt")
    callback = GradwatchCallback(sinks=[told], **EVERY)
    trainer(pl, callback, max_epochs=2).fit(
        module(pl), data(), ckpt_path=tmp_path / "state.ckpt", weights_only=True
    )
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
    pl: Any, told: gradwatch.MemorySink, damage: str
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


# --- Nothing stays behind ----------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("manual", [False, True])
def test_an_interrupted_training_leaves_no_hooks(
    pl: Any,
    told: gradwatch.MemorySink,
    traces_on: Any,
    tmp_path: Path,
    error: type[BaseException],
    manual: bool,
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


def test_a_defect_of_the_adapter_does_not_stop_the_training(
    pl: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    traces_on: Any,
) -> None:
    def broken(self: Any, batch: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Fit, "batch_begins", broken)
    model = module(pl)
    before = traces_on(model)["hooks"]
    boss = trainer(pl, GradwatchCallback(every_n_steps=1, log_every_n_steps=1))
    boss.fit(model, data())
    assert boss.global_step == BATCHES
    assert caplog.text.count("a defect") == 1
    assert traces_on(model, *boss.optimizers)["hooks"] == before


def test_a_defect_at_the_start_does_not_stop_the_training(
    pl: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(trainer: Any) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("gradwatch_lightning.fit.train_size", broken)
    boss = trainer(pl, GradwatchCallback())
    boss.fit(module(pl), data())
    assert boss.global_step == BATCHES
    assert caplog.text.count("a defect") == 1


def test_a_watch_that_is_there_already_is_an_error_before_step_0(pl: Any) -> None:
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


def test_a_recommendation_may_stop_the_training(pl: Any) -> None:
    callback = GradwatchCallback(rules=[Always()], on_recommendation="raise", **EVERY)
    with pytest.raises(gradwatch.AdviceError):
        trainer(pl, callback).fit(module(pl), data())


class Mine(GradwatchCallback):
    """A subclass of the user."""

    extra = 3


@pytest.mark.parametrize("cls", [GradwatchCallback, Mine])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copy_made_in_a_training_watches_its_own(
    pl: Any, cls: type[GradwatchCallback], how: Callable[[Any], Any]
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
def test_processes_that_lightning_starts_itself(pl: Any, tmp_path: Path) -> None:
    """The callback travels into them; what it measured is in the record."""
    callback = GradwatchCallback(tmp_path, **EVERY)
    boss = trainer(pl, callback, strategy="ddp_fork", devices=2)
    boss.fit(module(pl), data())
    losses = gradwatch.read(tmp_path).values("loss")
    assert [step for step, _ in losses] == list(range(BATCHES // 2))
    assert callback.watch is None


# --- Loggers -----------------------------------------------------------------------------------


def board_points(logs: Any) -> dict[str, list[tuple[int, float]]]:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = board.EventAccumulator(logs.log_dir, size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(item.step, item.value) for item in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if tag.startswith("gradwatch")
    }


def csv_rows(logs: Any) -> list[dict[str, str]]:
    import csv

    logs.save()
    with Path(logs.log_dir, "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def csv_values(logs: Any, tag: str = "gradwatch/loss") -> dict[int, float]:
    found: dict[int, float] = {}
    for row in csv_rows(logs):
        if row.get(tag):
            assert int(row["step"]) not in found
            found[int(row["step"])] = float(row[tag])
    return found


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_loggers_get_the_same(
    pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_layer: bool
) -> None:
    pytest.importorskip("wandb")
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    loggers = [
        pl.loggers.TensorBoardLogger(tmp_path),
        pl.loggers.CSVLogger(tmp_path),
        pl.loggers.WandbLogger(save_dir=tmp_path, offline=True),
        pl.loggers.MLFlowLogger(tracking_uri=address, artifact_location=str(tmp_path / "art")),
    ]
    board, table, bees, flow = loggers
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(bees.experiment, "log", lambda row, *args, **kwargs: sent.append(row))
    callback = GradwatchCallback(rules=[Always()], per_layer=per_layer, **EVERY)
    trainer(pl, callback, logger=loggers).fit(module(pl), data())
    bees.experiment.finish()

    points = board_points(board)
    assert ("gradwatch_gradient_norm_used/net.0.weight" in points) is per_layer
    assert [step for step, _ in points["gradwatch/loss"]] == list(range(BATCHES))
    for tag, curve in points.items():
        in_single = dict(curve)
        assert csv_values(table, tag) == pytest.approx(in_single), tag
        rows = {row["trainer/global_step"]: row[tag] for row in sent if tag in row}
        assert all(type(value) is float for value in rows.values())
        assert rows == pytest.approx(in_single), tag
        client = mlflow.MlflowClient(address)
        history = client.get_metric_history(flow.run_id, tag)
        assert {item.step: item.value for item in history} == pytest.approx(in_single), tag
    assert {tag for row in csv_rows(table) for tag in row if tag.startswith("gradwatch")} == set(
        points
    )
    assert len([row for row in sent if "gradwatch/recommendations" in row]) == 1
    files = [item.path for item in client.list_artifacts(flow.run_id, "gradwatch")]
    assert files == ["gradwatch/recommendations.md"]


def test_tensorboard_gets_the_whole_page(pl: Any, tmp_path: Path) -> None:
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logs = pl.loggers.TensorBoardLogger(tmp_path)
    callback = GradwatchCallback(tmp_path / "record", **EVERY)
    trainer(pl, callback, logger=logs).fit(module(pl), data())
    events = board.EventAccumulator(logs.log_dir)
    events.Reload()
    assert "gradwatch/recommendations/text_summary" in events.Tags()["tensors"]
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert "gradwatch_activation_norm/net.0" in events.Tags()["scalars"]
    assert "train_loss" in events.Tags()["scalars"]
    assert [path.name for path in (tmp_path / "record").iterdir()] == ["gradwatch.jsonl"]


def test_a_logdir_has_the_page_where_no_logger_draws_it(pl: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer(pl, GradwatchCallback(tmp_path, **EVERY)).fit(module(pl), data())
    assert len(list(tmp_path.glob("*tfevents*"))) == 1
    assert (tmp_path / "gradwatch.jsonl").exists()


def test_without_a_logger_for_text_advice_goes_to_the_log_once(
    pl: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gradwatch")
    callback = GradwatchCallback(rules=[Always()], **EVERY)
    trainer(pl, callback).fit(module(pl), data())
    said = [record for record in caplog.records if record.name == "gradwatch"]
    assert [(record.levelname, record.getMessage()) for record in said] == [
        ("WARNING", "advice: clip of model: fix. too large"),
        ("INFO", "info: width of model: fix. too narrow"),
    ]
    assert [item.knob for item in callback.recommendations] == ["clip", "width"]


def test_a_logger_that_fails_stands_alone(
    pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(pl.loggers.CSVLogger):  # type: ignore[misc]
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(name.startswith("gradwatch") for name in metrics):
                raise OSError("disk full")

    good = pl.loggers.CSVLogger(tmp_path, name="good")
    callback = GradwatchCallback(every_n_steps=1, log_every_n_steps=1)
    trainer(pl, callback, logger=[Broken(tmp_path, name="broken"), good]).fit(module(pl), data())
    assert caplog.text.count("disk full") == 1
    assert sorted(csv_values(good)) == list(range(BATCHES))


def test_with_two_optimizers_the_axis_is_that_of_lightning(pl: Any, tmp_path: Path) -> None:
    """`global_step` counts both; Lightning draws at the batch."""

    def two(self: Any) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]

    def training_step(self: Any, batch: Any, index: int) -> None:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("train_loss", loss)
        self.manual_backward(loss)
        for _ in range(2):  # two rounds a batch
            for optimizer in self.optimizers():
                optimizer.step()

    logs = pl.loggers.CSVLogger(tmp_path)
    model = module(pl, manual=True, training_step=training_step, configure_optimizers=two)
    callback = GradwatchCallback(every_n_steps=2, log_every_n_steps=4, on_error="raise")
    boss = trainer(pl, callback, logger=logs)
    boss.fit(model, data())
    assert boss.global_step == 4 * BATCHES
    rows = csv_rows(logs)
    for tag in ("gradwatch/update_norm", "train_loss"):
        drawn = [int(row["step"]) for row in rows if row.get(tag)]
        assert drawn == list(range(BATCHES)), tag
