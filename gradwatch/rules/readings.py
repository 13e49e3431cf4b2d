"""The readings of the curvature in a history, however many reports apart they are."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

from gradwatch.records import MODEL, History, Measurement, Report, StepInfo

STABILITY: Final = "stability_ratio"
NOISE_STABILITY: Final = "noise_stability_ratio"
SHARPNESS: Final = "sharpness"
PRECONDITIONED: Final = "preconditioned_sharpness"
KEPT: Final = 64

_METRICS: Final = frozenset((STABILITY, NOISE_STABILITY, SHARPNESS, PRECONDITIONED))


@dataclass(frozen=True, slots=True)
class CurvatureReading:
    """A measurement of the whole model and the settings of its step.

    Attributes:
        measurement: what was measured; only the newest of a report has inputs.
        info: the settings under which the step was taken.
    """

    measurement: Measurement
    info: StepInfo

    @property
    def step(self) -> int:
        """The step of the measurement."""
        return self.measurement.step

    @property
    def value(self) -> float:
        """The measured number."""
        return self.measurement.value


class _Index:
    """What was found so far; each report is searched once, since there may be many."""

    def __init__(self) -> None:
        self._found: dict[str, deque[CurvatureReading]] = {
            metric: deque(maxlen=KEPT) for metric in _METRICS
        }
        self._newest: Report | None = None

    def learn(self, history: History) -> None:
        new: list[Report] = []
        for report in history[:][::-1]:
            if self._has_seen(report):
                break
            new.append(report)
        for report in reversed(new):
            self._add(report)
            self._newest = report

    def of(self, metric: str) -> tuple[CurvatureReading, ...]:
        return tuple(self._found[metric])

    def _has_seen(self, report: Report) -> bool:
        """Whether it is the newest one of last time, which has got its advice since."""
        newest = self._newest
        if newest is None:
            return False
        return (report.step, report.steps) == (newest.step, newest.steps) and (
            report.measurements is newest.measurements
        )

    def _add(self, report: Report) -> None:
        settings = {step.step: step for step in report.steps}
        for item in report.measurements:
            if item.metric in _METRICS and item.scope == MODEL:
                info = settings.get(item.step, report.info)
                self._found[item.metric].append(CurvatureReading(item, info))


_INDICES: Final[WeakKeyDictionary[History, _Index]] = WeakKeyDictionary()


def curvature_readings(history: History, metric: str) -> Sequence[CurvatureReading]:
    """The newest readings of a metric of the curvature.

    Readings may be a hundred reports apart, since a probe of the curvature is costly. What has
    been searched is remembered for as long as the history lives.

    Args:
        history: the reports so far.
        metric: one of `stability_ratio`, `noise_stability_ratio`, `sharpness` and
            `preconditioned_sharpness`.

    Returns:
        At most 64, oldest first.
    """
    index = _INDICES.setdefault(history, _Index())
    index.learn(history)
    return index.of(metric)
