"""Intervals, verdicts, recommendations, reports and their history."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.errors import ConfigError
from gradwatch.records import (
    SEVERITIES,
    History,
    Interval,
    Kind,
    LayerInfo,
    Measurement,
    ModelInfo,
    ProbeUse,
    Recommendation,
    Report,
    StepInfo,
    Verdict,
)

# Thousandths: differences of such numbers neither overflow nor vanish.
numbers = st.integers(-(10**6), 10**6).map(lambda thousandths: thousandths / 1000)
positive = st.integers(1, 10**6).map(lambda thousandths: thousandths / 1000)


def interval(one: float, other: float, **rest: Any) -> Interval:
    return Interval(lower=min(one, other), upper=max(one, other), **rest)


edges = st.floats(allow_nan=False)
st.register_type_strategy(
    Interval,
    st.builds(
        interval,
        edges,
        edges,
        kind=st.from_type(Kind),  # type: ignore[arg-type]
        vacuous=st.text(),
        undecided=st.text(),
    ),
)


st.register_type_strategy(
    Measurement,
    st.builds(Measurement, inputs=st.dictionaries(st.text(), st.floats(), max_size=3)),
)

st.register_type_strategy(
    ProbeUse,
    st.builds(
        ProbeUse,
        share=st.floats(),
        budget=st.none() | st.floats(),
        next_steps=st.dictionaries(st.text(), st.integers(), max_size=3),
    ),
)


def measured(value: float, standard_error: float | None = None) -> Measurement:
    return Measurement(
        metric="loss", scope="model", step=0, value=value, standard_error=standard_error
    )


def verdict(value: float, interval: Interval, standard_error: float | None = None) -> Verdict:
    return Verdict.of(measured(value, standard_error), interval, bound="Small", source="here")


@given(lower=numbers, width=positive, value=numbers)
def test_the_margin_is_positive_inside_and_negative_outside(
    lower: float, width: float, value: float
) -> None:
    upper = lower + width
    closed = Interval(lower=lower, upper=upper).margin(value)
    assert (closed > 0) == (lower < value < upper)
    assert (closed < 0) == (value < lower or value > upper)


@given(edge=numbers, value=numbers)
def test_the_margin_of_a_half_open_interval_has_the_same_sign(edge: float, value: float) -> None:
    above, below = Interval(lower=edge).margin(value), Interval(upper=edge).margin(value)
    assert (above > 0) == (value > edge) == (below < 0)
    assert (above < 0) == (value < edge) == (below > 0)


@given(lower=numbers, width=positive, value=numbers, scale=st.sampled_from([1e-3, 8.0, 1e6]))
def test_the_margin_is_a_pure_number(
    lower: float, width: float, value: float, scale: float
) -> None:
    margin = Interval(lower=lower, upper=lower + width).margin(value)
    scaled = Interval(lower=lower * scale, upper=(lower + width) * scale).margin(value * scale)
    assert scaled == pytest.approx(margin, rel=1e-6, abs=1e-6 * (abs(lower) + 1) / width)


@pytest.mark.parametrize(
    ("interval", "value", "margin"),
    [
        (Interval(lower=0.0, upper=2.0), 0.5, 0.25),
        (Interval(lower=0.0, upper=2.0), 1.5, 0.25),
        (Interval(lower=0.0, upper=2.0), 3.0, -0.5),
        (Interval(upper=2.0), 3.0, -0.5),
        (Interval(lower=-4.0), -2.0, 0.5),
        (Interval(upper=0.0), 3.0, -3.0),
        (Interval(lower=1.0, upper=1.0), 1.0, 0.0),
        (Interval(upper=2.0), math.inf, -math.inf),
        (Interval(upper=2.0), -math.inf, math.inf),
        (Interval(lower=2.0), math.inf, math.inf),
        (Interval(lower=2.0), -math.inf, -math.inf),
    ],
)
def test_margins_by_hand(interval: Interval, value: float, margin: float) -> None:
    assert interval.margin(value) == margin


@pytest.mark.parametrize(
    ("interval", "value"),
    [(Interval(), 1.0), (Interval(), math.inf), (Interval(upper=1), math.nan)],
)
def test_there_is_no_margin_without_an_edge_or_a_value(interval: Interval, value: float) -> None:
    assert math.isnan(interval.margin(value))


@pytest.mark.parametrize(("lower", "upper"), [(2.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_impossible_interval_is_refused(lower: float, upper: float) -> None:
    with pytest.raises(ConfigError, match="lower <= upper"):
        Interval(lower=lower, upper=upper)


@given(edge=numbers, excess=positive, standard_error=st.none() | positive)
def test_only_more_than_two_standard_errors_violate(
    edge: float, excess: float, standard_error: float | None
) -> None:
    far = excess + 2 * (standard_error or 0.0)
    assert verdict(edge + far, Interval(upper=edge), standard_error).status == "violated"
    assert verdict(edge - far, Interval(lower=edge), standard_error).status == "violated"
    assert verdict(edge, Interval(lower=edge, upper=edge), standard_error).status == "holds"
    if standard_error is not None:
        near = 1.99 * standard_error
        assert verdict(edge + near, Interval(upper=edge), standard_error).status == "holds"
        assert verdict(edge - near, Interval(lower=edge), standard_error).status == "holds"


def test_a_verdict_within_its_error_still_has_a_negative_margin() -> None:
    within = verdict(2.5, Interval(upper=2.0), standard_error=1.0)
    assert (within.status, within.margin) == ("holds", -0.25)


@pytest.mark.parametrize("value", [0.0, 5.0, math.nan])
def test_undecided_comes_before_vacuous_and_both_before_the_value(value: float) -> None:
    both = verdict(value, Interval(upper=1.0, vacuous="at this size", undecided="too few"))
    vacuous = verdict(value, Interval(upper=1.0, vacuous="at this size"))
    assert (both.status, both.because) == ("undecided", "too few")
    assert (vacuous.status, vacuous.because) == ("vacuous", "at this size")


@pytest.mark.parametrize(("value", "error"), [(math.nan, None), (0.5, math.nan)])
def test_what_is_not_a_number_decides_nothing(value: float, error: float | None) -> None:
    result = verdict(value, Interval(upper=1.0), error)
    assert result.status == "undecided"
    assert "not a number" in result.because


def test_a_decided_verdict_needs_no_excuse() -> None:
    result = verdict(3.0, Interval(upper=2.0))
    assert result.because == ""
    assert (result.bound, result.source) == ("Small", "here")
    assert result.measurement == measured(3.0)


def test_unknown_knobs_and_severities_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate.*'radio'"):
        Recommendation(knob="radio", reason="r")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"warning.*'loud'"):
        Recommendation(knob="clip", reason="r", severity="loud")  # type: ignore[arg-type]
    assert SEVERITIES == ("info", "advice", "warning")


@pytest.mark.parametrize(
    ("current", "proposed", "direction", "change"),
    [
        (0.1, 0.05, "down", "0.1 -> 0.05 P²/L"),
        (0.1, 0.2, "up", "0.1 -> 0.2 P²/L"),
        (0.1, 0.1, "fix", "0.1 -> 0.1 P²/L"),
        (None, 0.1, "fix", "? -> 0.1 P²/L"),
        (0.1, None, "fix", "fix"),
        (None, None, "fix", "fix"),
    ],
)
def test_the_direction_and_the_change(
    current: float | None, proposed: float | None, direction: str, change: str
) -> None:
    item = Recommendation(
        knob="learning_rate", reason="r", current=current, proposed=proposed, unit="P²/L"
    )
    assert (item.direction, item.change) == (direction, change)


def test_a_pure_number_changes_without_a_unit() -> None:
    item = Recommendation(knob="dropout", reason="r", current=0.5, proposed=0.1)
    assert item.change == "0.5 -> 0.1"


def test_the_largest_learning_rate_stands_for_all() -> None:
    assert StepInfo(step=0, lrs=(0.1, 0.3, 0.2)).lr == 0.3
    assert StepInfo(step=0).lr is None


def test_a_model_knows_its_chains() -> None:
    layers = (
        LayerInfo(name="last", kind="Linear", fan_in=2, segment=0, position=1),
        LayerInfo(name="norm", kind="LayerNorm"),
        LayerInfo(name="first", kind="Linear", fan_in=2, segment=0, position=0),
        LayerInfo(name="side", kind="Linear", fan_in=2, segment=1),
    )
    model = ModelInfo(layers=layers)
    assert [layer.name for layer in model.chain("last")] == ["first", "last"]
    assert [layer.name for layer in model.chain("side")] == ["side"]
    assert model.chain("norm") == model.chain("absent") == ()
    assert model.depth == 3
    assert model.layer("norm") is layers[1]
    assert model.layer("absent") is None


@given(st.from_type(Report))
def test_any_report_comes_back_from_strict_json(report: Report) -> None:
    text = json.dumps(report.to_dict(), allow_nan=False)
    # NaN is not equal to itself; its text is.
    assert repr(Report.from_dict(json.loads(text))) == repr(report)


def test_a_report_gives_the_newest_value() -> None:
    report = Report(
        step=4,
        measurements=(
            Measurement(metric="loss", scope="model", step=3, value=1.0),
            Measurement(metric="loss", scope="fc", step=4, value=9.0),
            Measurement(metric="loss", scope="model", step=4, value=2.0),
        ),
    )
    assert report.value("loss") == 2.0
    assert report.value("loss", "fc") == 9.0
    assert report.value("loss", "other") is None
    assert report.value("other") is None


def test_a_report_knows_the_settings_of_its_newest_step() -> None:
    steps = (StepInfo(step=3), StepInfo(step=4, lrs=(0.1,)))
    assert Report(step=4, steps=steps).info is steps[1]
    assert Report(step=4).info == StepInfo(step=4)


def test_a_printed_report_says_what_was_found() -> None:
    loss = measured(3.0)
    text = str(
        Report(
            step=50,
            measurements=(
                measured(8.0),
                loss,
                Measurement(metric="rms", scope="fc", step=0, value=7),
            ),
            verdicts=(
                Verdict.of(loss, Interval(upper=2.0), bound="Small", source="Somebody 2020"),
                Verdict.of(loss, Interval(upper=4.0), bound="Large", source="Nobody"),
            ),
            recommendations=(
                Recommendation(knob="clip", scope="fc", reason="It is too steep.", proposed=1.0),
            ),
            notes=("no activations",),
        )
    )
    assert text.startswith("gradwatch at step 50")
    assert [line.split() for line in text.splitlines() if line.startswith("loss")] == [
        ["loss", "3", "1"]
    ]
    assert "violated" in text
    assert "Somebody 2020" in text
    assert "It is too steep." in text
    assert "  - no activations" in text


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (ProbeUse(share=0.0), "probes: 0 % of the time (no budget)"),
        (
            ProbeUse(share=0.01934, budget=0.02, next_steps={"B": 3350, "A": 4200}),
            "probes: 1.9 % of the time (budget 2 %); next: B about step 3350, A about step 4200",
        ),
        (ProbeUse(share=1.0, budget=1e-9), "probes: 100 % of the time (budget 1e-07 %)"),
    ],
)
def test_the_cost_of_probes_is_one_line_of_a_report(use: ProbeUse, text: str) -> None:
    assert str(use) == text
    assert str(Report(step=1, probes=use)).splitlines()[-1] == text


def test_what_the_clock_says_makes_no_other_report() -> None:
    assert Report(step=1, probes=ProbeUse(share=0.1)) == Report(step=1)
    assert Report(step=1, probes=ProbeUse(share=0.1)) != Report(step=2)


def test_a_report_without_advice_says_so() -> None:
    assert str(Report(step=1)) == "gradwatch at step 1\n\nNo recommendations."


@given(count=st.integers(0, 30), window=st.integers(1, 8))
def test_a_history_keeps_the_first_report_and_the_newest(count: int, window: int) -> None:
    history = History(ModelInfo(), window=window)
    for step in range(count):
        history.append(Report(step=step))
    newest = range(max(1, count - window), count)
    expected = [0, *newest] if count else []
    assert [report.step for report in history] == expected
    assert len(history) == len(expected)
    if count:
        assert history[0].step == 0
        assert history[-1].step == count - 1
        assert [report.step for report in history[-2:]] == expected[-2:]


def test_a_history_hands_over_the_model() -> None:
    model = ModelInfo(parameters=("w",))
    assert History(model).model is model
