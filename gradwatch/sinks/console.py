"""One line a report in the terminal."""

import math
import sys
from typing import TextIO

from typing_extensions import override

from gradwatch.interfaces import Sink
from gradwatch.records import MODEL, Recommendation, Report, RunInfo
from gradwatch.table import number

_Said = frozenset[tuple[str, str, str, str]]


class ConsoleSink(Sink):
    """Writes the values of the whole model, and the recommendations when they change.

        step 50  loss 0.412  gradient_norm_used 1.23
          warning learning_rate (model): 0.1 -> 0.05 P²/L. The steps are longer than ...
        step 100  loss 0.397  gradient_norm_used 1.19

    What probes cost and when they are due next is told again once all that was told has come.
    A recommendation counts as changed when it is about another knob or scope, when it became
    more or less severe, or when it turned round; not when only its numbers moved.

    Args:
        stream: where to write; None for what `sys.stdout` is at that time.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._said: _Said = frozenset()
        self._probes_told_until: float = -math.inf

    @override
    def open(self, run: RunInfo) -> None:
        self._said = frozenset()
        self._probes_told_until = -math.inf

    @override
    def write(self, report: Report) -> None:
        lines = [_headline(report)]
        said = frozenset(map(_identity, report.recommendations))
        if said != self._said:
            lines += [_advice(item) for item in report.recommendations]
            lines += [] if said else ["  no recommendations any more"]
        self._said = said
        lines += self._of_probes(report)
        self._put("".join(f"{line}\n" for line in lines))

    def _of_probes(self, report: Report) -> list[str]:
        if report.probes is None or report.step < self._probes_told_until:
            return []
        self._probes_told_until = max(report.probes.next_steps.values(), default=math.inf)
        return [f"  {report.probes}"]

    def _put(self, text: str) -> None:
        stream = sys.stdout if self._stream is None else self._stream
        # A terminal that cannot show "²" must not cost the user the whole line.
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, errors="replace").decode(encoding))
        stream.flush()


def _headline(report: Report) -> str:
    values = [
        f"{item.metric} {number(item.value)}"
        for item in report.measurements
        if item.scope == MODEL and item.step == report.step
    ]
    return "  ".join([f"step {report.step}", *values])


def _identity(item: Recommendation) -> tuple[str, str, str, str]:
    return (item.knob, item.scope, item.severity, item.direction)


def _advice(item: Recommendation) -> str:
    return f"  {item.severity} {item.knob} ({item.scope}): {item.change}. {item.reason}"
