"""The Hugging Face adapter: a spectator, heard by every logger, that survives what a Trainer does.

That its numbers are right is tested in tests/modes/test_transformers.py.
"""

import gc
import json
import logging
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import Tensor

import gradwatch

pytest.importorskip("transformers")

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from gradwatch_transformers import GradwatchCallback, attach

TOKENS = 31
STEPS = 6
EVERY: dict[str, Any] = {
    "every_n_steps": 1,
    "log_every_n_steps": 1,
    "on_error": "raise",
    "budget": None,  # every probe in every step
}
TIMINGS = ("runtime", "per_second")

pytestmark = pytest.mark.usefixtures("one_thread", "closed_at_the_end")


@pytest.fixture
def closed_at_the_end() -> Iterator[None]:
    """A test that fails must not leave hooks for the next one."""
    yield
    for callback in list(GradwatchCallback._living):
        callback.close()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=16,
        n_embd=8,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def sentences(count: int = 20, seed: int = 3) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randint(TOKENS, (count, 10), generator=random)
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(settings | options))


def make(folder: Path, callbacks: list[Any] | None = None, **options: Any) -> Any:
    return Trainer(
        gpt2(),
        arguments(folder, **options),
        train_dataset=sentences(),
        eval_dataset=sentences(6, seed=4),
        callbacks=callbacks,
    )


def own(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name.startswith("gradwatch")}


def others(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            name: value
            for name, value in entry.items()
            if not name.startswith("gradwatch") and not name.endswith(TIMINGS)
        }
        for entry in history
    ]


def hooks_of_gradwatch(trainer: Any) -> dict[str, list[str]]:
    named = [("model", module) for module in trainer.model.modules()]
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found = {
        f"{owner}.{attribute}": [repr(hook) for hook in hooks.values()]
        for owner, item in [*named, ("optimizer", optimizer)]
        for attribute, hooks in vars(item).items()
        if "hook" in attribute and isinstance(hooks, dict)
    }
    found["torch"] = [
        function.__module__
        for function in (
            torch.autograd.backward,
            torch.nn.utils.clip_grad._clip_grads_with_norm_,
            torch.amp.GradScaler.scale,
        )
    ]
    return {
        place: kept
        for place, items in found.items()
        if (kept := [item for item in items if "gradwatch" in item])
    }


# --- Arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be an integer of at least 1, got 0"),
        ({"every_n_steps": 3, "log_every_n_steps": 7}, "must be a multiple of every_n_steps"),
        ({"monitors": [gradwatch.presets]}, "monitors must hold instances of Monitor"),
        ({"sinks": [print]}, "sinks must hold instances of Sink"),
        ({"include": ["no_such_metric"]}, "no_such_metric"),
        ({"train_size": -1}, "train_size must be a positive integer or None, got -1"),
        ({"per_layer": "yes"}, "per_layer must be True, False or None, got 'yes'"),
        ({"on_recommendation": "shout"}, "on_recommendation must be one of"),
        ({"on_error": "ignore"}, "on_error must be 'disable' or 'raise', got 'ignore'"),
    ],
)
def test_wrong_arguments_raise_at_once(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(gradwatch.ConfigError, match=message):
        GradwatchCallback(**wrong)


def test_a_logdir_that_cannot_be_written_raises_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(gradwatch.RecordError, match="give a logdir that can be written"):
        GradwatchCallback(logdir=file / "below")


def test_making_a_callback_changes_no_random_number() -> None:
    before = torch.get_rng_state()
    GradwatchCallback()
    assert torch.equal(torch.get_rng_state(), before)


def test_only_a_trainer_can_be_attached_to_and_only_once(tmp_path: Path) -> None:
    with pytest.raises(gradwatch.AttachError, match=r"must be a transformers\.Trainer, got GPT2"):
        attach(gpt2())
    trainer = make(tmp_path)
    attach(trainer)
    with pytest.raises(gradwatch.AttachError, match="has a GradwatchCallback already"):
        attach(trainer)
    trainer.remove_callback(GradwatchCallback)
    trainer.is_in_train = True
    with pytest.raises(gradwatch.AttachError, match=r"before trainer.train\(\)"):
        attach(trainer)


def test_before_a_training_there_is_nothing_to_tell() -> None:
    callback = GradwatchCallback()
    assert callback.watch is None
    assert callback.recommendations == ()
    with pytest.raises(gradwatch.AttachError, match=r"call trainer.train\(\) first"):
        callback.summary()


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_without_the_packages_the_extra_is_named(package: str) -> None:
    program = f"import sys; sys.modules[{package!r}] = None; import gradwatch_transformers"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "MissingExtraError" in done.stderr
    assert 'pip install "torch-gradwatch[transformers]"' in done.stderr


# --- A spectator -------------------------------------------------------------------------------


@pytest.mark.parametrize("attached", [True, False])
def test_the_training_is_bit_identical(
    attached: bool,
    tmp_path: Path,
    training_state: Callable[..., Any],
    assert_identical: Callable[[Any, Any], None],
) -> None:
    options: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "max_grad_norm": 0.5,
    }
    ends = []
    for watched in (False, True):
        callbacks = [GradwatchCallback(**EVERY)] if watched and not attached else []
        trainer = make(tmp_path, callbacks, **options)
        if watched and attached:
            monitors = gradwatch.presets.full()
            attach(trainer, logdir=tmp_path / "run", per_layer=True, monitors=monitors, **EVERY)
        trainer.train()
        assert any(map(own, trainer.state.log_history)) == watched
        ends.append(
            {
                "state": training_state(trainer.model, trainer.optimizer.optimizer),
                "history": others(trainer.state.log_history),
                "evaluation": others([trainer.evaluate()]),
            }
        )
        if watched:
            assert hooks_of_gradwatch(trainer) == {}
            for probed in ("gradwatch/smoothness_secant", "gradwatch/sharpness"):
                assert any(probed in entry for entry in trainer.state.log_history)
    assert_identical(ends[0], ends[1])


def test_between_samples_nothing_is_kept(tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            training = callback._attachment._training
            assert training is not None
            seen.append(len(training._loss._parts))

    trainer = make(tmp_path, [Look()], gradient_accumulation_steps=2)
    callback = attach(trainer, every_n_steps=3, log_every_n_steps=3)
    trainer.train()
    assert seen == [2, 0, 0, 2, 0, 0]


# --- Who hears of it ---------------------------------------------------------------------------


def test_the_history_has_the_values_of_the_reports(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=3)
    told = gradwatch.MemorySink()
    attach(trainer, sinks=[told], **EVERY)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == len(told.reports) == STEPS
    for entry, report in zip(logged, told.reports, strict=True):
        assert entry["gradwatch/loss"] == report.value("loss")
        assert entry["gradwatch/gradient_norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert entry["gradwatch/learning_rate"] == entry["learning_rate"]
        assert all(type(value) is float for value in own(entry).values())
        assert not [name for name in entry if name.startswith("gradwatch_gradient_norm/")]
    rest = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert any("eval_loss" in entry for entry in rest)
    assert not any(map(own, rest))
    json.dumps(trainer.state.log_history)


def test_on_request_the_layers_are_there_too(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=1)
    attach(trainer, per_layer=True, tag_prefix="gw", **EVERY)
    trainer.train()
    assert "gw_gradient_norm/transformer.wpe.weight" in trainer.state.log_history[0]


def test_a_value_is_logged_once(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    attach(trainer, every_n_steps=3, log_every_n_steps=3)
    trainer.train()
    logged = [bool(own(entry)) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [True, False, False, True, False, False]


def test_what_the_trainer_knows_need_not_be_said(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    callback = attach(trainer)
    trainer.train()
    assert callback.watch is not None
    assert callback.watch.model_info.train_size == 20
    assert callback.watch.model_info.planned_steps == STEPS
    trainer = make(tmp_path)
    callback = attach(trainer, train_size=7, planned_steps=8)
    trainer.train()
    assert callback.watch is not None
    assert callback.watch.model_info.train_size == 7
    assert callback.watch.model_info.planned_steps == 8


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
def test_every_logger_gets_the_scalars_of_the_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb, mlflow = pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/runs.db")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    heard: list[dict[str, float]] = []
    trainer = make(tmp_path, max_steps=3, report_to=["tensorboard", "wandb", "mlflow"])
    attach(trainer, **EVERY)
    original = wandb.sdk.wandb_run.Run.log

    def log(run: Any, data: dict[str, Any], *rest: Any, **more: Any) -> Any:
        heard.append(dict(data))
        return original(run, data, *rest, **more)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", log)
    trainer.train()
    expected = {entry["step"]: own(entry) for entry in trainer.state.log_history if "loss" in entry}
    assert list(expected) == [1, 2, 3]
    assert all(len(values) > 10 for values in expected.values())

    board = scalars(tmp_path / "board")
    assert {step: own(values) for step, values in board.items() if own(values)} == {
        step: pytest.approx(values) for step, values in expected.items()
    }
    told = {
        entry["train/global_step"]: prefixed(entry, "train/")
        for entry in heard
        if prefixed(entry, "train/")
    }
    assert told == expected
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([item.experiment_id for item in client.search_experiments()])
    stored: dict[int, dict[str, float]] = {}
    for name in (name for name in run.data.metrics if name.startswith("gradwatch")):
        for point in client.get_metric_history(run.info.run_id, name):
            stored.setdefault(point.step, {})[name] = point.value
    assert stored == expected
    wandb.finish()
    mlflow.end_run()
    text = texts(tmp_path / "board")
    assert "No recommendations." in text["train/gradwatch/recommendations/text_summary"]


def prefixed(entry: dict[str, Any], prefix: str) -> dict[str, Any]:
    return own({name.removeprefix(prefix): value for name, value in entry.items()})


def board_at(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loaded = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    loaded.Reload()
    return loaded


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """By step, under the names that the history has."""
    board = board_at(folder)
    found: dict[int, dict[str, float]] = {}
    for tag in board.Tags()["scalars"]:
        for event in board.Scalars(tag):
            found.setdefault(event.step, {})[tag.removeprefix("train/")] = event.value
    return found


def texts(folder: Path) -> dict[str, str]:
    board = board_at(folder)
    return {
        tag: board.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in board.Tags()["tensors"]
    }


def test_a_callback_given_plainly_reaches_the_history_and_its_own_files(tmp_path: Path) -> None:
    callback = GradwatchCallback(logdir=tmp_path / "run", **EVERY)
    trainer = make(tmp_path, [callback])
    trainer.train()
    logged = [own(entry) for entry in trainer.state.log_history if "loss" in entry]
    assert all(logged)
    assert len(gradwatch.read(tmp_path / "run").reports) == STEPS
    assert scalars(tmp_path / "run")[0]["gradwatch/loss"] > 0


class Steps(gradwatch.Sink):
    """The steps of all reports, of all runs."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, report: gradwatch.Report) -> None:
        self.steps.append(report.step)


# --- Resuming ----------------------------------------------------------------------------------


def history_of(trainer: Any) -> list[dict[str, Any]]:
    """Without the Trainer's own loss, whose mean begins anew after a checkpoint."""
    return [
        {name: value for name, value in entry.items() if name != "loss"}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def record_of(folder: Path) -> list[dict[str, Any]]:
    # What probes took is time, and no two runs take the same.
    return [replace(report, probes=None).to_dict() for report in gradwatch.read(folder).reports]


class AlwaysAdvises(gradwatch.Rule):
    def advise(self, history: gradwatch.History) -> list[gradwatch.Recommendation]:
        return [
            gradwatch.Recommendation(
                knob="learning_rate", scope="model", severity="warning", reason="a reason"
            )
        ]


def test_advice_is_seen_in_a_training_that_never_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, [], logging_steps=500)
    attach(trainer, rules=[AlwaysAdvises()], every_n_steps=1, log_every_n_steps=1)
    trainer.train()
    said = [record for record in caplog.records if "learning_rate" in record.getMessage()]
    assert [record.levelname for record in said] == ["WARNING"]


@pytest.mark.parametrize(
    ("restored", "attached", "cadence"),
    [(True, True, (1, 1)), (True, False, (2, 4)), (False, True, (2, 4)), (False, False, (1, 1))],
)
def test_a_resumed_run_reports_what_an_uninterrupted_one_does(
    restored: bool,
    attached: bool,
    cadence: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, but for what follows an eigenvector, which no checkpoint holds."""
    monkeypatch.setattr("gradwatch.presets.curvature", list)
    middle = STEPS // 2
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": middle, "logging_steps": 2}
    options["restore_callback_states_from_checkpoint"] = restored
    watching: dict[str, Any] = {
        "every_n_steps": cadence[0],
        "log_every_n_steps": cadence[1],
        "on_error": "raise",
        "budget": None,
    }

    def run(name: str, steps: int, checkpoint: str | None = None) -> Any:
        mine = {**watching, "logdir": tmp_path / name}
        callbacks = [] if attached else [GradwatchCallback(**mine)]
        trainer = make(tmp_path / "out" / name, callbacks, **options)
        callback = attach(trainer, **mine) if attached else callbacks[0]
        if steps < STEPS:
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=checkpoint)
        assert callback.watch is not None  # the user's own reference lives on
        assert callback.watch.step == steps
        return trainer

    whole = run("whole", STEPS)
    run("parts", middle)
    again = run("parts", STEPS, str(tmp_path / "out" / "parts" / f"checkpoint-{middle}"))
    assert history_of(again) == history_of(whole)
    assert any(map(own, history_of(whole)))
    assert record_of(tmp_path / "parts") == record_of(tmp_path / "whole")
    assert scalars(tmp_path / "parts") == scalars(tmp_path / "whole")


class StopAt(TrainerCallback):
    """Stops early, as a job that is pre-empted: the plan, and so the schedule, stays."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("attached", [True, False])
def test_restoring_keeps_what_no_checkpoint_can_hold(attached: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    first = make(tmp_path, **options)
    attach(first, **EVERY)
    first.train()
    told = Steps()
    heard: list[gradwatch.Recommendation] = []
    mine: dict[str, Any] = {"sinks": [told], "on_recommendation": heard.append, **EVERY}
    options |= {"max_steps": STEPS, "restore_callback_states_from_checkpoint": True}
    callbacks = [] if attached else [GradwatchCallback(**mine)]
    second = make(tmp_path, callbacks, **options)
    callback = attach(second, **mine) if attached else callbacks[0]
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    present = second.callback_handler.callbacks
    assert callback not in present  # the Trainer made a new object
    assert sum(isinstance(item, GradwatchCallback) for item in present) == 1
    assert isinstance(present[0], GradwatchCallback) == attached
    assert told.steps == [3, 4, 5]
    assert callback.summary().step == 5
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert told.steps == [3, 4, 5, 3, 4, 5]


def test_a_restored_callback_that_nobody_introduced_says_what_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    first = make(tmp_path, **options)
    attach(first, every_n_steps=1, log_every_n_steps=3)
    first.train()
    options |= {"max_steps": STEPS, "restore_callback_states_from_checkpoint": True}
    second = make(tmp_path, **options)
    told = gradwatch.MemorySink()
    second.add_callback(GradwatchCallback(sinks=[told]))
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert told.reports == []
    assert "cannot hold monitors" in caplog.text
    (restored,) = (
        item for item in second.callback_handler.callbacks if isinstance(item, GradwatchCallback)
    )
    assert restored.watch is not None
    assert restored.watch.step == STEPS
    assert restored.summary().step == 5  # every step, as in the checkpoint


def test_a_checkpoint_of_an_unwatched_run_is_continued(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    make(tmp_path, max_steps=3, **options).train()
    trainer = make(tmp_path, **options)
    callback = attach(trainer, **EVERY)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))  # and saves another
    assert callback.watch is not None
    assert callback.watch.step == STEPS
    history = [entry for entry in trainer.state.log_history if own(entry)]
    assert [entry["step"] for entry in history] == [4, 5, 6]
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["GradwatchCallback"]["attributes"]["saved"]


def test_a_damaged_state_is_reported_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    first = make(tmp_path, max_steps=3, **options)
    attach(first)
    first.train()
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["GradwatchCallback"]["attributes"]["saved"]["watch"] = {
        "version": 0
    }
    file.write_text(json.dumps(state))
    trainer = make(tmp_path, **options)
    callback = attach(trainer, every_n_steps=1, log_every_n_steps=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert caplog.text.count("its state in the checkpoint failed") == 1
    assert trainer.state.global_step == STEPS
    assert callback.summary().value("loss")


class WithTensor(gradwatch.Monitor):
    """Its state cannot be in the Trainer's checkpoint, which is JSON."""

    metrics = ("one",)

    def read(self, view: gradwatch.StepView) -> gradwatch.Reading:
        return gradwatch.Reading("one", torch.ones(()))

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": torch.ones(2)}


def test_a_state_that_no_checkpoint_can_hold_is_reported_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, save_strategy="steps", save_steps=3)
    attach(trainer, monitors=[WithTensor()])
    trainer.train()
    assert caplog.text.count("its checkpoint failed") == 1
    saved = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["GradwatchCallback"]["attributes"] == {"saved": None}


# --- What may happen to a training -------------------------------------------------------------


class CtrlC(BaseException):
    """Stands for Ctrl-C, which pytest would take for its own."""


class Fail(TrainerCallback):
    def __init__(self, error: BaseException, step: int = 2) -> None:
        self.error, self.step = error, step

    def on_substep_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step == self.step:
            raise self.error


def interrupted(folder: Path, error: BaseException, **options: Any) -> Any:
    trainer = make(folder, [Fail(error)], gradient_accumulation_steps=2)
    attach(trainer, **EVERY, **options)
    with pytest.raises(type(error)):
        trainer.train()
    return trainer


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), CtrlC()])
def test_after_an_interruption_the_hooks_go_when_told(error: BaseException, tmp_path: Path) -> None:
    trainer = interrupted(tmp_path, error, logdir=tmp_path / "run")
    callback = trainer.callback_handler.callbacks[0]
    assert hooks_of_gradwatch(trainer) != {}
    callback.close()
    assert hooks_of_gradwatch(trainer) == {}
    assert callback.summary().step == 1
    assert len(gradwatch.read(tmp_path / "run").reports) == 2


def test_after_an_interruption_the_hooks_go_at_the_end_of_the_block(tmp_path: Path) -> None:
    trainer = make(tmp_path, [Fail(ValueError())], gradient_accumulation_steps=2)
    with pytest.raises(ValueError), attach(trainer):  # noqa: PT011
        trainer.train()
    assert hooks_of_gradwatch(trainer) == {}


def test_after_an_interruption_the_next_training_begins_anew(tmp_path: Path) -> None:
    trainer = interrupted(tmp_path, RuntimeError())
    trainer.remove_callback(Fail)
    trainer.train()
    callback = trainer.callback_handler.callbacks[0]
    assert callback.watch.step == STEPS
    assert callback.watch.failures == {}
    assert hooks_of_gradwatch(trainer) == {}
    assert len([entry for entry in trainer.state.log_history if own(entry)]) == STEPS


def test_after_an_interruption_the_hooks_go_with_the_trainer(tmp_path: Path) -> None:
    trainer = interrupted(tmp_path, RuntimeError())
    callback = weakref.ref(trainer.callback_handler.callbacks[0])
    model = trainer.model
    place = hooks_of_gradwatch(trainer)
    assert "torch" in place
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    assert callback() is None
    assert not torch.autograd.backward.__module__.startswith("gradwatch")
    assert not any("gradwatch" in repr(vars(module)) for module in model.modules())


def test_training_twice_gives_two_runs(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    told = Steps()
    callback = attach(trainer, sinks=[told], **EVERY)
    trainer.train()
    first = callback.watch
    trainer.train()
    assert callback.watch is not first
    assert told.steps == [*range(STEPS), *range(STEPS)]
    assert hooks_of_gradwatch(trainer) == {}


def test_a_fault_of_the_adapter_is_reported_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gradwatch_transformers import values

    def broken(self: Any) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(values.NewestValues, "take", broken)
    trainer = make(tmp_path)
    callback = attach(trainer, every_n_steps=1, log_every_n_steps=1)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert caplog.text.count("a fault") == 1
    assert "its values for the loggers failed" in caplog.text
    assert callback.summary().step == STEPS - 1


def test_a_training_that_cannot_be_watched_is_said_to_be_so_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stranger(TrainerCallback):
        def on_train_begin(self, *_: Any, **given: Any) -> None:
            self.watch = gradwatch.watch(trainer.model, given["optimizer"])

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.watch.close()

    trainer = make(tmp_path)
    trainer.callback_handler.callbacks.insert(0, Stranger())
    callback = GradwatchCallback()
    trainer.add_callback(callback)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert caplog.text.count("is watched already") == 1
    with pytest.raises(gradwatch.AttachError, match="is watched already"):
        callback.summary()


def test_a_recommendation_may_stop_the_training_if_the_user_wants_it(tmp_path: Path) -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.wte.weight[3] = math.nan
    trainer = Trainer(model, arguments(tmp_path), train_dataset=sentences())
    with attach(trainer, on_recommendation="raise"), pytest.raises(gradwatch.AdviceError):
        trainer.train()
    assert hooks_of_gradwatch(trainer) == {}


def test_texts_go_to_the_log_where_no_file_takes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gradwatch")
    trainer = make(tmp_path)
    attach(trainer, **EVERY)
    trainer.train()
    assert caplog.text.count("gradwatch/recommendations at step 1:\nNo recommendations.") == 1


# --- Other Trainers ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_frozen_weights_under_an_adapter_are_named(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    trainer = Trainer(
        peft.get_peft_model(gpt2(), config), arguments(tmp_path), train_dataset=sentences()
    )
    callback = attach(trainer, **EVERY)
    trainer.train()
    assert callback.watch is not None
    assert "base_model.model.transformer.wpe.weight" in callback.watch.model_info.frozen
    scopes = {
        item.scope
        for item in callback.summary().measurements
        if item.metric == "gradient_norm" and item.scope != "model"
    }
    assert scopes
    assert all("lora_" in scope for scope in scopes)


def test_an_iterable_dataset_has_no_size(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Any:
            return iter(sentences())

    trainer = Trainer(gpt2(), arguments(tmp_path), train_dataset=Stream())
    callback = attach(trainer, **EVERY)
    trainer.train()
    assert callback.watch is not None
    assert callback.watch.model_info.train_size is None
    assert callback.summary().value("batch_size") == 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trl_fine_tuning(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: place for place, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    lines = [{"text": " ".join("abcdefgh"[place % 8 :][: 2 + place % 5])} for place in range(16)]
    settings = trl.SFTConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_length=12,
    )
    trainer = trl.SFTTrainer(
        gpt2(),
        args=settings,
        train_dataset=datasets.Dataset.from_list(lines),
        processing_class=tokenizer,
    )
    callback = attach(trainer, **{**EVERY, "on_error": "disable"})
    trainer.train()
    assert callback.watch is not None
    # Its loss, computed in chunks, has no second derivative.
    probes = {f"probe of monitor {name}" for name in ("Sharpness", "BatchSharpness")}
    assert callback.watch.failures.keys() <= probes
    assert all("second derivatives" in why for why in callback.watch.failures.values())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3
    for entry in logged:
        assert entry["gradwatch/loss"] == pytest.approx(entry["loss"], rel=1e-4)
        assert entry["gradwatch/gradient_norm"] == pytest.approx(entry["grad_norm"], rel=1e-5)
        assert entry["gradwatch/batch_size"] == 4
        assert "mean_token_accuracy" in entry
