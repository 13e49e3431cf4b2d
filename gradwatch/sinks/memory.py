"""Reports in memory, for tests and notebooks."""

from typing_extensions import override

from gradwatch.errors import ConfigError
from gradwatch.interfaces import Sink
from gradwatch.records import Report, RunInfo
from gradwatch.run_record import supersede


class MemorySink(Sink):
    """Keeps the reports in a list.

    Attributes:
        run: facts about the run; None before it has begun.
        reports: the reports, oldest first.

    Args:
        max_reports: keep only that many of the newest; None keeps all, which a long training
            pays for in memory.

    Raises:
        ConfigError: if `max_reports` is below 1.

    Example:
        >>> sink = MemorySink()
        >>> sink.write(Report(step=3))
        >>> sink.reports[-1].step
        3
    """

    def __init__(self, *, max_reports: int | None = None) -> None:
        if max_reports is not None and max_reports < 1:
            raise ConfigError(f"max_reports must be at least 1, or None for all, got {max_reports}")
        self.run: RunInfo | None = None
        self.reports: list[Report] = []
        self._max_reports = max_reports

    @override
    def open(self, run: RunInfo) -> None:
        self.run = run
        self.reports[:] = supersede(self.reports, run.first_step)

    @override
    def write(self, report: Report) -> None:
        self.reports.append(report)
        if self._max_reports is not None:
            del self.reports[: -self._max_reports]
