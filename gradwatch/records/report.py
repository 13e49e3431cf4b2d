"""What one report step said, what a run is, and the reports so far."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from typing_extensions import override

from gradwatch.records.advice import Recommendation
from gradwatch.records.judgement import MODEL, Measurement, Verdict
from gradwatch.records.model import ModelInfo
from gradwatch.records.printing import report_text
from gradwatch.records.probe_use import ProbeUse
from gradwatch.records.step import StepInfo
from gradwatch.serialise import from_json, to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that was measured, judged and recommended since the report before.

    Attributes:
        step: the step of the report, the newest one sampled.
        steps: settings of each sampled step in it, oldest first.
        measurements: of all those steps.
        verdicts: on the newest value of each metric and scope.
        recommendations: all that stand at this step, the most severe first.
        notes: what could not be measured, and why; what failed.
        probes: what the probes have cost, and when the next ones are due; None without probes.
    """

    step: int
    steps: tuple[StepInfo, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    recommendations: tuple[Recommendation, ...] = ()
    notes: tuple[str, ...] = ()
    # A matter of the clock: two reports that say the same of a training are equal.
    probes: ProbeUse | None = field(default=None, compare=False)

    @property
    def info(self) -> StepInfo:
        """The settings of the newest step."""
        return self.steps[-1] if self.steps else StepInfo(step=self.step)

    def value(self, metric: str, scope: str = MODEL) -> float | None:
        """The newest value of a metric in this report.

        Args:
            metric: its name.
            scope: a parameter, a layer, or "model".

        Returns:
            The value, or None if it is not in the report.
        """
        for measurement in reversed(self.measurements):
            if measurement.metric == metric and measurement.scope == scope:
                return measurement.value
        return None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values that `json.dumps` accepts."""
        data: dict[str, Any] = to_json(self)
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Report":
        """Builds a report from what `to_dict` returned.

        Args:
            data: the dictionary; NaN and infinities are the strings "nan", "inf", "-inf".

        Returns:
            The report.
        """
        return from_json(cls, data)

    @override
    def __str__(self) -> str:
        return report_text(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The header of a run, handed to each sink before the first report.

    Attributes:
        model: facts about the model.
        first_step: the first step of this part of the run; above 0 after a resume.
        metrics: every metric that the monitors of the run may report.
        bounded: those of them that some bound judges.
        advised: knobs that were advised on before `first_step`; their curves go on with 0.
        configuration: the options of the watch, as plain values.
        versions: of gradwatch, torch, numpy and Python.
    """

    model: ModelInfo
    first_step: int = 0
    metrics: tuple[str, ...] = ()
    bounded: tuple[str, ...] = ()
    advised: tuple[str, ...] = ()
    configuration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)


class History(Sequence[Report]):
    """The reports that rules see: the first one and the newest `window` ones.

    Statements about the initialisation rest on the first report, so it is never dropped; the
    window keeps the memory of a long training constant.

    Args:
        model: facts about the model; rules read them as `history.model`.
        window: how many of the newest reports to keep.
    """

    def __init__(self, model: ModelInfo, window: int = 256) -> None:
        self.model = model
        self._first: Report | None = None
        self._newest: deque[Report] = deque(maxlen=window)

    def append(self, report: Report) -> None:
        """Adds the newest report."""
        if self._first is None:
            self._first = report
        else:
            self._newest.append(report)

    def replace_newest(self, report: Report) -> None:
        """Puts a completed report in the place of the newest one."""
        if self._newest:
            self._newest[-1] = report
        else:
            self._first = report

    @override
    def __len__(self) -> int:
        return len(self._newest) + (self._first is not None)

    @overload
    def __getitem__(self, index: int) -> Report: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Report]: ...
    @override
    def __getitem__(self, index: int | slice) -> Report | Sequence[Report]:
        return tuple(self)[index]

    @override
    def __iter__(self) -> Iterator[Report]:
        if self._first is not None:
            yield self._first
        yield from self._newest
