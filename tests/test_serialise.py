"""Records to JSON and back."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.errors import RecordError
from gradwatch.records import (
    DropoutInfo,
    Interval,
    LayerInfo,
    Measurement,
    ModelInfo,
    Recommendation,
    Report,
    RunInfo,
    StepInfo,
)
from gradwatch.serialise import from_json, to_json

LOSS: dict[str, Any] = {"metric": "loss", "scope": "model", "step": 3, "value": 0.5}

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(plain)
def test_finite_plain_values_do_not_change(value: Any) -> None:
    assert json.loads(json.dumps(to_json(value), allow_nan=False)) == value


@pytest.mark.parametrize(
    ("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_what_json_cannot_say_travels_as_text(value: float, text: str) -> None:
    measurement = Measurement(**{**LOSS, "value": value})
    written = to_json(measurement)
    assert written["value"] == text
    assert repr(from_json(Measurement, written)) == repr(measurement)


def test_containers_become_lists_and_dictionaries() -> None:
    written = to_json({"steps": (StepInfo(step=1, lrs=(0.1, 0.2)),), "names": ["a"]})
    assert written["steps"][0]["lrs"] == [0.1, 0.2]
    assert written["names"] == ["a"]


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", Measurement, 1j])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=type(value).__name__):
        to_json({"inside": [value]})


def test_unknown_keys_are_ignored_and_missing_ones_take_their_defaults() -> None:
    measurement = from_json(Measurement, {**LOSS, "of_a_later_version": [1]})
    assert measurement == Measurement(metric="loss", scope="model", step=3, value=0.5)


def test_whole_numbers_become_floats_where_floats_belong() -> None:
    value = from_json(Measurement, {**LOSS, "value": 2}).value
    assert (value, type(value)) == (2.0, float)


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Measurement, None),
        (Measurement, [1, 2]),
        (Measurement, {"metric": "loss"}),
        (Measurement, {**LOSS, "value": "much"}),
        (Measurement, {**LOSS, "value": None}),
        (Measurement, {**LOSS, "value": True}),
        (Measurement, {**LOSS, "value": [1.0]}),
        (Measurement, {**LOSS, "step": 1.5}),
        (Measurement, {**LOSS, "metric": 7}),
        (Measurement, {**LOSS, "standard_error": "none"}),
        (Interval, {"lower": 2.0, "upper": 1.0}),
        (Recommendation, {"knob": "radio", "reason": "r"}),
        (Report, {"step": 1, "notes": "not a list"}),
        (Report, {"step": 1, "steps": 5}),
        (Report, {"step": 1, "measurements": [{}]}),
        (RunInfo, {"model": {}, "configuration": []}),
        (RunInfo, {"model": {}, "versions": {"torch": 2}}),
    ],
)
def test_what_is_no_such_record_is_a_record_error(kind: type, data: Any) -> None:
    with pytest.raises(RecordError):
        from_json(kind, data)


def test_the_error_names_what_is_wrong() -> None:
    with pytest.raises(RecordError, match="expected float, got 'much'"):
        from_json(Measurement, {**LOSS, "value": "much"})
    with pytest.raises(RecordError, match=r"Measurement.*'scope'"):
        from_json(Measurement, {"metric": "loss", "step": 1, "value": 1.0})


def test_a_run_with_its_configuration_comes_back() -> None:
    run = RunInfo(
        model=ModelInfo(
            parameters=("fc.weight",),
            layers=(LayerInfo(name="fc", kind="Linear", activation=None, segment=0),),
            dropouts=(DropoutInfo(name="drop", probability=0.5),),
            train_size=60_000,
        ),
        first_step=7,
        metrics=("loss",),
        configuration={"every_n_steps": 10, "include": ["*"], "budget": None, "deep": {"a": 1.5}},
        versions={"torch": "2.6"},
    )
    assert from_json(RunInfo, json.loads(json.dumps(to_json(run)))) == run


@given(st.from_type(ModelInfo))
def test_any_model_comes_back(model: ModelInfo) -> None:
    text = json.dumps(to_json(model), allow_nan=False)
    assert repr(from_json(ModelInfo, json.loads(text))) == repr(model)


@given(st.from_type(StepInfo))
def test_any_step_comes_back(step: StepInfo) -> None:
    text = json.dumps(to_json(step), allow_nan=False)
    assert repr(from_json(StepInfo, json.loads(text))) == repr(step)
