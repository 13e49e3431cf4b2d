"""The record of a run: one file, a header line and then one JSON line a report.

    logdir/gradwatch.jsonl
        {"gradwatch": 1, "run": {...}}        header: the schema version and a `RunInfo`
        {"step": 49, "steps": [...], ...}     a `Report`
        {"step": 99, "steps": [...], ...}

A training that is resumed, or run again in the same folder, appends its own header. From its
first step on, that header supersedes what stands before it, so a step never counts twice.

A killed training may leave half a line. That is no damage: the reader passes over a line that is
not JSON if it is the last one, or if a header follows it, because only a new start could have
come after it. Anywhere else such a line is reported as corrupt.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gradwatch.errors import RecordError
from gradwatch.records import MODEL, Report, RunInfo
from gradwatch.serialise import RecordT, from_json, to_json

FILE_NAME: Final = "gradwatch.jsonl"
SCHEMA: Final = 1
"""Raised when an older reader would misunderstand a newer file."""

_HEADER_KEY: Final = "gradwatch"
_HEADER_START: Final = b'{"gradwatch":'
_REMEDY: Final = "remove that line to read the others"
_STOPPED: Final = "the run was stopped while it started: run it again"

_logger = logging.getLogger("gradwatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run has recorded.

    Attributes:
        header: facts about the run, as its newest start wrote them.
        reports: what still holds of all its starts, oldest first.
    """

    header: RunInfo
    reports: tuple[Report, ...] = ()

    def values(self, metric: str, scope: str = MODEL) -> tuple[tuple[int, float], ...]:
        """The curve of one metric.

        Args:
            metric: its name.
            scope: a parameter, a layer, or "model".

        Returns:
            (step, value) pairs, oldest first; empty if it was never measured.
        """
        return tuple(
            (item.step, item.value)
            for report in self.reports
            for item in report.measurements
            if item.metric == metric and item.scope == scope
        )


def header_line(run: RunInfo) -> str:
    """The line that a run starts with, without its newline."""
    return _compact({_HEADER_KEY: SCHEMA, "run": to_json(run)})


def report_line(report: Report) -> str:
    """The line of one report, without its newline."""
    return _compact(report.to_dict())


def supersede(reports: Iterable[Report], first_step: int) -> list[Report]:
    """Drops what a run that starts at `first_step` measures anew.

    Args:
        reports: the reports before the start.
        first_step: the first step of the new part.

    Returns:
        The reports before that step. Of a report that straddles it, what was measured before
        it; its recommendations and what it says of probes go, because they rest on what is
        superseded.

    Example:
        >>> [report.step for report in supersede([Report(step=4), Report(step=9)], 9)]
        [4]
    """
    kept = (_before(report, first_step) for report in reports)
    return [report for report in kept if report is not None]


def read(logdir: str | os.PathLike[str]) -> Run:
    """Reads the record of a run, also of one that is still going on or was killed.

    Args:
        logdir: the folder that the run was told to write to, or the file in it.

    Returns:
        The run.

    Raises:
        RecordError: if there is no such file, if it holds no run, if a newer gradwatch wrote
            it, or if a line in its middle is corrupt.
    """
    path = _locate(Path(logdir))
    header: RunInfo | None = None
    reports: list[Report] = []
    for where, entry in _entries(path):
        if _HEADER_KEY in entry:
            header = _header(entry, where)
            reports = supersede(reports, header.first_step)
        elif header is None:
            raise RecordError(
                f"{where} has no header line above it; give a {FILE_NAME} that gradwatch wrote"
            )
        else:
            reports.append(_parsed(Report, entry, where))
    if header is None:
        raise RecordError(f"{path} has no whole header line; {_STOPPED}")
    return Run(header=header, reports=tuple(reports))


def _compact(data: Any) -> str:
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _before(report: Report, first_step: int) -> Report | None:
    if report.step < first_step:
        return report
    steps = tuple(item for item in report.steps if item.step < first_step)
    measurements = tuple(item for item in report.measurements if item.step < first_step)
    if not steps and not measurements:
        return None
    return replace(
        report,
        step=max([item.step for item in steps] + [item.step for item in measurements]),
        steps=steps,
        measurements=measurements,
        verdicts=tuple(item for item in report.verdicts if item.measurement.step < first_step),
        recommendations=(),
        probes=None,
    )


def _locate(path: Path) -> Path:
    if path.is_dir():
        path /= FILE_NAME
    if not path.exists():
        raise RecordError(
            f"there is no record of a run at {path}; give the logdir that was given to "
            f"gradwatch.watch, or the {FILE_NAME} in it"
        )
    return path


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Yields the JSON objects of the file, each with its place for error messages.
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}; check its permissions") from error
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise RecordError(f"{path} is empty; {_STOPPED}")
    for index, line in enumerate(lines):
        where = f"line {index + 1} of {path}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            after = lines[index + 1] if index + 1 < len(lines) else None
            if after is not None and not _starts_header(after):
                raise RecordError(f"{where} is corrupt ({error}); {_REMEDY}") from error
            _logger.debug("%s is torn and was passed over", where)
            continue
        if not isinstance(entry, dict):
            raise RecordError(f"{where} is a {type(entry).__name__}, not an object; {_REMEDY}")
        yield where, entry


def _header(entry: dict[str, Any], where: str) -> RunInfo:
    version = entry[_HEADER_KEY]
    if not isinstance(version, int):
        raise RecordError(f"{where} has the schema version {version!r}, not a number; {_REMEDY}")
    if version > SCHEMA:
        raise RecordError(
            f"{where} has the schema version {version}, this gradwatch reads up to {SCHEMA}; "
            "upgrade it with: pip install --upgrade torch-gradwatch"
        )
    return _parsed(RunInfo, entry.get("run"), where)


def _parsed(kind: type[RecordT], data: Any, where: str) -> RecordT:
    try:
        return from_json(kind, data)
    except RecordError as error:
        raise RecordError(f"{where} is corrupt ({error}); {_REMEDY}") from error


def _starts_header(line: bytes) -> bool:
    # As much of a header as a second kill has left counts as one.
    return line.startswith(_HEADER_START) or _HEADER_START.startswith(line)
