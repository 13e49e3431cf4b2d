"""What stands at this moment of a training: the newest value, verdict and advice of each kind."""

from gradwatch.records import Measurement, Report, Verdict


class Standing:
    """Keeps the newest of everything, in constant memory.

    A verdict on the initialisation is given once and stands for the whole run; a report alone
    would forget it.
    """

    def __init__(self) -> None:
        self._measurements: dict[tuple[str, str], Measurement] = {}
        self._verdicts: dict[tuple[str, str, str], Verdict] = {}
        self._newest: Report | None = None

    def add(self, report: Report) -> None:
        """Takes in the newest report.

        Args:
            report: the report.
        """
        self._newest = report
        for item in report.measurements:
            self._measurements[item.metric, item.scope] = item
        for verdict in report.verdicts:
            item = verdict.measurement
            self._verdicts[verdict.bound, item.metric, item.scope] = verdict

    def summary(self) -> Report:
        """All that stands, as one report; an empty one before the first report."""
        if self._newest is None:
            return Report(step=0, notes=("nothing has been measured yet",))
        return Report(
            step=self._newest.step,
            steps=self._newest.steps[-1:],
            measurements=tuple(self._measurements.values()),
            verdicts=tuple(self._verdicts.values()),
            recommendations=self._newest.recommendations,
            notes=self._newest.notes,
            probes=self._newest.probes,
        )
