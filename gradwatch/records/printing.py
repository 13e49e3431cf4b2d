"""A report as text: the headline values, the verdicts by bound, the advice."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gradwatch.records.advice import Recommendation
from gradwatch.records.judgement import MODEL, Verdict
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
    rows = [
        [status, bound, _scopes(group), _values(group), _expected(group), group[0].because]
        for (status, bound), group in groups.items()
        if status != "holds"
    ]
    header = ["verdict", "bound", "scope", "value", "expected", "because"]
    sources = {verdict.bound: verdict.source for verdict in verdicts if verdict.status != "holds"}
    cited = [f"  {bound}: {source}" for bound, source in sources.items()]
    table = [text_table(header, rows, max_width=40), *cited] if rows else []
    return "\n".join([f"Verdicts: {summary}", *table])


def _counted(status: str) -> str:
    return {"holds": "hold"}.get(status, status)


def _scopes(group: Sequence[Verdict]) -> str:
    first, last = group[0].measurement.scope, group[-1].measurement.scope
    return first if len(group) == 1 else f"{first} to {last} ({len(group)})"


def _values(group: Sequence[Verdict]) -> str:
    values = [verdict.measurement.value for verdict in group]
    return _range(min(values), max(values))


def _expected(group: Sequence[Verdict]) -> str:
    lower = min(verdict.interval.lower for verdict in group)
    return _range(lower, max(verdict.interval.upper for verdict in group))


def _range(low: float, high: float) -> str:
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def _advised(recommendations: Sequence[Recommendation]) -> str:
    if not recommendations:
        return "No recommendations."
    rows = [
        [item.severity, item.knob, item.scope, item.change, item.reason] for item in recommendations
    ]
    return text_table(["severity", "knob", "scope", "change", "reason"], rows)
