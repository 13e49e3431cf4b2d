"""gradwatch in TensorBoard: event files as TensorBoard reads them."""

import math
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gradwatch import presets
from gradwatch.errors import ConfigError, MissingExtraError, RecordError
from gradwatch.records import (
    Interval,
    Measurement,
    ModelInfo,
    Recommendation,
    Report,
    RunInfo,
    StepInfo,
    Verdict,
)
from gradwatch_tensorboard import TensorBoardSink

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

Points = list[tuple[int, float]]
LAYOUT = "custom_scalars__config__"


class FakeWriter:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.scalars: dict[str, Points] = {}
        self.texts: dict[str, list[tuple[int, str]]] = {}
        self.flushed = 0
        self.closed = False

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        assert type(scalar_value) is float
        self.scalars.setdefault(tag, []).append((global_step, scalar_value))

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        self.texts.setdefault(tag, []).append((global_step, text_string))

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed = True


def measured(
    value: float = 0.5, *, metric: str = "loss", scope: str = "model", step: int = 10
) -> Measurement:
    return Measurement(metric=metric, scope=scope, step=step, value=value)


def judged(measurement: Measurement, **interval: Any) -> Verdict:
    return Verdict.of(measurement, Interval(**interval), bound="B", source="here")


def report(*measurements: Measurement, verdicts: Sequence[Verdict] = ()) -> Report:
    step = max((item.step for item in measurements), default=10)
    return Report(step=step, measurements=measurements, verdicts=tuple(verdicts))


def run(first_step: int = 0, metrics: Sequence[str] = (), bounded: Sequence[str] = ()) -> RunInfo:
    return RunInfo(
        model=ModelInfo(), first_step=first_step, metrics=tuple(metrics), bounded=tuple(bounded)
    )


def drawn(*reports: Report, **options: Any) -> FakeWriter:
    writer = FakeWriter()
    sink = TensorBoardSink(writer=writer, **options)
    sink.open(run())
    for item in reports:
        sink.write(item)
    sink.close()
    return writer


def record(logdir: Path, header: RunInfo, *reports: Report) -> None:
    sink = TensorBoardSink(logdir)
    sink.open(header)
    for item in reports:
        sink.write(item)
    sink.close()


def shown(logdir: Path) -> EventAccumulator:
    return EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(logdir: Path) -> dict[str, Points]:
    events = shown(logdir)
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    return {
        tag: [(item.step, item.value) for item in items] for tag, items in found.items() if items
    }


def texts(logdir: Path, tag: str) -> list[tuple[int, str]]:
    events = shown(logdir).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def charts(logdir: Path, *, runs: int = 1) -> dict[str, dict[str, list[str]]]:
    events = shown(logdir).Tensors(LAYOUT)
    assert len(events) == runs
    # TensorBoard shows the newest one.
    page = layout_pb2.Layout.FromString(events[-1].tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in page.category
    }


def as_made_earlier(logdir: Path) -> None:
    """Event files are read in the order of their names, which begin with the second."""
    for path in logdir.glob("events.out.tfevents.*"):
        path.rename(path.with_name(f"events.out.tfevents.0000000001.{path.name[20:]}"))


def test_every_value_stands_at_its_own_step(tmp_path: Path) -> None:
    items = [
        measured(0.5, step=5),
        measured(0.25, step=10),
        measured(2.0, metric="gradient_norm", scope="fc.weight", step=5),
        measured(4.0, metric="gradient_norm", scope="fc.weight", step=10),
        measured(8.0, metric="gradient_norm", step=10),
    ]
    record(tmp_path, run(), report(*items), report(measured(0.125, step=20)))
    assert scalars(tmp_path) == {
        "gradwatch/loss": [(5, 0.5), (10, 0.25), (20, 0.125)],
        "gradwatch/gradient_norm": [(10, 8.0)],
        "gradwatch_gradient_norm/fc.weight": [(5, 2.0), (10, 4.0)],
    }


def test_edges_stand_beside_the_value_they_judge(tmp_path: Path) -> None:
    whole, layer = measured(0.5), measured(4.0, metric="gain", scope="fc")
    verdicts = [judged(whole, lower=0.25, upper=0.75), judged(layer, lower=-2.0, upper=2.0)]
    record(tmp_path, run(), report(measured(step=5), whole, layer, verdicts=verdicts))
    assert scalars(tmp_path) == {
        "gradwatch/loss": [(5, 0.5), (10, 0.5)],
        "gradwatch/loss.lower": [(10, 0.25)],
        "gradwatch/loss.upper": [(10, 0.75)],
        "gradwatch_gain/fc": [(10, 4.0)],
        "gradwatch_gain/fc.lower": [(10, -2.0)],
        "gradwatch_gain/fc.upper": [(10, 2.0)],
    }


def test_an_open_edge_is_not_drawn() -> None:
    loss = measured()
    writer = drawn(report(loss, verdicts=[judged(loss, upper=0.75)]))
    assert set(writer.scalars) == {"gradwatch/loss", "gradwatch/loss.upper"}


def test_a_bound_that_decides_nothing_is_not_drawn() -> None:
    loss = measured()
    verdicts = [
        judged(loss, upper=0.25, vacuous="at this size"),
        judged(loss, upper=0.25, undecided="too few readings"),
    ]
    assert set(drawn(report(loss, verdicts=verdicts)).scalars) == {"gradwatch/loss"}


def test_of_several_bounds_the_tightest_edges_are_drawn() -> None:
    loss = measured()
    verdicts = [
        judged(loss, lower=0.0, upper=2.0),
        judged(loss, lower=-1.0, upper=1.0),
        judged(loss, upper=3.0),
        judged(loss, lower=0.4, upper=0.6, vacuous="at this size"),
    ]
    writer = drawn(report(loss, verdicts=verdicts))
    assert writer.scalars["gradwatch/loss.lower"] == [(10, 0.0)]
    assert writer.scalars["gradwatch/loss.upper"] == [(10, 1.0)]


def test_without_per_layer_only_the_model_is_drawn() -> None:
    layer = measured(scope="fc")
    both = report(measured(), layer, verdicts=[judged(layer, upper=1.0)])
    assert set(drawn(both, per_layer=False).scalars) == {"gradwatch/loss"}


def test_curves_never_go_back() -> None:
    items = [measured(3.0, step=30), measured(1.0, step=10), measured(2.0, step=20)]
    writer = drawn(report(*items))
    assert writer.scalars["gradwatch/loss"] == [(10, 1.0), (20, 2.0), (30, 3.0)]


def test_values_that_are_not_finite_are_drawn_as_they_are(tmp_path: Path) -> None:
    items = [measured(math.nan, step=1), measured(math.inf, step=2), measured(-math.inf, step=3)]
    record(tmp_path, run(), report(*items))
    values = [value for _, value in scalars(tmp_path)["gradwatch/loss"]]
    assert repr(values) == "[nan, inf, -inf]"


def test_the_learning_rate_is_drawn_where_it_is_known() -> None:
    steps = (StepInfo(step=5, lrs=(0.5, 1.0)), StepInfo(step=6), StepInfo(step=7, lrs=(0.25,)))
    assert drawn(Report(step=7, steps=steps)).scalars == {
        "gradwatch/learning_rate": [(5, 1.0), (7, 0.25)]
    }


def test_the_loss_of_the_settings_is_not_a_measurement() -> None:
    assert drawn(Report(step=5, steps=(StepInfo(step=5, loss=0.5),))).scalars == {}


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("blocks.0/attn-q_proj", "blocks.0/attn-q_proj"),
        ("a b[c]:d,é", "a_b_c__d__"),
        ("", "_"),
    ],
)
def test_unusual_characters_are_replaced(name: str, tag: str) -> None:
    writer = drawn(report(measured(scope=name), measured(metric=f"my {name}")), tag_prefix="a%")
    assert set(writer.scalars) == {f"a__loss/{tag}", f"a_/my_{tag if name else ''}"}


def advised(step: int, *severities: str, knob: str = "clip") -> Report:
    items = tuple(
        Recommendation(knob=knob, severity=severity, reason="r")  # type: ignore[arg-type]
        for severity in severities
    )
    return Report(step=step, recommendations=items)


def test_the_advice_curve_shows_the_severity_and_comes_down_again() -> None:
    writer = drawn(
        advised(10),
        advised(20, "advice"),
        advised(30, "warning"),
        advised(40),
        advised(50, "info"),
        advised(60, "info", "warning", "advice"),
    )
    assert writer.scalars == {
        "gradwatch_advice/clip": [(20, 1.0), (30, 2.0), (40, 0.0), (50, 0.0), (60, 2.0)]
    }


def test_knobs_do_not_silence_one_another(tmp_path: Path) -> None:
    record(tmp_path, run(), advised(10, "advice"), advised(20, "warning", knob="dropout"))
    assert scalars(tmp_path) == {
        "gradwatch_advice/clip": [(10, 1.0), (20, 0.0)],
        "gradwatch_advice/dropout": [(20, 2.0)],
    }


def test_a_recommendation_is_readable_markdown(tmp_path: Path) -> None:
    item = Recommendation(
        knob="learning_rate",
        scope="a|b",
        current=0.1,
        proposed=0.05,
        unit="P²/L",
        severity="warning",
        reason="It is *too*\nsteep.",
        expected="loss < 1",
        source="Somebody 2020",
    )
    record(tmp_path, run(), Report(step=10, recommendations=(item,)))
    ((step, text),) = texts(tmp_path, "gradwatch/recommendations")
    assert step == 10
    assert text.split("\n\n") == [
        "**warning: learning_rate** of a|b: **0.1 -> 0.05 P²/L**",
        r"It is \*too\* steep.",
        "Expected: loss &lt; 1.",
        "*Somebody 2020*",
    ]


def test_recommendations_are_told_when_they_change() -> None:
    said = drawn(
        advised(10), advised(20), advised(30, "advice"), advised(40, "advice"), advised(50)
    ).texts["gradwatch/recommendations"]
    assert [step for step, _ in said] == [10, 30, 50]
    assert said[0][1] == said[2][1] == "No recommendations."
    assert "advice" in said[1][1]


def test_notes_are_told_when_they_change(tmp_path: Path) -> None:
    notes: list[tuple[str, ...]] = [(), ("no\nloss", "no gain"), ("no\nloss", "no gain"), ()]
    record(tmp_path, run(), *(Report(step=i, notes=item) for i, item in enumerate(notes)))
    assert texts(tmp_path, "gradwatch/not_measured") == [
        (1, "- no loss\n- no gain"),
        (3, "Nothing is missing."),
    ]


def test_every_report_can_be_seen_at_once(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.open(run(metrics=["loss"]))
    for step in (10, 20, 30):
        sink.write(report(measured(step=step)))
        assert LAYOUT in shown(tmp_path).Tags()["tensors"]
        assert scalars(tmp_path)["gradwatch/loss"][-1] == (step, 0.5)
    sink.close()
    assert list(charts(tmp_path)) == ["Is it learning?", "Is the learning rate right?"], "once"


METRICS = ["loss", "update_ratio", "update_ratio_max", "activation_gain", "nonfinite", "mine.x"]


def test_the_page_has_one_chart_a_metric_under_its_question(tmp_path: Path) -> None:
    record(tmp_path, run(metrics=METRICS, bounded=["update_ratio"]), report(measured()))
    page = charts(tmp_path)
    assert {question: list(titles) for question, titles in page.items()} == {
        "Is it learning?": ["loss", "nonfinite", "nonfinite per layer"],
        "Is the learning rate right?": [
            "learning_rate",
            "update_ratio",
            "update_ratio per layer",
            "update_ratio_max",
            "update_ratio_max per layer",
        ],
        "Does the signal survive depth?": ["activation_gain per layer"],
        "More": ["mine.x", "mine.x per layer"],
    }


@pytest.mark.parametrize(
    ("chart", "caught"),
    [
        ("loss", {"gradwatch/loss"}),
        (
            "update_ratio",
            {
                "gradwatch/update_ratio",
                "gradwatch/update_ratio.lower",
                "gradwatch/update_ratio.upper",
            },
        ),
        ("update_ratio per layer", {"gradwatch_update_ratio/fc", "gradwatch_update_ratio/fc.bias"}),
        ("mine.x", {"gradwatch/mine.x"}),
    ],
)
def test_a_chart_catches_its_own_curves_only(tmp_path: Path, chart: str, caught: set[str]) -> None:
    record(tmp_path, run(metrics=METRICS, bounded=["update_ratio"]), report())
    metrics = [*METRICS, "loss_scale", "mine_x"]
    names = [f"gradwatch/{metric}" for metric in metrics]
    names += [f"gradwatch_{metric}/{scope}" for metric in metrics for scope in ("fc", "fc.bias")]
    tags = [name + end for name in names for end in ("", ".lower", ".upper")]
    page = {
        title: regexes for titles in charts(tmp_path).values() for title, regexes in titles.items()
    }
    # TensorBoard joins the expressions of a chart, and matches at the start of a tag.
    expression = re.compile("|".join(f"({regex})" for regex in page[chart]))
    assert {tag for tag in tags if expression.match(tag)} == caught


def test_without_per_layer_the_page_has_no_charts_for_layers(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, per_layer=False, tag_prefix="a.b")
    sink.open(run(metrics=["update_ratio"]))
    sink.write(report())
    sink.close()
    assert charts(tmp_path) == {
        "Is the learning rate right?": {
            "learning_rate": [r"a\.b/learning_rate$"],
            "update_ratio": [r"a\.b/update_ratio$"],
        }
    }


CURVATURE = tuple(metric for item in presets.curvature() for metric in item.metrics)
BOUNDED = tuple(bound.metric for bound in presets.bounds())


def curvature_charts(logdir: Path, optimizer: str, **header: Any) -> dict[str, list[str]]:
    """The charts of the curvature under an optimizer, each with what it shows."""
    options: dict[str, Any] = {"metrics": CURVATURE, "bounded": BOUNDED, **header}
    settings = StepInfo(step=10, optimizer=optimizer)
    record(logdir, run(**options), Report(step=10, steps=(settings,)))
    (found,) = [
        titles
        for question, titles in charts(logdir).items()
        if question not in {"Is the learning rate right?", "More"}
    ]
    assert list(charts(logdir)) == [
        "Is the learning rate right?",
        "How close is the edge of stability?",
    ]
    return {
        title: [regex.removeprefix("gradwatch/").removesuffix("$") for regex in regexes]
        for title, regexes in found.items()
    }


def test_the_sharpness_and_its_threshold_stand_in_one_chart(tmp_path: Path) -> None:
    found = curvature_charts(tmp_path, "SGD")
    assert found["sharpness"] == ["sharpness", "stability_threshold"]
    assert found["stability_ratio"] == [
        "stability_ratio",
        r"stability_ratio\.lower",
        r"stability_ratio\.upper",
        "noise_stability_ratio",
    ]
    assert found["batch_sharpness"] == [
        "batch_sharpness",
        r"batch_sharpness\.lower",
        r"batch_sharpness\.upper",
    ]
    alone = {"smallest_eigenvalue", "sharpness_variance", "sharpness_products", "rayleigh_quotient"}
    assert found.keys() == {"sharpness", "stability_ratio", "batch_sharpness"} | alone
    assert all(found[title] == [title] for title in alone)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop"])
def test_the_threshold_stands_with_the_sharpness_that_the_optimizer_sees(
    tmp_path: Path, optimizer: str
) -> None:
    found = curvature_charts(tmp_path, optimizer)
    assert found["preconditioned_sharpness"] == ["preconditioned_sharpness", "stability_threshold"]
    assert "stability_threshold" not in found["sharpness"]
    assert not {"sharpness_variance", "break_even_step", "stability_threshold"} & found.keys()


def test_a_sharpness_without_a_threshold_stands_alone(tmp_path: Path) -> None:
    found = curvature_charts(tmp_path, "SGD", metrics=("sharpness", "noise_stability_ratio"))
    assert found["sharpness"][0] == "sharpness"
    assert "stability_threshold" not in found["sharpness"]
    assert "noise_stability_ratio" in found


def reached(step: int, at: int = 7, source: str = "the sharpness is there") -> Report:
    item = Measurement(metric="break_even_step", scope="model", step=step, value=at, source=source)
    return Report(step=step, measurements=(item,))


def test_the_break_even_point_is_told_in_words_once(tmp_path: Path) -> None:
    start = reached(50, at=45, source="the noise is there *at the first reading*")
    between = report(measured(step=35))
    record(tmp_path, run(), Report(step=10), reached(20), reached(30), between, reached(40), start)
    said = texts(tmp_path, "gradwatch/break_even")
    assert [step for step, _ in said] == [20, 50]
    assert said[0][1].startswith("**Break-even at step 7**: the sharpness is there.\n\n")
    assert r"**Break-even at step 45**: the noise is there \*at the first reading\*." in said[1][1]
    for _, text in said:
        assert "As long as the loss falls, that is normal." in text
        assert "no theorem" in text


def test_of_two_break_even_points_the_newer_one_is_told() -> None:
    both = reached(20, at=7).measurements + reached(30, at=25).measurements
    ((_, said),) = drawn(Report(step=30, measurements=both)).texts["gradwatch/break_even"]
    assert "step 25" in said


def test_a_long_run_has_its_break_even_step_in_full() -> None:
    (said,) = drawn(reached(1234600, at=1234567)).texts["gradwatch/break_even"]
    assert "step 1234567" in said[1]


def test_a_resumed_run_hides_what_it_measures_again(tmp_path: Path) -> None:
    record(tmp_path, run(), *(report(measured(1.0, step=step)) for step in (10, 20, 30)))
    as_made_earlier(tmp_path)
    record(tmp_path, run(first_step=20), report(measured(2.0, step=25)))
    assert scalars(tmp_path) == {"gradwatch/loss": [(10, 1.0), (25, 2.0)]}


def test_a_fresh_run_in_the_same_folder_hides_the_old_one(tmp_path: Path) -> None:
    record(tmp_path, run(metrics=["old"]), report(measured(1.0, step=10), measured(metric="old")))
    as_made_earlier(tmp_path)
    record(tmp_path, run(metrics=["loss"]), report(measured(2.0, step=5)))
    assert scalars(tmp_path) == {"gradwatch/loss": [(5, 2.0)]}
    assert list(charts(tmp_path, runs=2)["Is it learning?"]) == ["loss"]


def test_the_curves_of_other_programs_stay(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    other = SummaryWriter(str(tmp_path))
    other.add_scalar("mine", 1.0, 10)
    other.close()
    as_made_earlier(tmp_path)
    record(tmp_path, run(), report(measured(step=10)))
    assert set(scalars(tmp_path)) == {"mine", "gradwatch/loss"}


def test_nothing_is_written_before_the_run_begins(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
    pickle.loads(pickle.dumps(sink))


def test_one_sink_can_tell_of_two_runs(tmp_path: Path) -> None:
    writer = FakeWriter()
    sink = TensorBoardSink(writer=writer)
    for _ in range(2):
        sink.open(run())
        sink.write(advised(10))
        sink.close()
        sink.open(run())
        sink.write(advised(20, "advice"))
        sink.close()
    assert len(writer.texts["gradwatch/recommendations"]) == 4
    assert writer.scalars == {"gradwatch_advice/clip": [(20, 1.0), (20, 1.0)]}


def test_a_writer_that_was_given_is_flushed_and_stays_open() -> None:
    writer = drawn(report(measured()), report(measured()))
    assert writer.flushed >= 2
    assert not writer.closed


def test_a_given_summary_writer_gets_the_page_too(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer=writer)
        sink.open(run(metrics=["loss"]))
        sink.write(report())
        sink.close()
        writer.add_scalar("still open", 1.0, 1)
    assert "loss" in charts(tmp_path)["Is it learning?"]
    assert "still open" in scalars(tmp_path)


def test_a_closed_sink_refuses_reports_and_says_what_to_do(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    with pytest.raises(RecordError, match=r"open\(run\)"):
        sink.write(report(measured()))
    sink.open(run())
    sink.close()
    sink.close()
    with pytest.raises(RecordError, match=r"open\(run\)"):
        sink.write(report(measured()))


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logdir.*None"):
        TensorBoardSink()
    with pytest.raises(ConfigError, match="tag_prefix"):
        TensorBoardSink(tmp_path, tag_prefix="")
    with pytest.raises(ConfigError, match="object without add_scalar, add_text, flush"):
        TensorBoardSink(writer=object())  # type: ignore[arg-type]
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    with pytest.raises(RecordError, match=r"logdir must be a folder.*occupied"):
        TensorBoardSink(occupied)


def test_without_tensorboard_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingExtraError, match=r"TensorBoardSink.*torch-gradwatch\[tensorboard\]"):
        TensorBoardSink(tmp_path)
    TensorBoardSink(writer=FakeWriter())
