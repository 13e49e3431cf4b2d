"""A report as text: the headline values, the verdicts by bound, the advice."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradwatch.records.advice import Recommendation
from gradwatch.records.judgement import MODEL, Interval, Verdict
from gradwatch.table import number, text_table

if TYPE_CHECKING:
    from gradwatch.records.report import Report


def report_text(report: "Report") -> str:
    """What `print(report)` shows.

    Args:
        report: the report.

    Returns:
        Several paragraphs, without a newline at the end.
    """
    notes = "\n".join(f"  - {note}" for note in report.notes)
    paragraphs = [
        f"gradwatch at step {report.step}",
        _measured(report),
        _judged(report.verdicts),
        _advised(report.recommendations),
        f"Not measured:\n{notes}" if notes else "",
        "" if report.probes is None else str(report.probes),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def _measured(report: "Report") -> str:
    newest = {
        item.metric: [item.metric, number(item.value), item.unit]
        for item in report.measurements
        if item.scope == MODEL
    }
    return text_table(["metric", "value", "unit"], list(newest.values())) if newest else ""


def _judged(verdicts: Sequence[Verdict]) -> str:
    """One line for each bound and status, since a bound may speak of a hundred layers."""
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict.status, verdict.bound), []).append(verdict)
    if not groups:
        return ""
    counts = Counter(verdict.status for verdict in verdicts)
    summary = ", ".join(f"{count} {_counted(status)}" for status, count in counts.items())
    rows = [_row(group) for (status, _), group in groups.items() if status != "holds"]
    sources = {verdict.bound: verdict.source for verdict in verdicts if verdict.status != "holds"}
    cited = [f"  {bound}: {source}" for bound, source in sources.items()]
    header = ["verdict", "bound", "scope", "step", "value", "expected", "because"]
    if not any(row[-1] for row in rows):  # only what is undecided or vacuous has a reason
        header, rows = header[:-1], [row[:-1] for row in rows]
    table = [text_table(header, rows, max_width=40), *cited] if rows else []
    return "\n".join([f"Verdicts: {summary}", *table])


def _counted(status: str) -> str:
    return {"holds": "hold"}.get(status, status)


def _row(group: Sequence[Verdict]) -> list[str]:
    """The verdict of a group that is furthest outside, and how many more there are."""
    worst = max(group, key=_distance)
    item, interval = worst.measurement, worst.interval
    others = "" if len(group) == 1 else f", worst of {len(group)}"
    return [
        worst.status,
        worst.bound,
        f"{item.scope}{others}",
        str(item.step),
        number(item.value),
        interval_text(interval),
        worst.because,
    ]


def interval_text(interval: Interval) -> str:
    """The interval as people read it.

    Args:
        interval: what is allowed.

    Returns:
        Both edges, or the only one.

    Example:
        >>> interval_text(Interval(upper=0.5)), interval_text(Interval(lower=0.0, upper=2.0))
        ('at most 0.5', '0 to 2')
    """
    if math.isinf(interval.lower) and math.isfinite(interval.upper):
        return f"at most {number(interval.upper)}"
    if math.isinf(interval.upper) and math.isfinite(interval.lower):
        return f"at least {number(interval.lower)}"
    return f"{number(interval.lower)} to {number(interval.upper)}"


def _distance(verdict: Verdict) -> float:
    """How far outside, by factors where all numbers are positive, else by the margin."""
    value, interval = verdict.measurement.value, verdict.interval
    if value > 0 and interval.lower > 0 and math.isfinite(interval.upper):
        return max(math.log(interval.lower / value), math.log(value / interval.upper))
    return -verdict.margin


def _advised(recommendations: Sequence[Recommendation]) -> str:
    if not recommendations:
        return "No recommendations."
    rows = [
        [item.severity, item.knob, item.scope, item.change, item.reason] for item in recommendations
    ]
    return text_table(["severity", "knob", "scope", "change", "reason"], rows)
