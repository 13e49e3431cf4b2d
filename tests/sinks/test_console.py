"""One line a report in the terminal."""

import io
from typing import Any

import pytest

from gradwatch.records import Measurement, ModelInfo, ProbeUse, Recommendation, Report, RunInfo
from gradwatch.sinks import ConsoleSink

STEEP = Recommendation(
    knob="learning_rate",
    current=0.1,
    proposed=0.05,
    unit="P²/L",
    severity="warning",
    reason="It is too steep.",
)


def value(metric: str, number: float, *, step: int = 50, scope: str = "model") -> Measurement:
    return Measurement(metric=metric, scope=scope, step=step, value=number)


def written(*reports: Report) -> list[str]:
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    sink.open(RunInfo(model=ModelInfo()))
    for report in reports:
        sink.write(report)
    sink.close()
    return stream.getvalue().splitlines()


def advised(step: int, *recommendations: Recommendation) -> Report:
    return Report(step=step, recommendations=recommendations)


def changed(**changes: Any) -> Recommendation:
    fields = {name: getattr(STEEP, name) for name in STEEP.__dataclass_fields__}
    return Recommendation(**{**fields, **changes})


def test_a_report_is_one_line_with_the_newest_values_of_the_model() -> None:
    measurements = (
        value("loss", 0.9, step=40),
        value("loss", 0.41234),
        value("gradient_norm_used", float("nan")),
        value("update_ratio", 0.7, scope="fc"),
    )
    lines = written(Report(step=50, measurements=measurements))
    assert lines == ["step 50  loss 0.4123  gradient_norm_used nan"]


def test_a_report_without_values_is_its_step() -> None:
    assert written(Report(step=50)) == ["step 50"]


def test_a_recommendation_stands_below_with_its_severity() -> None:
    both = advised(50, STEEP, Recommendation(knob="clip", scope="fc", reason="Clip it."))
    assert written(both) == [
        "step 50",
        "  warning learning_rate (model): 0.1 -> 0.05 P²/L. It is too steep.",
        "  advice clip (fc): fix. Clip it.",
    ]


@pytest.mark.parametrize(
    "other", [changed(proposed=0.04), changed(reason="It is 4 times too steep."), changed()]
)
def test_what_was_said_is_not_repeated(other: Recommendation) -> None:
    assert written(advised(50, STEEP), advised(60, other))[2:] == ["step 60"]


@pytest.mark.parametrize(
    "other",
    [
        changed(severity="advice"),
        changed(scope="fc"),
        changed(knob="momentum"),
        changed(proposed=0.2),
    ],
)
def test_what_is_new_is_said(other: Recommendation) -> None:
    lines = written(advised(50, STEEP), advised(60, other))
    assert lines[2] == "step 60"
    assert lines[3].startswith(f"  {other.severity} {other.knob} ({other.scope})")


def test_silence_is_said_once() -> None:
    lines = written(advised(40), advised(50, STEEP), advised(60), advised(70))
    assert lines[0] == "step 40"
    assert lines[3:] == ["step 60", "  no recommendations any more", "step 70"]


def test_a_second_run_hears_the_advice_again() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    for _ in range(2):
        sink.open(RunInfo(model=ModelInfo()))
        sink.write(advised(50, STEEP))
        sink.close()
    assert stream.getvalue().count("It is too steep.") == 2


def test_it_writes_to_what_stdout_is_at_that_time(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink()
    capsys.readouterr()
    sink.write(Report(step=50))
    assert capsys.readouterr().out == "step 50\n"


def test_a_terminal_without_the_characters_still_shows_the_line() -> None:
    received = io.BytesIO()
    terminal = io.TextIOWrapper(received, encoding="ascii", newline="\n")
    ConsoleSink(terminal).write(advised(50, STEEP))
    assert b"0.1 -> 0.05 P?/L. It is too steep.\n" in received.getvalue()


def probed(step: int, share: float = 0.019, **next_steps: int) -> Report:
    return Report(step=step, probes=ProbeUse(share=share, budget=0.02, next_steps=next_steps))


def test_what_probes_cost_is_said_again_once_all_that_was_said_has_come() -> None:
    lines = written(
        probed(50, Sharpness=120, GradientNoise=70),
        probed(100, Sharpness=120, GradientNoise=170),
        probed(150, share=0.02, Sharpness=420, GradientNoise=170),
    )
    assert lines == [
        "step 50",
        "  probes: 1.9 % of the time (budget 2 %); next: Sharpness about step 120, "
        "GradientNoise about step 70",
        "step 100",
        "step 150",
        "  probes: 2 % of the time (budget 2 %); next: Sharpness about step 420, "
        "GradientNoise about step 170",
    ]


def test_a_second_run_hears_of_the_probes_again() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(stream)
    for _ in range(2):
        sink.open(RunInfo(model=ModelInfo()))
        sink.write(probed(50, Sharpness=120))
        sink.close()
    assert stream.getvalue().count("probes: ") == 2
