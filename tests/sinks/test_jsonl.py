"""The record of a run as a file of JSON lines."""

import json
from pathlib import Path

import pytest

from gradwatch.errors import RecordError
from gradwatch.records import Measurement, ModelInfo, Report, RunInfo
from gradwatch.run_record import read
from gradwatch.sinks import JsonlSink

RUN = RunInfo(model=ModelInfo(parameters=("w",)), configuration={"every_n_steps": 10})


def report(step: int, value: float = 0.5) -> Report:
    loss = Measurement(metric="loss", scope="model", step=step, value=value)
    return Report(step=step, measurements=(loss,), notes=("größer",))


def record(logdir: Path, run: RunInfo, *reports: Report) -> Path:
    sink = JsonlSink(logdir)
    sink.open(run)
    for item in reports:
        sink.write(item)
    sink.close()
    return sink.path


def test_a_run_can_be_read_back(tmp_path: Path) -> None:
    path = record(tmp_path / "runs" / "digits", RUN, report(10), report(20))
    assert path == tmp_path / "runs" / "digits" / "gradwatch.jsonl"
    run = read(tmp_path / "runs" / "digits")
    assert (run.header, run.reports) == (RUN, (report(10), report(20)))


def test_the_file_is_one_compact_line_a_record(tmp_path: Path) -> None:
    content = record(tmp_path, RUN, report(10), report(20)).read_bytes()
    assert content.endswith(b"\n")
    lines = content.splitlines()
    assert [next(iter(json.loads(line))) for line in lines] == ["gradwatch", "step", "step"]
    assert b": " not in content


def test_each_report_can_be_read_at_once(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.open(RUN)
    assert read(tmp_path).reports == ()
    for count in (1, 2, 3):
        sink.write(report(count))
        assert len(read(tmp_path).reports) == count
    sink.close()


def test_looking_at_the_folder_leaves_no_file_behind(tmp_path: Path) -> None:
    JsonlSink(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_looking_at_a_record_leaves_it_as_it_is(tmp_path: Path) -> None:
    path = record(tmp_path, RUN, report(10))
    before = path.read_bytes()
    JsonlSink(tmp_path)
    assert path.read_bytes() == before


def test_a_logdir_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    for logdir in (occupied, occupied / "below"):
        with pytest.raises(RecordError, match=r"cannot write .*occupied.*give a logdir"):
            JsonlSink(logdir)
    assert occupied.read_text() == "mine"


def test_a_record_that_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "gradwatch.jsonl").mkdir()
    with pytest.raises(RecordError, match="cannot write"):
        JsonlSink(str(tmp_path))


def test_a_fresh_run_appends_and_supersedes(tmp_path: Path) -> None:
    path = record(tmp_path, RUN, report(10), report(20))
    before = path.read_bytes()
    record(tmp_path, RUN, report(10, value=7.0))
    assert path.read_bytes().startswith(before)
    assert b"" not in path.read_bytes().splitlines()
    assert read(tmp_path).reports == (report(10, value=7.0),)


def test_a_resumed_run_appends_and_supersedes_from_its_first_step_on(tmp_path: Path) -> None:
    record(tmp_path, RUN, report(10), report(20))
    record(tmp_path, RunInfo(model=ModelInfo(), first_step=15), report(20, value=7.0))
    assert read(tmp_path).values("loss") == ((10, 0.5), (20, 7.0))


def test_a_run_goes_on_after_a_kill_at_any_byte(tmp_path: Path) -> None:
    path = record(tmp_path, RUN, report(10), report(20))
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        record(tmp_path, RunInfo(model=ModelInfo(), first_step=25), report(30))
        kept = [10, 20, 30] if end >= len(whole) - 1 else [10, 30]
        assert [item.step for item in read(tmp_path).reports] == kept, f"killed at byte {end}"


def test_a_closed_sink_refuses_reports_and_says_what_to_do(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    with pytest.raises(RecordError, match=r"open\(run\)"):
        sink.write(report(10))
    sink.open(RUN)
    sink.close()
    sink.close()
    with pytest.raises(RecordError, match=r"open\(run\)"):
        sink.write(report(10))


def test_a_folder_that_vanishes_is_a_record_error(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "run")
    (tmp_path / "run").rmdir()
    with pytest.raises(RecordError, match="cannot write"):
        sink.open(RUN)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_a_record_error(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path)
    sink.path.symlink_to("/dev/full")
    with pytest.raises(RecordError, match="No space left"):
        sink.open(RUN)
    with pytest.raises(RecordError, match="No space left"):
        sink.close()
    sink.close()
