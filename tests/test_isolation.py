"""A part of the watch that fails is reported once and switched off; the training goes on."""

import errno
import io
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

import gradwatch
from gradwatch.capture.probe.view import ProbeView

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 12
State = Callable[..., dict[str, Any]]
Compare = Callable[[Any, Any], None]


# --- A training --------------------------------------------------------------------------------


def make() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(inplace=True), nn.Dropout(0.1), nn.Linear(16, 2)
    )
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


PROBED: dict[str, Any] = {"loss_fn": loss_fn, "budget": None}


def train(model: nn.Module, optimizer: Optimizer, steps: int = STEPS) -> list[Tensor]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model, torch.randn(5, 6))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.fixture
def unwatched(training_state: State) -> dict[str, Any]:
    model, optimizer = make()
    losses = train(model, optimizer)
    return {"losses": losses, **training_state(model, optimizer)}


class Watched:
    """A watched training, its outcome and its reports."""

    def __init__(self, training_state: State, **options: Any) -> None:
        model, optimizer = make()
        self.told = gradwatch.MemorySink()
        settings: dict[str, Any] = {"every_n_steps": 2, "log_every_n_steps": 4}
        settings |= {"track_loss": True, "track_clipping": True} | PROBED | options
        settings["sinks"] = [*settings.pop("sinks", []), self.told]
        self.watch = gradwatch.watch(model, optimizer, **settings)
        losses = train(model, optimizer)
        self.watch.close()
        self.state = {"losses": losses, **training_state(model, optimizer)}

    @property
    def notes(self) -> str:
        return "\n".join(note for report in self.told.reports for note in report.notes)


# --- Parts that fail ---------------------------------------------------------------------------


class Failing:
    """Raises at the nth call, and ever after."""

    def __init__(self, at: int = 0, error: BaseException | None = None) -> None:
        self.calls = 0
        self.at = at
        self.error = ValueError("that was bad") if error is None else error

    def maybe(self) -> None:
        self.calls += 1
        if self.calls > self.at:
            raise self.error


class BadMonitor(Failing, gradwatch.Monitor):
    metrics = ("bad",)

    @override
    def read(self, view: gradwatch.StepView) -> gradwatch.Reading:
        self.maybe()
        return gradwatch.Reading("bad", torch.tensor(1.0))


class BadHalfway(Failing, gradwatch.Monitor):
    """Gives a reading before it fails."""

    metrics = ("bad",)

    @override
    def read(self, view: gradwatch.StepView) -> Iterable[gradwatch.Reading]:
        yield gradwatch.Reading("bad", torch.tensor(1.0))
        self.maybe()


class BadProbe(Failing, gradwatch.Monitor):
    metrics = ("bad",)
    probed = ("bad_number",)

    @override
    def probe(self, view: ProbeView) -> Mapping[str, Tensor]:
        self.maybe()
        return {"bad_number": view.last.loss()}

    @override
    def read(self, view: gradwatch.StepView) -> list[gradwatch.Reading]:
        number = view.probed.get("bad_number")
        return [] if number is None else [gradwatch.Reading("bad", number)]


class BadDerivation(Failing, gradwatch.Monitor):
    metrics = ("bad",)

    @override
    def read(self, view: gradwatch.StepView) -> list[gradwatch.Reading]:
        return []

    @override
    def derive(
        self,
        step: gradwatch.StepInfo,
        measurements: Sequence[gradwatch.Measurement],
        model: gradwatch.ModelInfo,
    ) -> Iterable[gradwatch.Measurement]:
        self.maybe()
        yield gradwatch.Measurement(metric="bad", scope="model", step=step.step, value=1.0)


class BadBound(Failing, gradwatch.Bound):
    metric = "loss"
    source = "nowhere"

    @override
    def interval(
        self,
        measurement: gradwatch.Measurement,
        step: gradwatch.StepInfo,
        model: gradwatch.ModelInfo,
    ) -> gradwatch.Interval | None:
        self.maybe()
        return None


class BadRule(Failing, gradwatch.Rule):
    @override
    def advise(self, history: gradwatch.History) -> Iterable[gradwatch.Recommendation]:
        self.maybe()
        return []


class BadSink(Failing, gradwatch.Sink):
    @override
    def write(self, report: gradwatch.Report) -> None:
        self.maybe()


class BadOpening(Failing, gradwatch.Sink):
    def __init__(self, at: int = 0) -> None:
        super().__init__(at)
        self.written = 0

    @override
    def open(self, run: gradwatch.RunInfo) -> None:
        self.maybe()

    @override
    def write(self, report: gradwatch.Report) -> None:
        self.written += 1


class BadClosing(Failing, gradwatch.Sink):
    @override
    def write(self, report: gradwatch.Report) -> None:
        pass

    @override
    def close(self) -> None:
        self.maybe()


class FullDisk(Failing, gradwatch.Sink):
    def __init__(self, at: int = 0) -> None:
        super().__init__(at, OSError(errno.ENOSPC, "No space left on device"))

    @override
    def write(self, report: gradwatch.Report) -> None:
        self.maybe()

    @override
    def close(self) -> None:
        self.maybe()


def with_part(part: Any) -> dict[str, Any]:
    """The options of a standard watch that also has this part."""
    presets = gradwatch.presets
    match part:
        case gradwatch.Monitor():
            return {"monitors": [part, *presets.standard()]}
        case gradwatch.Bound():
            return {"bounds": [part, *presets.bounds()]}
        case gradwatch.Rule():
            return {"rules": [part, *presets.rules()]}
        case gradwatch.Sink():
            return {"sinks": [part]}
    return {"on_recommendation": part}


PARTS: list[tuple[Callable[[int], Any], str]] = [
    (BadMonitor, "monitor BadMonitor"),
    (BadHalfway, "monitor BadHalfway"),
    (BadProbe, "probe of monitor BadProbe"),
    (BadDerivation, "monitor BadDerivation"),
    (BadBound, "bound BadBound"),
    (BadRule, "rule BadRule"),
    (BadSink, "sink BadSink"),
    (FullDisk, "sink FullDisk"),
]
IDS = [name for _, name in PARTS]


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(("part", "name"), PARTS, ids=IDS)
def test_a_failing_part_is_named_once_and_switched_off(
    part: Callable[[int], Any],
    name: str,
    at: int,
    training_state: State,
    unwatched: dict[str, Any],
    assert_identical: Compare,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad = part(at)
    watched = Watched(training_state, **with_part(bad))

    assert_identical(unwatched, watched.state)
    told = [item for item in caplog.records if item.getMessage().startswith(f"{name} failed")]
    assert len(told) == 1
    assert told[0].name == "gradwatch"
    assert told[0].levelno == logging.WARNING
    assert str(bad.error) in told[0].getMessage()
    assert Path(__file__).name in told[0].getMessage()
    assert str(bad.error) in watched.watch.failures[name]
    assert bad.calls == at + 1 + (name == "sink FullDisk")  # closing it fails as well


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(("part", "name"), PARTS, ids=IDS)
def test_the_other_parts_keep_working(
    part: Callable[[int], Any], name: str, at: int, training_state: State
) -> None:
    watched = Watched(training_state, **with_part(part(at)))
    healthy = Watched(training_state)
    assert [report.step for report in watched.told.reports] == [0, 4, 8, 10]
    for report, expected in zip(watched.told.reports, healthy.told.reports, strict=True):
        own = [item for item in report.measurements if item.metric != "bad"]
        assert own == list(expected.measurements)
        assert report.verdicts == expected.verdicts
        assert report.recommendations == expected.recommendations


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize(("part", "name"), PARTS, ids=IDS)
def test_a_failure_stands_in_the_notes_from_then_on(
    part: Callable[[int], Any], name: str, at: int, training_state: State
) -> None:
    watched = Watched(training_state, **with_part(part(at)))
    notes = [[item for item in report.notes if name in item] for report in watched.told.reports]
    # A sink fails while it is told of a report, which stands in the next one.
    first = at + name.startswith("sink")
    if "monitor" in name and at:
        first = 1  # a monitor is asked twice before the second report
    assert [len(found) for found in notes] == [0] * first + [1] * (4 - first)
    assert all("is off: " in note for found in notes for note in found)


@pytest.mark.parametrize(("part", "name"), PARTS, ids=IDS)
def test_a_failure_in_the_last_report_stands_in_the_summary(
    part: Callable[[int], Any], name: str, training_state: State
) -> None:
    """Nobody may have to search the log for why a curve has stopped."""
    healthy = part(10**6)
    Watched(training_state, **with_part(healthy))
    calls = healthy.calls - (name == "sink FullDisk")
    watched = Watched(training_state, **with_part(part(calls - 1)))
    assert f"{name} is off" in "\n".join(watched.watch.summary().notes)


@pytest.mark.parametrize(("part", "name"), PARTS, ids=IDS)
def test_raise_lets_the_error_through(part: Callable[[int], Any], name: str) -> None:
    model, optimizer = make()
    bad = part(0)
    options = with_part(bad) | PROBED
    watch = gradwatch.watch(model, optimizer, on_error="raise", track_loss=True, **options)
    with pytest.raises(type(bad.error)) as caught:
        train(model, optimizer)
    assert caught.value is bad.error
    if name == "sink FullDisk":
        bad.at = 10**6
    watch.close()


@pytest.mark.parametrize(("part", "name"), PARTS, ids=IDS)
def test_keyboard_interrupt_passes_through(
    part: Callable[..., Any], name: str, hooks_on: State
) -> None:
    model, optimizer = make()
    bad = part(0)
    bad.error = KeyboardInterrupt()
    watch = gradwatch.watch(model, optimizer, track_loss=True, **with_part(bad) | PROBED)
    with pytest.raises(KeyboardInterrupt):
        train(model, optimizer)
    assert not watch.failures
    bad.at = 10**6
    watch.close()
    assert hooks_on(model, optimizer) == {}


@pytest.mark.parametrize("on_error", ["disable", "raise"])
def test_a_sink_that_cannot_be_closed_does_not_keep_the_others_open(
    on_error: Literal["disable", "raise"], hooks_on: State
) -> None:
    model, optimizer = make()
    first, second, third = BadClosing(), BadClosing(10**6), BadClosing()
    watch = gradwatch.watch(model, optimizer, sinks=[first, second, third], on_error=on_error)
    train(model, optimizer, 1)
    if on_error == "raise":
        with pytest.raises(ValueError, match="that was bad"):
            watch.close()
    else:
        watch.close()
        assert any(part.endswith("sink BadClosing") for part in watch.failures)
    assert (first.calls, second.calls, third.calls) == (1, 1, 1)
    assert hooks_on(model, optimizer) == {}
    watch.close()
    assert first.calls == 1


def test_a_sink_that_cannot_be_opened_gets_no_report(training_state: State) -> None:
    sink = BadOpening()
    watched = Watched(training_state, sinks=[sink])
    assert (sink.calls, sink.written) == (1, 0)
    assert list(watched.watch.failures) == ["sink BadOpening"]


def test_of_two_parts_of_one_class_only_the_bad_one_is_off(training_state: State) -> None:
    bad, good = BadSink(0), BadSink(10**6)
    watched = Watched(training_state, sinks=[bad, good])
    assert (bad.calls, good.calls) == (1, len(watched.told.reports))
    assert len(watched.watch.failures) == 1


def test_of_two_bounds_of_one_class_only_the_bad_one_is_off(training_state: State) -> None:
    bad, good = BadBound(0), BadBound(10**6)
    watched = Watched(training_state, bounds=[good, bad])
    assert (bad.calls, good.calls) == (1, len(watched.told.reports))
    assert list(watched.watch.failures) == ["bound BadBound 2"]


def test_a_callable_for_recommendations_may_fail(
    training_state: State, unwatched: dict[str, Any], assert_identical: Compare
) -> None:
    def tell(item: gradwatch.Recommendation) -> None:
        raise ValueError(f"nobody wants to hear of {item.knob}")

    class Advice(gradwatch.Rule):
        @override
        def advise(self, history: gradwatch.History) -> list[gradwatch.Recommendation]:
            return [gradwatch.Recommendation(knob="clip", reason="to see what happens")]

    watched = Watched(training_state, on_recommendation=tell, rules=[Advice()])
    assert_identical(unwatched, watched.state)
    assert list(watched.watch.failures) == ["on_recommendation"]
    assert len(watched.told.reports) == 4


# --- Parts that return garbage -----------------------------------------------------------------


def reading(values: Any, scopes: Any = ("model",), **more: Any) -> Any:
    return gradwatch.Reading("bad", values, scopes, **more)


GARBAGE: dict[str, Callable[[], Any]] = {
    "an undeclared metric": lambda: gradwatch.Reading("surprise", torch.tensor(1.0)),
    "nothing": lambda: None,
    "a number": lambda: 3.0,
    "a string": lambda: "bad",
    "a tensor": lambda: torch.ones(2),
    "a list of numbers": lambda: [1.0, 2.0],
    "a reading of a number": lambda: reading(1.0),
    "a reading of nothing": lambda: reading(None),
    "too few scopes": lambda: reading(torch.ones(2)),
    "too many scopes": lambda: reading(torch.ones(1), ("a", "b")),
    "scopes that are no names": lambda: reading(torch.ones(2), (1, None)),
    "too many standard errors": lambda: reading(torch.ones(1), standard_errors=torch.ones(3)),
    "a standard error that is a number": lambda: reading(torch.ones(1), standard_errors=0.1),
    "a sparse tensor": lambda: reading(torch.ones(1).to_sparse()),
    "a tensor without memory": lambda: reading(torch.ones(1, device="meta")),
    "complex numbers": lambda: reading(torch.ones(1, dtype=torch.complex64)),
    "no unit": lambda: reading(torch.ones(1), unit=None),
}


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_switches_off_the_monitor_and_nothing_else(
    garbage: str,
    training_state: State,
    unwatched: dict[str, Any],
    assert_identical: Compare,
    tmp_path: Path,
) -> None:
    class Garbage(gradwatch.Monitor):
        metrics = ("bad",)

        @override
        def read(self, view: gradwatch.StepView) -> Any:
            return GARBAGE[garbage]()

    watched = Watched(
        training_state, monitors=[Garbage(), *gradwatch.presets.standard()], logdir=tmp_path
    )
    assert_identical(unwatched, watched.state)
    assert list(watched.watch.failures) == ["monitor Garbage"]
    assert len(watched.told.reports) == 4
    assert len(gradwatch.read(tmp_path).reports) == 4
    assert watched.told.reports[-1].value("loss") is not None


def test_an_undeclared_metric_is_named(training_state: State) -> None:
    class Surprising(gradwatch.Monitor):
        metrics = ("bad",)

        @override
        def read(self, view: gradwatch.StepView) -> gradwatch.Reading:
            return gradwatch.Reading("surprise", torch.tensor(1.0))

    what = Watched(training_state, monitors=[Surprising()]).watch.failures["monitor Surprising"]
    assert "Surprising" in what
    assert "'surprise'" in what
    assert "('bad',)" in what


@pytest.mark.parametrize("result", [None, 3, [3], "advice"])
def test_garbage_of_rules_and_bounds_is_isolated(
    result: Any, training_state: State, unwatched: dict[str, Any], assert_identical: Compare
) -> None:
    class Bound(BadBound):
        @override
        def interval(self, *_: Any) -> Any:
            return result

    class Rule(gradwatch.Rule):
        @override
        def advise(self, history: gradwatch.History) -> Any:
            return result

    watched = Watched(training_state, bounds=[Bound()], rules=[Rule()])
    assert_identical(unwatched, watched.state)
    expected = {"rule Rule"} | ({"bound Bound"} if result is not None else set())
    assert set(watched.watch.failures) == expected
    assert len(watched.told.reports) == 4


# --- A full disk -------------------------------------------------------------------------------


class FullFile(io.BytesIO):
    @override
    def write(self, *_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_does_not_stop_the_training(
    after: int,
    training_state: State,
    unwatched: dict[str, Any],
    assert_identical: Compare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full before, between and after the reports; what was written can be read."""

    class Filling(gradwatch.Sink):
        seen = 0

        @override
        def open(self, run: gradwatch.RunInfo) -> None:
            self.fill()

        @override
        def write(self, report: gradwatch.Report) -> None:
            self.seen += 1
            self.fill()

        def fill(self) -> None:
            if self.seen == after and jsonl._file is not None:
                kept.append(jsonl._file)
                monkeypatch.setattr(jsonl, "_file", FullFile())

    jsonl = gradwatch.JsonlSink(tmp_path)
    kept: list[Any] = []
    watched = Watched(training_state, sinks=[jsonl, Filling()])
    kept[0].close()
    assert_identical(unwatched, watched.state)
    assert list(watched.watch.failures) == ["sink JsonlSink"]
    assert "No space left on device" in watched.watch.failures["sink JsonlSink"]
    assert len(watched.told.reports) == 4
    assert len(gradwatch.read(tmp_path).reports) == after + (after == 0)


def test_a_folder_that_is_taken_away_does_not_stop_the_training(
    training_state: State, unwatched: dict[str, Any], assert_identical: Compare, tmp_path: Path
) -> None:
    class Vandal(gradwatch.Monitor):
        metrics = ("bad",)

        @override
        def read(self, view: gradwatch.StepView) -> list[gradwatch.Reading]:
            if view.step == 0:
                folder.rmdir()
                folder.write_text("in the way")
            return []

    folder = tmp_path / "run"
    jsonl = gradwatch.JsonlSink(folder)
    watched = Watched(training_state, monitors=[Vandal()], sinks=[jsonl])
    assert_identical(unwatched, watched.state)
    assert list(watched.watch.failures) == ["sink JsonlSink"]


# --- Hooks that fail ---------------------------------------------------------------------------


def explode(*_: Any, **__: Any) -> Any:
    raise RuntimeError("a defect in gradwatch itself")


DEFECTS = [
    "step.gradient.norms",
    "step.gradient.scaler_state",
    "step.gradient.GradientCapture.stepped",
    "forward.layers.norm",
    "forward.layers.first_tensor",
    "forward.layers.link_layers",
    "forward.layers.LayerCapture._attach",
    "forward.links.first_tensor",
    "forward.links.trace_link",
    "forward.links.LinkTrace.see",
    "forward.links.LinkTrace.finish",
    "forward.links.LinkTrace._see_dropout",
    "forward.gain.GainTap.see",
    "forward.gain.GainTap.finish",
    "forward.gain.GainTap.take",
    "sample.settings_of",
    "sample.Sample.complete",
    "session.collect",
    "model.parameters.ParameterTable.of",
    "forward.gate.ForwardGate._count",
    "forward.gate.ForwardGate._take_loss",
    "step.told.Told.add_backward_loss",
    "step.clipping.ClippingRecord.record",
    "step.clipping.ClippingRecord.undo",
    "step.gradient.GradientCapture.read_moments",
    "step.microbatch.tap.MicrobatchTap._open_or_close",
    "step.microbatch.capture.MicrobatchCapture.begin_step",
    "step.microbatch.capture.MicrobatchCapture.take",
    "sample.independent_gradients",
    "session.ProbeView",
    "probe.batch.LastBatch.called",
    "probe.probes.Probes.begin_step",
    "probe.probes.Probes.run",
    "probe.probes.Probes.take",
    "probe.probes.Probes.read",
    "probe.probes.Probes.use",
    "probe.probes.autocast_type",
    "probe.schedule.Schedule.due",
    "probe.schedule.Schedule.ran",
    "probe.schedule.Schedule.next_due",
    "probe.stopwatch.Stopwatch.time",
    "probe.stopwatch.Stopwatch.seconds",
]
ONLY_AT_FIRST = {
    # The gradients of the first step were no micro-batches, so nobody listens any more.
    *(name for name in DEFECTS if name.startswith("step.microbatch.capture")),
    "forward.layers.link_layers",
    *(name for name in DEFECTS if name.startswith("forward.links")),
}
ONLY_LATER = {  # before the training an error may be raised
    "model.parameters.ParameterTable.of",
    "step.microbatch.tap.MicrobatchTap._open_or_close",
}
CASES = [
    (name, late)
    for name in DEFECTS
    for late in (False, True)
    if not (late and name in ONLY_AT_FIRST) and (late or name not in ONLY_LATER)
]


@pytest.mark.parametrize(("name", "late"), CASES)
def test_a_defect_in_a_hook_leaves_the_training_alone(
    name: str,
    late: bool,
    training_state: State,
    unwatched: dict[str, Any],
    assert_identical: Compare,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Vandal(gradwatch.Monitor):
        """Breaks the function once the first step has been seen."""

        metrics = ("bad",)

        @override
        def read(self, view: gradwatch.StepView) -> list[gradwatch.Reading]:
            monkeypatch.setattr(f"gradwatch.capture.{name}", explode)
            return []

    if not late:
        monkeypatch.setattr(f"gradwatch.capture.{name}", explode)
    monitors = [*gradwatch.presets.standard(), *([Vandal()] if late else [])]
    watched = Watched(training_state, monitors=monitors)
    assert_identical(unwatched, watched.state)
    assert len(watched.watch.failures) == 1
    assert "a defect in gradwatch itself" in next(iter(watched.watch.failures.values()))
    assert len([item for item in caplog.records if "switched off" in item.getMessage()]) == 1


SECOND = {"Sharpness", "BatchSharpness"}
DIFFERENTIATE = {"GradientNoise", "Smoothness", "DropoutNoise", *SECOND}
PROBE_DEFECTS = {
    "probes.undisturbed": {*DIFFERENTIATE, "InputStatistics"},
    "undisturbed.kept_attributes": {*DIFFERENTIATE, "InputStatistics"},
    "kept._refill_mapping": {*DIFFERENTIATE, "InputStatistics"},
    "objective.substituted": DIFFERENTIATE,
    "objective.Objective.parameters": DIFFERENTIATE,
    "objective.Objective.hessian": SECOND,
    "view.Curvature": SECOND,
}


@pytest.mark.parametrize("name", PROBE_DEFECTS)
def test_a_defect_in_a_probe_leaves_the_training_alone(
    name: str,
    training_state: State,
    unwatched: dict[str, Any],
    assert_identical: Compare,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each probe that comes across it is off, and all else is on."""
    monkeypatch.setattr(f"gradwatch.capture.probe.{name}", explode)
    watched = Watched(training_state)
    assert_identical(unwatched, watched.state)
    assert set(watched.watch.failures) == {
        f"probe of monitor {monitor}" for monitor in PROBE_DEFECTS[name]
    }
    last = watched.told.reports[-1]
    assert last.value("gradient_norm") is not None
    assert last.value("gradient_square") is not None  # from the state of Adam


def test_a_failing_capture_is_told_at_the_end(
    training_state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwatch.capture.step.gradient.norms", explode)
    watch = Watched(training_state).watch
    assert "capture is off: RuntimeError" in str(watch.summary())


# --- States ------------------------------------------------------------------------------------


class BadState(BadMonitor):
    def __init__(self, *, saving: bool) -> None:
        super().__init__(10**6)
        self.saving = saving

    @override
    def state_dict(self) -> dict[str, Any]:
        return explode() if self.saving else {"seen": 3}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        explode()


@pytest.mark.parametrize("saving", [False, True], ids=["loading", "saving"])
def test_a_monitor_whose_state_fails_does_not_lose_the_others(saving: bool) -> None:
    class Counter(gradwatch.Monitor):
        metrics = ("seen",)
        seen = 0

        @override
        def read(self, view: gradwatch.StepView) -> gradwatch.Reading:
            self.seen += 1
            return gradwatch.Reading("seen", torch.tensor(float(self.seen)))

        @override
        def state_dict(self) -> dict[str, Any]:
            return {"seen": self.seen}

        @override
        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.seen = state["seen"]

    options: dict[str, Any] = {"every_n_steps": 1, "log_every_n_steps": 1}
    model, optimizer = make()
    with gradwatch.watch(
        model, optimizer, monitors=[BadState(saving=saving), Counter()], **options
    ) as watch:
        train(model, optimizer, 3)
        state = watch.state_dict()
        assert ("monitor BadState" in watch.failures) == saving
    told = gradwatch.MemorySink()
    again = gradwatch.watch(
        model, optimizer, monitors=[BadState(saving=saving), Counter()], sinks=[told], **options
    )
    again.load_state_dict(state)
    train(model, optimizer, 1)
    again.close()
    assert told.reports[0].value("seen") == 4
    assert ("monitor BadState" in again.failures) == (not saving)
