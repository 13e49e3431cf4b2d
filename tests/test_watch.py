"""The watch as a user meets it: when it reports, what it says, how it ends and resumes."""

import gc
import inspect
import json
import os
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from typing_extensions import override

import gradwatch

pytestmark = pytest.mark.usefixtures("one_thread")

State = Callable[..., dict[str, Any]]


def make(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    return model, Adam(model.parameters(), lr=0.01)


def train(model: nn.Module, optimizer: Optimizer, steps: int, batch: int = 5) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(batch, 6)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def watched(**options: Any) -> tuple[nn.Module, Optimizer, gradwatch.Watch, gradwatch.MemorySink]:
    model, optimizer = make()
    told = gradwatch.MemorySink()
    settings: dict[str, Any] = {"on_error": "raise", "track_loss": True} | options
    return model, optimizer, gradwatch.watch(model, optimizer, sinks=[told], **settings), told


def values(report: gradwatch.Report) -> set[tuple[str, str]]:
    return {(item.metric, item.scope) for item in report.measurements}


# --- When it reports ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "log", "steps", "expected"),
    [
        (1, 1, 3, [[0], [1], [2]]),
        (1, 3, 7, [[0], [1, 2, 3], [4, 5, 6]]),
        (1, 3, 6, [[0], [1, 2, 3], [4, 5]]),
        (2, 4, 9, [[0], [2, 4], [6, 8]]),
        (2, 4, 12, [[0], [2, 4], [6, 8], [10]]),
        (3, 3, 8, [[0], [3], [6]]),
        (10, 50, 5, [[0]]),
        (10, 50, 11, [[0], [10]]),
        (10, 50, 0, []),
        (7, 7, 1, [[0]]),
    ],
)
def test_reports_come_at_multiples_and_at_the_end(
    every: int, log: int, steps: int, expected: list[list[int]]
) -> None:
    model, optimizer, watch, told = watched(every_n_steps=every, log_every_n_steps=log)
    train(model, optimizer, steps)
    assert watch.step == steps
    watch.close()
    assert [[info.step for info in report.steps] for report in told.reports] == expected
    assert [report.step for report in told.reports] == [group[-1] for group in expected]
    for report in told.reports:
        assert {item.step for item in report.measurements} == {info.step for info in report.steps}


def test_the_defaults_are_those_of_the_signature() -> None:
    defaults = inspect.signature(gradwatch.watch).parameters
    every, log = (defaults[name].default for name in ("every_n_steps", "log_every_n_steps"))
    model, optimizer, watch, told = watched()
    train(model, optimizer, log + 2)
    watch.close()
    expected = [[0], list(range(every, log + 1, every))]
    assert [[info.step for info in report.steps] for report in told.reports] == expected


def test_the_loss_of_each_step_is_told() -> None:
    model, optimizer, watch, told = watched(every_n_steps=1, log_every_n_steps=4)
    losses = train(model, optimizer, 9)
    watch.close()
    found = [info.loss for report in told.reports for info in report.steps]
    assert found == pytest.approx(losses, rel=1e-6)
    measured = [item for report in told.reports for item in report.measurements]
    assert [item.value for item in measured if item.metric == "loss"] == pytest.approx(losses)


def test_leaving_the_block_closes(hooks_on: State) -> None:
    model, optimizer = make()
    told = gradwatch.MemorySink()
    with gradwatch.watch(
        model, optimizer, sinks=[told], every_n_steps=1, log_every_n_steps=10
    ) as watch:
        train(model, optimizer, 5)
    assert hooks_on(model, optimizer) == {}
    assert [report.step for report in told.reports] == [0, 4]
    train(model, optimizer, 5)
    assert watch.step == 5


def test_an_error_in_the_block_is_the_users_own(hooks_on: State) -> None:
    model, optimizer = make()
    told = gradwatch.MemorySink()
    error = KeyError("mine")

    def fail() -> None:
        options: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 10, "sinks": [told]}
        with gradwatch.watch(model, optimizer, **options):
            train(model, optimizer, 3)
            raise error

    with pytest.raises(KeyError) as caught:
        fail()
    assert caught.value is error
    assert hooks_on(model, optimizer) == {}
    assert [report.step for report in told.reports] == [0, 2]


def test_closing_twice_is_closing_once() -> None:
    class Counting(gradwatch.MemorySink):
        closed = 0

        @override
        def close(self) -> None:
            self.closed += 1

    model, optimizer = make()
    sink = Counting()
    watch = gradwatch.watch(model, optimizer, sinks=[sink], every_n_steps=1)
    train(model, optimizer, 3)
    watch.close()
    watch.close()
    with watch:
        pass
    assert (sink.closed, len(sink.reports)) == (1, 2)


def test_sinks_are_opened_before_the_first_report_with_all_that_is_known() -> None:
    model, optimizer, watch, told = watched(train_size=1000, planned_steps=70, every_n_steps=10)
    assert told.run is None
    train(model, optimizer, 1)
    watch.close()
    assert told.run is not None
    assert told.run.first_step == 0
    assert told.run.model == watch.model_info
    assert (told.run.model.train_size, told.run.model.planned_steps) == (1000, 70)
    assert [layer.activation for layer in told.run.model.layers] == ["relu", None]
    assert told.run.model.layers[0].weight_variance is not None
    assert told.run.configuration["every_n_steps"] == 10
    assert set(told.run.metrics) >= {item.metric for item in told.reports[0].measurements}
    assert told.run.versions["torch"] == torch.__version__


# --- What it says ------------------------------------------------------------------------------


def test_a_summary_before_the_first_step_says_so() -> None:
    _, _, watch, _ = watched()
    summary = watch.summary()
    assert (summary.step, summary.measurements, summary.verdicts) == (0, (), ())
    assert summary.notes == ("nothing has been measured yet",)
    assert "nothing has been measured yet" in str(summary)
    assert watch.recommendations == ()
    watch.close()
    assert watch.summary() == summary


def test_the_summary_has_the_newest_value_of_everything() -> None:
    model, optimizer, watch, told = watched(every_n_steps=1, log_every_n_steps=2)
    train(model, optimizer, 6)
    watch.close()
    summary = watch.summary()
    assert summary.step == 5
    assert values(summary) == {pair for report in told.reports for pair in values(report)}
    for item in summary.measurements:
        newest = [report.value(item.metric, item.scope) for report in told.reports]
        assert item.value == [value for value in newest if value is not None][-1]
    bounds = {verdict.bound for report in told.reports for verdict in report.verdicts}
    assert {verdict.bound for verdict in summary.verdicts} == bounds
    assert "gradient_norm_used" in str(summary)


SELECTIONS: list[tuple[list[str] | None, list[str] | None, set[str]]] = [
    (["loss"], None, {"loss/model"}),
    (["loss", "update_norm"], None, {"loss/model", "update_norm/model"}),
    (
        ["gradient_norm_used/0.*"],
        None,
        {"gradient_norm_used/0.weight", "gradient_norm_used/0.bias"},
    ),
    (
        ["gradient_norm_used/*.bias", "loss/model"],
        ["*/3.*"],
        {"gradient_norm_used/0.bias", "loss/model"},
    ),
    (["activation_*/3"], None, {"activation_norm/3"}),
    (
        ["*/model"],
        ["nonfinite_*", "u*", "*_ratio", "gain_*"],
        {"loss/model", "gradient_norm_used/model", "batch_size/model", "parameter_norm/model"},
    ),
    (["loss"], ["loss"], set()),
]


@pytest.mark.parametrize(("include", "exclude", "expected"), SELECTIONS)
def test_only_what_is_wanted_is_reported(
    include: list[str] | None, exclude: list[str] | None, expected: set[str]
) -> None:
    model, optimizer, watch, told = watched(include=include, exclude=exclude)
    train(model, optimizer, 1)
    watch.close()
    assert {f"{metric}/{scope}" for metric, scope in values(told.reports[0])} == expected


def test_what_nobody_wants_is_not_measured(hooks_on: State) -> None:
    """Without a metric that needs them, there is no hook on a layer even in a sampled forward."""
    seen: list[int] = []

    class Looking(nn.Module):
        def forward(self, tensor: Tensor) -> Tensor:
            seen.append(len(hooks_on(model)))
            return tensor

    counts = []
    for include in (["loss", "gradient_norm_used"], None):
        model, _ = make()
        model.append(Looking())  # type: ignore[operator]
        optimizer = SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(model, optimizer, include=include):
            train(model, optimizer, 1)
        counts.append(seen[-1])
    assert counts[0] < counts[1]


class Script(gradwatch.Rule):
    """Recommends what stands in a script, report by report."""

    def __init__(self, *reports: Sequence[tuple[str, str, str]]) -> None:
        self.reports = reports

    @override
    def advise(self, history: gradwatch.History) -> Iterable[gradwatch.Recommendation]:
        place = min(len(history), len(self.reports)) - 1
        return [
            gradwatch.Recommendation(
                knob=knob,  # type: ignore[arg-type]
                scope=scope,
                severity=severity,  # type: ignore[arg-type]
                reason=f"because of {severity}",
                source="a script",
            )
            for knob, scope, severity in self.reports[place]
        ]


SCRIPT = Script(
    [("clip", "model", "info")],
    [("clip", "model", "info"), ("width", "0", "advice")],
    [("clip", "model", "advice"), ("width", "0", "advice"), ("width", "1", "warning")],
    [("width", "1", "warning")],
    [("clip", "model", "advice"), ("width", "1", "advice")],
)


def scripted(on_recommendation: Any) -> tuple[nn.Module, Optimizer, gradwatch.Watch]:
    model, optimizer, watch, _ = watched(
        every_n_steps=1,
        log_every_n_steps=1,
        monitors=[gradwatch.presets.essentials()[0]],
        rules=[SCRIPT],
        on_recommendation=on_recommendation,
    )
    return model, optimizer, watch


def test_collect_says_nothing() -> None:
    model, optimizer, watch = scripted("collect")
    train(model, optimizer, 3)  # a warning would be an error
    assert [(item.knob, item.scope) for item in watch.recommendations] == [
        ("width", "1"),
        ("clip", "model"),
        ("width", "0"),
    ]
    assert [item.since_step for item in watch.recommendations] == [2, 0, 1]
    train(model, optimizer, 1)
    assert [item.since_step for item in watch.recommendations] == [2]
    train(model, optimizer, 1)
    assert [(item.knob, item.since_step) for item in watch.recommendations] == [
        ("clip", 4),
        ("width", 2),
    ]
    watch.close()


def test_warn_warns_from_advice_on_once_and_again_if_it_gets_worse() -> None:
    model, optimizer, watch = scripted("warn")
    expected = [
        [],
        ["width of 0: because of advice [a script]"],
        [
            "width of 1: because of warning [a script]",
            "clip of model: because of advice [a script]",
        ],
        [],
        [],
    ]
    for texts in expected:
        if not texts:
            train(model, optimizer, 1)
            continue
        with pytest.warns(gradwatch.GradwatchWarning) as caught:
            train(model, optimizer, 1)
        assert [str(item.message) for item in caught] == texts
    watch.close()


def test_raise_raises_out_of_the_step_and_the_training_can_go_on() -> None:
    model, optimizer, watch = scripted("raise")
    train(model, optimizer, 1)
    before = model[0].weight.detach().clone()  # type: ignore[index]
    with pytest.raises(gradwatch.AdviceError, match=r"width of 0: because of advice \[a script\]"):
        train(model, optimizer, 1)
    assert not torch.equal(model[0].weight, before)  # type: ignore[index]  # the step was taken
    assert watch.step == 2
    with pytest.raises(gradwatch.AdviceError, match="width of 1"):
        train(model, optimizer, 1)
    assert watch.step == 3
    # Each report says one thing at most: what it did not come to say is said by the next one.
    train(model, optimizer, 1)
    with pytest.raises(gradwatch.AdviceError, match="clip of model"):
        train(model, optimizer, 1)
    train(model, optimizer, 2)
    assert watch.step == 7
    assert not watch.failures
    watch.close()


def test_raise_at_the_end_still_closes(hooks_on: State) -> None:
    class Closing(gradwatch.Sink):
        closed = False

        @override
        def write(self, report: gradwatch.Report) -> None:
            pass

        @override
        def close(self) -> None:
            self.closed = True

    model, optimizer = make()
    sink = Closing()
    watch = gradwatch.watch(
        model,
        optimizer,
        sinks=[sink],
        every_n_steps=1,
        rules=[Script([], [("clip", "model", "warning")])],
        on_recommendation="raise",
        track_loss=True,
    )
    train(model, optimizer, 3)
    with pytest.raises(gradwatch.AdviceError):
        watch.close()
    assert hooks_on(model, optimizer) == {}
    assert sink.closed
    watch.close()


def test_a_callable_gets_each_once() -> None:
    told: list[tuple[str, str, str]] = []

    def tell(item: gradwatch.Recommendation) -> None:
        told.append((item.knob, item.scope, item.severity))

    model, optimizer, watch = scripted(tell)
    train(model, optimizer, 6)
    watch.close()
    assert told == [
        ("clip", "model", "info"),
        ("width", "0", "advice"),
        ("width", "1", "warning"),
        ("clip", "model", "advice"),
    ]


# --- How it resumes ----------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "every_n_steps": 2,
    "log_every_n_steps": 4,
    "track_loss": True,
    "track_clipping": True,
    "on_error": "raise",
}


def fading(seed: int = 0) -> tuple[nn.Module, Optimizer]:
    """A deep net whose initialisation lets the signal die."""
    torch.manual_seed(seed)
    layers = [[nn.Linear(32, 32), nn.ReLU()] for _ in range(6)]
    model = nn.Sequential(*[part for pair in layers for part in pair], nn.Linear(32, 2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3 * (2 / 32) ** 0.5 if name.endswith("weight") else 1e-3)
    return model, Adam(model.parameters(), lr=1e-3)


def learn(model: nn.Module, optimizer: Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(9, 32)) - 1).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def curves(logdir: Path) -> dict[tuple[str, str, int], float]:
    """Every number of the record; none may be there twice."""
    run = gradwatch.read(logdir)
    found = [item for report in run.reports for item in report.measurements]
    numbers = {(item.metric, item.scope, item.step): item.value for item in found}
    assert len(numbers) == len(found)
    return numbers


def settings(logdir: Path) -> list[gradwatch.StepInfo]:
    return [info for report in gradwatch.read(logdir).reports for info in report.steps]


@pytest.mark.parametrize("ending", ["closed", "killed"])
@pytest.mark.parametrize("first", [0, 1, 5, 8, 10, 11])
def test_a_resumed_run_records_what_an_uninterrupted_one_does(
    first: int, ending: Literal["closed", "killed"], tmp_path: Path
) -> None:
    steps = 20
    model, optimizer = fading()
    with gradwatch.watch(model, optimizer, logdir=tmp_path / "whole", **OPTIONS) as whole:
        learn(model, optimizer, steps)

    model, optimizer = fading()
    watch = gradwatch.watch(model, optimizer, logdir=tmp_path / "parts", **OPTIONS)
    learn(model, optimizer, first)
    state = json.loads(json.dumps(watch.state_dict()))  # plain values only
    checkpoint = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state())
    checkpoint = torch.load(_saved(checkpoint, tmp_path), weights_only=True)
    if ending == "killed":
        learn(model, optimizer, 5)  # these steps are lost with all that came after the checkpoint
        assert watch.step == first + 5
    else:
        watch.close()

    model, optimizer = fading(seed=1)
    again = gradwatch.watch(model, optimizer, logdir=tmp_path / "parts", **OPTIONS)
    again.load_state_dict(state)
    model.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    torch.set_rng_state(checkpoint[2])
    assert again.step == first
    learn(model, optimizer, steps - first)
    again.close()

    assert curves(tmp_path / "parts") == curves(tmp_path / "whole")
    assert settings(tmp_path / "parts") == settings(tmp_path / "whole")
    assert again.recommendations == whole.recommendations
    advice = again.recommendations[0]
    assert (advice.knob, advice.severity, advice.since_step) == ("init", "warning", 0)
    assert again.model_info == whole.model_info
    assert gradwatch.read(tmp_path / "parts").header.first_step == first
    watch.close()


def _saved(checkpoint: Any, folder: Path) -> Path:
    torch.save(checkpoint, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_advice_on_the_initialisation_survives_many_resumes(tmp_path: Path) -> None:
    model, optimizer = fading()
    state = None
    for part in range(4):
        watch = gradwatch.watch(model, optimizer, **OPTIONS)
        if state is not None:
            watch.load_state_dict(state)
        learn(model, optimizer, 5)
        state = watch.state_dict()
        watch.close()
        assert watch.step == 5 * (part + 1)
        assert ("init", 0) in [(item.knob, item.since_step) for item in watch.recommendations]


def test_a_trained_model_is_no_initialisation() -> None:
    """Whether the checkpoint is loaded before or after the watch is made."""
    model, optimizer = fading()
    learn(model, optimizer, 1)
    states = [model.state_dict(), optimizer.state_dict()]
    for late in (False, True):
        model, optimizer = fading()
        if not late:
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        watch = gradwatch.watch(model, optimizer, **OPTIONS)
        if late:
            model.load_state_dict(states[0])
            optimizer.load_state_dict(states[1])
        learn(model, optimizer, 1)
        watch.close()
        assert not watch.model_info.untouched_optimizer
        assert watch.recommendations == ()


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop", "NAdam", "LBFGS"])
def test_an_optimizer_that_has_not_stepped_is_untouched(name: str) -> None:
    """Adagrad has a state from the beginning."""
    model, _ = fading()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(torch.randn(9, 32)) - 1).square().mean()
        loss.backward()
        return loss

    found = []
    for _ in range(2):
        with gradwatch.watch(model, optimizer, **OPTIONS) as watch:
            optimizer.step(closure)
        found.append((watch.model_info.untouched_optimizer, bool(watch.recommendations)))
    # Plain SGD keeps nothing from which one could know.
    assert found == [(True, True), (name == "SGD", found[1][1])]


def test_state_dict_holds_plain_values_at_any_time() -> None:
    model, optimizer, watch, _ = watched(every_n_steps=1, log_every_n_steps=3)
    for _ in range(5):
        state = watch.state_dict()
        assert json.loads(json.dumps(state)) == state
        train(model, optimizer, 1)
    watch.close()


# --- How it ends -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_closed_watch_does_not_keep_the_model_alive(steps: int) -> None:
    model, optimizer, watch, _ = watched(every_n_steps=1, log_every_n_steps=3, track_clipping=True)
    train(model, optimizer, steps)
    watch.close()
    objects = [*model.modules(), *model.parameters(), optimizer]
    there: list[weakref.ref[Any]] = [weakref.ref(item) for item in objects]
    del model, optimizer, objects
    gc.collect()
    assert [item() for item in there] == [None] * len(there)
    assert watch.step == steps
    watch.summary()


def test_an_open_watch_that_nobody_holds_goes_with_its_model() -> None:
    model, optimizer = make()
    watch = gradwatch.watch(model, optimizer)
    there: list[weakref.ref[Any]] = [weakref.ref(watch), weakref.ref(model)]
    del watch
    train(model, optimizer, 3)
    gc.collect()
    assert there[0]() is not None  # it watches although nobody holds it
    del model, optimizer
    gc.collect()
    assert [item() for item in there] == [None, None]


SCRIPTS = {
    "exception": "raise ValueError('mine')",
    "exit": "sys.exit(3)",
    "gone": "del watch, model, optimizer",
    "forked": "os.fork() or sys.exit(); os.wait()",
}


@pytest.mark.parametrize(
    "ending", [name for name in SCRIPTS if name != "forked" or hasattr(os, "fork")]
)
def test_the_end_of_the_interpreter_closes(ending: str, tmp_path: Path) -> None:
    script = f"""
import os
import sys
import torch
import gradwatch
torch.set_num_threads(1)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watch = gradwatch.watch(
    model, optimizer, logdir={str(tmp_path)!r}, every_n_steps=1, log_every_n_steps=100,
    track_loss=True,
)
for _ in range(8):
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
{SCRIPTS[ending]}
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == {"exception": 1, "exit": 3}.get(ending, 0)
    error = done.stderr.splitlines()
    assert error[-1:] == (["ValueError: mine"] if ending == "exception" else [])
    reports = gradwatch.read(tmp_path).reports
    assert [report.step for report in reports] == [0, 7]


# --- Several at once ---------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_watches_of_several_models_do_not_disturb_each_other(
    order: tuple[int, ...], traces_on: State
) -> None:
    sizes = [3, 4, 5]
    pairs = [make(seed) for seed in range(3)]
    before = [traces_on(*pair) for pair in pairs]
    sinks = [gradwatch.MemorySink() for _ in pairs]
    watches = [
        gradwatch.watch(
            *pair,
            sinks=[sink],
            every_n_steps=1,
            log_every_n_steps=1,
            track_loss=True,
            track_clipping=True,
            on_error="raise",
        )
        for pair, sink in zip(pairs, sinks, strict=True)
    ]
    losses: list[list[float]] = [[], [], []]
    for _ in range(3):
        for number, (model, optimizer) in enumerate(pairs):
            losses[number] += train(model, optimizer, 1, batch=sizes[number])
    for number in order:
        watches[number].close()
    for number, sink in enumerate(sinks):
        assert [report.info.batch_size for report in sink.reports] == [sizes[number]] * 3
        assert [report.info.loss for report in sink.reports] == pytest.approx(losses[number])
    assert [traces_on(*pair) for pair in pairs] == before


def test_two_parts_of_a_model_can_have_a_watch_each() -> None:
    model, _ = make()
    first, last = model[0], model[3]  # type: ignore[index]
    optimizers = [SGD(first.parameters(), lr=0.1), SGD(last.parameters(), lr=0.1)]
    sinks = [gradwatch.MemorySink(), gradwatch.MemorySink()]
    watches = [
        gradwatch.watch(part, optimizer, sinks=[sink], on_error="raise")
        for part, optimizer, sink in zip((first, last), optimizers, sinks, strict=True)
    ]
    model(torch.randn(5, 6)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    for watch in watches:
        watch.close()
    for sink in sinks:
        named = {scope for metric, scope in values(sink.reports[0]) if scope != "model"}
        assert {"weight", "bias"} <= named
        assert ("activation_norm", "root") in values(sink.reports[0])


def test_a_patch_of_somebody_else_stays() -> None:
    """Another tool wraps the same function while the watch is open."""
    seen: list[str] = []
    model, optimizer = make()
    original = torch.autograd.backward
    watch = gradwatch.watch(model, optimizer, track_loss=True)
    inner = torch.autograd.backward

    def other(*args: Any, **kwargs: Any) -> None:
        seen.append("other")
        inner(*args, **kwargs)

    torch.autograd.backward = other
    try:
        train(model, optimizer, 1)
        watch.close()
        assert torch.autograd.backward is other
        train(model, optimizer, 1)
        with gradwatch.watch(
            model, optimizer, track_loss=True, every_n_steps=1, on_error="raise"
        ) as again:
            (loss,) = train(model, optimizer, 1)
        assert again.summary().value("loss") == pytest.approx(loss)
        assert torch.autograd.backward is other
    finally:
        torch.autograd.backward = original
    assert seen == ["other"] * 3


# --- Models of all kinds -----------------------------------------------------------------------


class NoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return self.weight.square().sum()


def test_a_model_without_inputs_has_no_batch_size() -> None:
    model = NoInput()
    optimizer = SGD(model.parameters(), lr=0.1)
    told = gradwatch.MemorySink()
    with gradwatch.watch(
        model, optimizer, sinks=[told], every_n_steps=1, log_every_n_steps=1, on_error="raise"
    ) as watch:
        for number in range(3):
            model().backward()
            if number == 1:
                watch.observe(batch_size=7)
            optimizer.step()
    assert [report.info.batch_size for report in told.reports] == [None, 7, None]
    assert told.reports[0].value("lr_batch_ratio") is None
    assert told.reports[1].value("lr_batch_ratio") == pytest.approx(0.1 / 7)
    assert "batch_size: the model's inputs do not show it" in "\n".join(told.reports[0].notes)


def test_a_model_that_is_a_single_layer_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    told = gradwatch.MemorySink()
    optimizer = SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[told], on_error="raise"):
        values = torch.randn(4, 6)
        output = model(values)
        output.sum().backward()
        optimizer.step()
    expected = output.double().square().sum(1).mean().sqrt().item()
    assert told.reports[0].value("activation_norm", "root") == pytest.approx(expected, rel=1e-5)


class OwnLoss(nn.Module):
    """A model that computes its own loss, as those of transformers do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 2)
        self.kind = kind

    def forward(self, *, values: Tensor, labels: Tensor | None = None) -> Any:
        loss = (self.inner(values) - 1).square().mean()
        if self.kind == "mapping":
            return {"loss": loss, "logits": None}
        return Output(loss)


class Output:
    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


@pytest.mark.parametrize("kind", ["mapping", "attribute"])
def test_the_loss_of_a_model_that_computes_it_is_found(kind: str) -> None:
    model = OwnLoss(kind)
    optimizer = SGD(model.parameters(), lr=0.1)
    told = gradwatch.MemorySink()
    losses = []
    with gradwatch.watch(
        model, optimizer, sinks=[told], every_n_steps=1, log_every_n_steps=1, on_error="raise"
    ):
        for _ in range(2):
            parts = []
            for _ in range(2):
                output = model(values=torch.randn(4, 6))
                loss = output["loss"] if kind == "mapping" else output.loss
                (loss / 2).backward()
                parts.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(parts) / 2)
    assert [report.info.loss for report in told.reports] == pytest.approx(losses)
    assert [report.info.batch_size for report in told.reports] == [8, 8]


def test_a_loss_that_nobody_tells_is_said_to_be_missing() -> None:
    model, optimizer, watch, told = watched(track_loss=False)
    train(model, optimizer, 1)
    watch.close()
    assert told.reports[0].value("loss") is None
    assert told.reports[0].info.loss is None
    assert "pass track_loss=True or call watch.observe" in "\n".join(told.reports[0].notes)
