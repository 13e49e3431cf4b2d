"""The x-axis of Lightning's loggers, for reports that count optimizer steps."""

from dataclasses import replace
from typing import Any

from gradwatch.records import Measurement, Report
from gradwatch_lightning.trainer_facts import axis_now


class Axis:
    """Remembers where each sampled step stands on Lightning's own x-axis.

    The two counts agree unless the user's code decides when optimizers step.

    Args:
        trainer: of either package.
        most: sampled steps between two reports, at most.
    """

    def __init__(self, trainer: Any, most: int) -> None:
        self._trainer = trainer
        self._most = most
        self._places: dict[int, int] = {}

    def note(self, step: int) -> None:
        """Notes that a sampled step is under way; the last time before it is taken counts.

        Args:
            step: as the watch counts.
        """
        self._places[step] = axis_now(self._trainer)
        while len(self._places) > self._most:
            del self._places[next(iter(self._places))]

    def moved(self, report: Report) -> Report:
        """A report with its steps as Lightning counts them.

        Args:
            report: as the watch made it.

        Returns:
            The report for loggers.
        """
        if all(step == place for step, place in self._places.items()):
            return report
        return replace(
            report,
            step=self._place(report.step),
            steps=tuple(replace(item, step=self._place(item.step)) for item in report.steps),
            measurements=tuple(map(self._moved, report.measurements)),
            verdicts=tuple(
                replace(item, measurement=self._moved(item.measurement)) for item in report.verdicts
            ),
        )

    def _moved(self, item: Measurement) -> Measurement:
        return replace(item, step=self._place(item.step))

    def _place(self, step: int) -> int:
        return self._places.get(step, step)
