"""Reports in memory."""

import pytest

from gradwatch.errors import ConfigError
from gradwatch.records import ModelInfo, Report, RunInfo
from gradwatch.sinks import MemorySink


def test_it_keeps_the_run_and_the_reports() -> None:
    sink, run = MemorySink(), RunInfo(model=ModelInfo(parameters=("w",)))
    assert (sink.run, sink.reports) == (None, [])
    sink.open(run)
    reports = [Report(step=10), Report(step=20)]
    for report in reports:
        sink.write(report)
    sink.close()
    assert sink.run is run
    assert sink.reports == reports


def test_it_forgets_the_oldest_above_the_limit() -> None:
    sink = MemorySink(max_reports=2)
    for step in range(5):
        sink.write(Report(step=step))
    assert [report.step for report in sink.reports] == [3, 4]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=f"max_reports.*{limit}"):
        MemorySink(max_reports=limit)


@pytest.mark.parametrize(("first_step", "kept"), [(0, []), (15, [10]), (20, [10]), (30, [10, 20])])
def test_a_run_supersedes_from_its_first_step_on(first_step: int, kept: list[int]) -> None:
    sink = MemorySink()
    for step in (10, 20):
        sink.write(Report(step=step))
    reports = sink.reports
    sink.open(RunInfo(model=ModelInfo(), first_step=first_step))
    assert [report.step for report in sink.reports] == kept
    assert sink.reports is reports
