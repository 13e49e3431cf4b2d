"""Mistakes are told at once, before step 0, in three parts, and leave nothing behind.

A message says which argument, what was given, and what to do.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer

import gradwatch
from gradwatch import monitors, presets

pytestmark = pytest.mark.usefixtures("one_thread")

Traces = Callable[..., dict[str, Any]]


def make() -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    return model, SGD(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()


class Silent(gradwatch.Monitor):
    """Reports the metric of another one."""

    metrics = ("gradient_norm",)

    def read(self, view: gradwatch.StepView) -> list[gradwatch.Reading]:
        return []


# --- Options that cannot work ------------------------------------------------------------------

OPTIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "every 0": ({"every_n_steps": 0}, ("every_n_steps", "at least 1", "0")),
    "every -1": ({"every_n_steps": -1}, ("every_n_steps", "at least 1", "-1")),
    "every 2.5": ({"every_n_steps": 2.5}, ("every_n_steps", "integer", "2.5")),
    "every True": ({"every_n_steps": True}, ("every_n_steps", "integer", "True")),
    "every None": ({"every_n_steps": None}, ("every_n_steps", "integer", "None")),
    "log 0": ({"log_every_n_steps": 0}, ("log_every_n_steps", "at least 1", "0")),
    "log '50'": ({"log_every_n_steps": "50"}, ("log_every_n_steps", "integer", "'50'")),
    "no multiple": (
        {"every_n_steps": 10, "log_every_n_steps": 25},
        ("log_every_n_steps", "multiple of every_n_steps", "25 and 10", "20"),
    ),
    "log below every": (
        {"every_n_steps": 100},
        ("log_every_n_steps", "multiple of every_n_steps", "50 and 100", "nearest multiple is 100"),
    ),
    "train_size 0": ({"train_size": 0}, ("train_size", "positive integer or None", "0")),
    "train_size 1e5": ({"train_size": 1e5}, ("train_size", "positive integer", "100000.0")),
    "planned_steps -3": ({"planned_steps": -3}, ("planned_steps", "positive integer", "-3")),
    "planned_steps True": ({"planned_steps": True}, ("planned_steps", "integer", "True")),
    "include unknown": (
        {"include": ["gradient_nrom"]},
        ("include", "'gradient_nrom'", "names no metric", "gradient_norm_used", "metric/scope"),
    ),
    "exclude unknown": (
        {"exclude": ["gradient_norm", "los/model"]},
        ("exclude", "'los/model'", "names no metric", "loss"),
    ),
    "include of a monitor that is not there": (
        {"include": ["loss"], "monitors": [monitors.GradientNorm()]},
        ("include", "'loss'", "names no metric", "clip_coefficient"),
    ),
    "include string": (
        {"include": "gradient_norm"},
        ("include", "list of patterns", "string 'gradient_norm'"),
    ),
    "exclude string": ({"exclude": "*"}, ("exclude", "list of patterns", "string '*'")),
    "include numbers": ({"include": [3]}, ("include", "3")),
    "include number": ({"include": 3}, ("include", "3")),
    "monitor class": (
        {"monitors": [monitors.GradientNorm]},
        ("monitors", "instances of Monitor", "write GradientNorm()"),
    ),
    "monitor name": ({"monitors": ["loss"]}, ("monitors", "instances of Monitor", "'loss'")),
    "monitor alone": (
        {"monitors": monitors.GradientNorm()},
        ("monitors", "must be a list", "GradientNorm"),
    ),
    "bound class": ({"bounds": [type(presets.bounds()[0])]}, ("bounds", "instances of Bound")),
    "rule among bounds": ({"bounds": presets.rules()}, ("bounds", "instances of Bound")),
    "rule class": (
        {"rules": [type(presets.rules()[0])]},
        ("rules", "instances of Rule", f"write {type(presets.rules()[0]).__name__}()"),
    ),
    "sink class": (
        {"sinks": [gradwatch.MemorySink]},
        ("sinks", "instances of Sink", "write MemorySink()"),
    ),
    "sink alone": ({"sinks": gradwatch.MemorySink()}, ("sinks", "must be a list", "MemorySink")),
    "sink list": ({"sinks": [[]]}, ("sinks", "instances of Sink", "[]")),
    "same metric twice": (
        {"monitors": [*presets.standard(), Silent()]},
        ("monitors", "different metrics", "'gradient_norm'", "GradientNorm and Silent", "leave"),
    ),
    "same monitor twice": (
        {"monitors": [monitors.LossValue(), monitors.LossValue()]},
        ("monitors", "different metrics", "'loss'", "leave one"),
    ),
    "on_error": ({"on_error": "ignore"}, ("on_error", "'disable' or 'raise'", "'ignore'")),
    "on_recommendation": (
        {"on_recommendation": "shout"},
        ("on_recommendation", "collect, warn, raise", "callable", "'shout'"),
    ),
    "on_recommendation None": (
        {"on_recommendation": None},
        ("on_recommendation", "collect, warn, raise", "None"),
    ),
}


@pytest.mark.parametrize(("options", "pieces"), OPTIONS.values(), ids=OPTIONS)
def test_a_wrong_option_is_told_and_leaves_no_trace(
    options: dict[str, Any], pieces: tuple[str, ...], traces_on: Traces
) -> None:
    model, optimizer = make()
    before = traces_on(model, optimizer)
    with pytest.raises(gradwatch.ConfigError) as caught:
        gradwatch.watch(model, optimizer, **{"track_loss": True, "track_clipping": True} | options)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    assert isinstance(caught.value, gradwatch.GradwatchError)
    assert isinstance(caught.value, ValueError)
    assert traces_on(model, optimizer) == before
    gradwatch.watch(model, optimizer).close()  # the mistake is forgotten


# --- Models and optimizers that cannot be watched ----------------------------------------------


def wrong_model() -> dict[str, tuple[Any, Any, tuple[str, ...]]]:
    model, optimizer = make()
    _, foreign = make()
    return {
        "no module": ("model", optimizer, ("model", "torch.nn.Module", "str", "pass the module")),
        "a function": (lambda x: x, optimizer, ("model", "torch.nn.Module", "function")),
        "a class": (nn.Linear, optimizer, ("model", "torch.nn.Module", "type")),
        "parameters": (model.parameters(), optimizer, ("model", "torch.nn.Module", "generator")),
        "no parameters": (
            nn.Sequential(nn.ReLU()),
            optimizer,
            ("model", "Sequential", "has no parameters", "pass the module that is trained"),
        ),
        "of another model": (
            model,
            foreign,
            ("SGD holds 4 parameters", "none of which belongs to the model", "pass the optimizer"),
        ),
        "one of another model": (
            model,
            [optimizer, foreign],
            ("SGD holds 4 parameters", "none of which belongs to the model"),
        ),
        "made before the model was replaced": (
            make()[0],
            optimizer,
            ("SGD", "made after the model was moved, wrapped or sharded"),
        ),
        "no optimizer": (model, None, ("optimizer", "torch.optim.Optimizer", "NoneType")),
        "a learning rate": (model, 0.1, ("optimizer", "torch.optim.Optimizer", "float")),
        "an optimizer class": (model, SGD, ("optimizer", "torch.optim.Optimizer", "type")),
        "empty list": (model, [], ("optimizer", "at least one", "empty list")),
        "list of none": (model, [None], ("optimizer", "torch.optim.Optimizer", "NoneType")),
        "the same twice": (model, [optimizer, optimizer], ("optimizer", "SGD", "twice")),
        "swapped": (optimizer, model, ("model", "torch.nn.Module", "SGD")),
    }


@pytest.mark.parametrize("case", wrong_model())
def test_what_cannot_be_watched_is_told_and_leaves_no_trace(case: str, traces_on: Traces) -> None:
    model, optimizer, pieces = wrong_model()[case]
    modules = [item for item in (model, optimizer) if isinstance(item, nn.Module)]
    given = optimizer if isinstance(optimizer, list) else [optimizer, model]
    optimizers = [item for item in given if isinstance(item, Optimizer)]
    target = modules[0] if modules else make()[0]
    before = traces_on(target, *optimizers)
    with pytest.raises(gradwatch.AttachError) as caught:
        gradwatch.watch(model, optimizer, track_loss=True, track_clipping=True)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    assert isinstance(caught.value, gradwatch.GradwatchError)
    assert traces_on(target, *optimizers) == before


def test_the_second_watch_of_an_optimizer_is_refused(traces_on: Traces) -> None:
    model, optimizer = make()
    first = gradwatch.watch(model, optimizer)
    before = traces_on(model, optimizer)
    for given in (optimizer, [make()[1], optimizer]):
        with pytest.raises(gradwatch.AttachError, match=r"SGD is watched already; close\(\)"):
            gradwatch.watch(model, given)
    assert traces_on(model, optimizer) == before
    train(model, optimizer)
    assert first.step == 1
    first.close()
    gradwatch.watch(model, optimizer).close()


# --- Folders that cannot be written ------------------------------------------------------------


def file_in_the_way(folder: Path) -> Path:
    (folder / "runs").write_text("not a folder")
    return folder / "runs"


def file_further_up(folder: Path) -> Path:
    return file_in_the_way(folder) / "first"


def folder_in_the_way(folder: Path) -> Path:
    (folder / "gradwatch.jsonl").mkdir()
    return folder


@pytest.mark.parametrize("made", [file_in_the_way, file_further_up, folder_in_the_way])
def test_a_folder_that_cannot_be_written_is_told_before_the_training(
    made: Callable[[Path], Path], tmp_path: Path, traces_on: Traces
) -> None:
    logdir = made(tmp_path)
    model, optimizer = make()
    before = traces_on(model, optimizer)
    with pytest.raises(gradwatch.RecordError, match="give a logdir that can be written") as caught:
        gradwatch.watch(model, optimizer, logdir=logdir, track_loss=True, track_clipping=True)
    assert str(logdir) in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert traces_on(model, optimizer) == before


def test_a_wrong_option_leaves_no_file(tmp_path: Path) -> None:
    model, optimizer = make()
    with pytest.raises(gradwatch.AttachError):
        gradwatch.watch(model, make()[1], logdir=tmp_path)
    with pytest.raises(gradwatch.ConfigError):
        gradwatch.watch(model, optimizer, logdir=tmp_path, on_error="x")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# --- Watches that are closed -------------------------------------------------------------------

USES: dict[str, Callable[[gradwatch.Watch], object]] = {
    "observe": lambda watch: watch.observe(loss=1.0),
    "clip_grad_norm_": lambda watch: watch.clip_grad_norm_(1.0),
    "load_state_dict": lambda watch: watch.load_state_dict({}),
}


@pytest.mark.parametrize("name", USES)
def test_a_closed_watch_cannot_be_used(name: str) -> None:
    model, optimizer = make()
    watch = gradwatch.watch(model, optimizer)
    train(model, optimizer)
    watch.close()
    gradients = [item.grad.clone() for item in model.parameters() if item.grad is not None]
    with pytest.raises(gradwatch.ClosedError, match=rf"Watch\.{name} .* after close\(\); make a"):
        USES[name](watch)
    assert all(
        torch.equal(before, item.grad)  # type: ignore[arg-type]
        for before, item in zip(gradients, model.parameters(), strict=True)
    )


def test_a_closed_watch_can_still_be_read() -> None:
    model, optimizer = make()
    watch = gradwatch.watch(model, optimizer)
    train(model, optimizer)
    watch.close()
    train(model, optimizer)
    assert watch.step == 1
    assert watch.summary().value("gradient_norm_used") is not None
    assert watch.recommendations == watch.summary().recommendations
    assert watch.state_dict()["step"] == 1
    assert watch.model_info.depth == 2
    assert watch.failures == {}


# --- States that cannot be loaded --------------------------------------------------------------


def good_state() -> dict[str, Any]:
    model, optimizer = make()
    with gradwatch.watch(model, optimizer) as watch:
        train(model, optimizer, 2)
    return watch.state_dict()


def test_a_state_is_loaded_before_the_first_step_only() -> None:
    model, optimizer = make()
    watch = gradwatch.watch(model, optimizer)
    train(model, optimizer, 3)
    with pytest.raises(gradwatch.ConfigError, match=r"before the first step.* at step 3; make a"):
        watch.load_state_dict(good_state())
    assert watch.step == 3
    watch.close()


STATES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "newer": (lambda: good_state() | {"version": 99}, ("version 1", "got 99", "another version")),
    "empty": (dict, ("version 1", "got None")),
    "of something else": (lambda: {"state": {}, "param_groups": []}, ("version 1", "got None")),
    "without its step": (
        lambda: {key: value for key, value in good_state().items() if key != "step"},
        ("state", "step"),
    ),
    "without its pipeline": (
        lambda: {key: value for key, value in good_state().items() if key != "pipeline"},
        ("state", "pipeline"),
    ),
    "torn": (lambda: good_state() | {"pipeline": {}}, ("state", "first_report")),
    "no dictionary": (lambda: None, ("state", "NoneType")),
    "of a negative step": (lambda: good_state() | {"step": -1}, ("state", "step", "-1")),
    "of no step": (lambda: good_state() | {"step": "many"}, ("state", "step", "'many'")),
}


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_cannot_be_loaded_is_told_and_changes_nothing(case: str) -> None:
    make_state, pieces = STATES[case]
    model, optimizer = make()
    told = gradwatch.MemorySink()
    watch = gradwatch.watch(
        model, optimizer, every_n_steps=1, log_every_n_steps=1, sinks=[told], on_error="raise"
    )
    with pytest.raises(gradwatch.GradwatchError) as caught:
        watch.load_state_dict(make_state())
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    train(model, optimizer, 2)
    watch.close()
    assert watch.step == 2
    assert [report.step for report in told.reports] == [0, 1]
    assert told.run is not None
    assert told.run.first_step == 0


# --- Things told that make no sense ------------------------------------------------------------

TOLD: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "batch_size 0": ({"batch_size": 0}, ("batch_size", "0")),
    "batch_size -1": ({"batch_size": -1}, ("batch_size", "-1")),
    "batch_size 2.5": ({"batch_size": 2.5}, ("batch_size", "2.5")),
    "losses of a batch": ({"loss": torch.ones(5)}, ("loss", "5")),
    "loss text": ({"loss": "low"}, ("loss", "'low'")),
    "epoch text": ({"epoch": "first"}, ("epoch", "'first'")),
}


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("case", TOLD)
def test_observe_tells_what_it_cannot_use(case: str, sampled: bool) -> None:
    options, pieces = TOLD[case]
    model, optimizer = make()
    watch = gradwatch.watch(model, optimizer)
    if not sampled:
        train(model, optimizer)
    with pytest.raises(gradwatch.ConfigError) as caught:
        watch.observe(**options)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    train(model, optimizer)
    watch.close()
    assert watch.failures == {}
