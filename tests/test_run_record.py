"""The record of a run: what was written comes back, whatever a kill has left."""

import json
import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.errors import RecordError
from gradwatch.records import (
    Interval,
    Kind,
    Measurement,
    ModelInfo,
    ProbeUse,
    Recommendation,
    Report,
    RunInfo,
    StepInfo,
    Verdict,
)
from gradwatch.run_record import FILE_NAME, SCHEMA, header_line, read, report_line, supersede

RUN = RunInfo(
    model=ModelInfo(parameters=("fc.weight",), train_size=10),
    metrics=("loss",),
    configuration={"every_n_steps": 10},
    versions={"gradwatch": "0.1.0"},
)


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


def report(*steps: int, value: float = 0.5) -> Report:
    """A report whose newest step is the last one given."""
    measurements = tuple(
        Measurement(metric="loss", scope="model", step=step, value=value, unit="L")
        for step in steps
    )
    return Report(
        step=steps[-1],
        steps=tuple(StepInfo(step=step, lrs=(0.1,)) for step in steps),
        measurements=measurements,
        verdicts=(Verdict.of(measurements[-1], Interval(upper=1.0), bound="B", source="here"),),
        recommendations=(Recommendation(knob="clip", reason="It is too steep."),),
        notes=("no activations",),
        probes=ProbeUse(share=0.01, budget=0.02, next_steps={"Sharpness": steps[-1] + 9}),
    )


def resumed(first_step: int) -> RunInfo:
    return RunInfo(model=ModelInfo(), first_step=first_step, versions={"gradwatch": "0.2.0"})


def write(folder: Path, *records: RunInfo | Report | str) -> Path:
    """Writes lines as they stand, each with a newline."""
    path = folder / FILE_NAME
    path.write_text("".join(f"{line(record)}\n" for record in records), encoding="utf-8")
    return path


def line(record: RunInfo | Report | str) -> str:
    match record:
        case RunInfo():
            return header_line(record)
        case Report():
            return report_line(record)
    return record


def steps(folder: Path) -> list[int]:
    return [item.step for item in read(folder).reports]


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write(tmp_path, RUN, report(10), report(20))
    run = read(tmp_path)
    assert run.header == RUN
    assert run.reports == (report(10), report(20))


def test_a_run_that_has_not_reported_yet_has_no_reports(tmp_path: Path) -> None:
    write(tmp_path, RUN)
    assert read(tmp_path).reports == ()


@pytest.mark.parametrize("given_as", [Path, str])
def test_the_folder_and_the_file_can_be_given(
    tmp_path: Path, given_as: Callable[[Path], str | Path]
) -> None:
    path = write(tmp_path, RUN, report(10))
    assert read(given_as(tmp_path)) == read(given_as(path))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324, 1e308])
def test_any_value_comes_back_from_strict_json(tmp_path: Path, value: float) -> None:
    path = write(tmp_path, RUN, report(10, value=value))
    for text in path.read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    ((step, read_value),) = read(tmp_path).values("loss")
    assert (step, repr(read_value)) == (10, repr(value))


@settings(max_examples=25)
@given(st.lists(st.from_type(Report), max_size=3))
def test_any_reports_come_back(reports: list[Report]) -> None:
    with TemporaryDirectory() as folder:
        write(Path(folder), RUN, *reports)
        # NaN is not equal to itself; its text is.
        assert repr(read(folder).reports) == repr(tuple(reports))


def test_a_line_is_one_line() -> None:
    note = "first\nsecond\u2028third\r"
    text = report_line(Report(step=1, notes=(note,)))
    assert len(text.splitlines()) == 1
    assert json.loads(text)["notes"] == [note]


def test_the_header_tells_the_schema_version() -> None:
    assert json.loads(header_line(RUN))["gradwatch"] == SCHEMA == 1


def test_a_curve_has_the_values_of_one_metric_and_scope(tmp_path: Path) -> None:
    other = Measurement(metric="loss", scope="fc", step=20, value=9.0)
    write(tmp_path, RUN, report(5, 10, value=2.0), Report(step=20, measurements=(other,)))
    run = read(tmp_path)
    assert run.values("loss") == ((5, 2.0), (10, 2.0))
    assert run.values("loss", "fc") == ((20, 9.0),)
    assert run.values("sharpness") == ()


def test_a_last_line_torn_anywhere_is_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, RUN, report(10), report(20))
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert steps(tmp_path) == [10], f"cut at byte {end - start} of the line"
    path.write_bytes(whole[:-1])
    assert steps(tmp_path) == [10, 20]


def test_a_run_killed_again_while_it_restarts_can_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, RUN, report(10), report_line(report(20))[:30])
    before, header = path.read_bytes(), header_line(resumed(15)).encode()
    for end in range(len(header)):
        path.write_bytes(before + header[:end])
        assert steps(tmp_path) == [10], f"cut at byte {end} of the header"
        path.write_bytes(before + header[:end] + b"\n" + header + b"\n")
        assert (steps(tmp_path), read(tmp_path).header) == ([10], resumed(15))


def test_a_torn_line_is_logged_once_and_harmlessly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, RUN, report(10), '{"step":20,"st')
    with caplog.at_level(logging.DEBUG, logger="gradwatch"):
        read(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "line 3" in record.getMessage()


def test_a_torn_line_before_a_header_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, RUN, report(10), report_line(report(20))[:40], resumed(15), report(20))
    assert steps(tmp_path) == [10, 20]


def test_bytes_that_are_no_text_are_torn_or_corrupt_like_any_other(tmp_path: Path) -> None:
    path = write(tmp_path, RUN, report(10))
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\x00")
    assert steps(tmp_path) == [10]
    path.write_bytes(path.read_bytes() + b"\n" + report_line(report(20)).encode() + b"\n")
    with pytest.raises(RecordError, match="line 3"):
        read(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        '{"step":20,"st',
        "",
        "[1, 2]",
        "3",
        "{}",
        '{"step": "ten"}',
        '{"step": 20, "measurements": [{"metric": "loss"}]}',
        '{"step": 20, "recommendations": [{"knob": "radio", "reason": "r"}]}',
    ],
)
def test_a_corrupt_line_in_the_middle_is_named(tmp_path: Path, bad: str) -> None:
    path = write(tmp_path, RUN, report(10), bad, report(30))
    with pytest.raises(RecordError, match=f"line 3 of {re.escape(str(path))}.*remove that line"):
        read(tmp_path)


def test_two_torn_lines_in_a_row_are_corrupt(tmp_path: Path) -> None:
    write(tmp_path, RUN, report(10), '{"step":20,"st', '{"step":30,"st')
    with pytest.raises(RecordError, match="line 3"):
        read(tmp_path)


def test_a_whole_last_line_that_is_no_report_is_not_excused(tmp_path: Path) -> None:
    write(tmp_path, RUN, report(10), '{"step": "ten"}')
    with pytest.raises(RecordError, match="line 3"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], "is empty"),
        ([header_line(RUN)[:20]], "no whole header"),
        ([report_line(report(10))], "line 1 .*no header line above"),
        ([report_line(report(10)), header_line(RUN)], "line 1 .*no header line above"),
        (['{"gradwatch":2,"run":{"model":{}}}'], "version 2.*up to 1.*pip install --upgrade"),
        ([header_line(RUN), '{"gradwatch":2,"run":{}}'], "line 2 .*version 2"),
        (['{"gradwatch":"new","run":{"model":{}}}'], "version 'new'"),
        (['{"gradwatch":1}'], "line 1 .*RunInfo"),
        (['{"gradwatch":1,"run":{"first_step":1}}'], "line 1 .*model"),
    ],
)
def test_a_file_that_holds_no_run_says_why(
    tmp_path: Path, lines: list[str], complaint: str
) -> None:
    write(tmp_path, *lines)
    with pytest.raises(RecordError, match=complaint):
        read(tmp_path)


def test_a_missing_record_says_where_it_was_looked_for(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent", tmp_path / "absent.jsonl"):
        with pytest.raises(RecordError, match=re.escape(str(place))):
            read(place)


def test_a_record_that_cannot_be_read_is_a_record_error(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(RecordError, match=r"no record|cannot read"):
        read(tmp_path)


def test_a_fresh_run_in_the_same_folder_supersedes_the_old_one(tmp_path: Path) -> None:
    write(tmp_path, resumed(0), report(10), report(20), RUN, report(10, value=7.0))
    run = read(tmp_path)
    assert run.header == RUN
    assert run.reports == (report(10, value=7.0),)


def test_a_resumed_run_supersedes_from_its_first_step_on(tmp_path: Path) -> None:
    write(tmp_path, RUN, report(10), report(20), report(30), resumed(20), report(20, value=7.0))
    run = read(tmp_path)
    assert run.header == resumed(20)
    assert run.values("loss") == ((10, 0.5), (20, 7.0))


def test_each_resume_supersedes_only_what_stands_above_it(tmp_path: Path) -> None:
    lines = (RUN, report(10), report(20), resumed(15), report(20), report(30), resumed(25))
    write(tmp_path, *lines, report(40), report(50))
    assert steps(tmp_path) == [10, 20, 40, 50]


def test_a_straddling_report_keeps_what_is_not_measured_again(tmp_path: Path) -> None:
    write(tmp_path, RUN, report(10, 20, 30, 40), resumed(30), report(30, 40, value=7.0))
    older, newer = read(tmp_path).reports
    assert older.step == 20
    assert [item.step for item in older.steps] == [10, 20]
    assert [item.step for item in older.measurements] == [10, 20]
    # What was judged and advised rested on the steps that are gone.
    assert older.verdicts == ()
    assert older.recommendations == ()
    assert older.probes is None
    assert newer == report(30, 40, value=7.0)


def test_superseding_at_a_later_step_changes_nothing() -> None:
    reports = [report(10), report(15, 20)]
    assert supersede(reports, 21) == reports
    assert supersede(reports, 20) == [report(10), *supersede([report(15, 20)], 20)]
    assert supersede(reports, 0) == []


@given(
    parts=st.lists(st.lists(st.integers(0, 20), min_size=1, unique=True), max_size=4),
    first_step=st.integers(0, 20),
)
def test_no_step_is_kept_that_will_be_measured_again(
    parts: list[list[int]], first_step: int
) -> None:
    reports = [report(*sorted(part)) for part in parts]
    kept = supersede(reports, first_step)
    measured = [item.step for part in kept for item in part.measurements]
    assert measured == [step for part in parts for step in sorted(part) if step < first_step]
    assert all(part.step < first_step for part in kept)
