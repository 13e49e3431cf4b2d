"""From samples to reports: read, fetch once, judge, advise, tell."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gradwatch.capture.sample import Sample
from gradwatch.capture.selection import Selection
from gradwatch.interfaces import Bound, Monitor, Rule, Sink
from gradwatch.isolation import Isolation
from gradwatch.numerics.reading import Reading, fetch
from gradwatch.records import (
    SEVERITIES,
    History,
    Measurement,
    ModelInfo,
    Recommendation,
    Report,
    RunInfo,
    StepInfo,
    Verdict,
)

Learn = Callable[[list[list[float]]], ModelInfo]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a watch is made of; the order of each tuple is the order in which it is used.

    Attributes:
        monitors: what is measured.
        bounds: what it should be.
        rules: what to do about it.
        sinks: who is told.
    """

    monitors: tuple[Monitor, ...] = ()
    bounds: tuple[Bound, ...] = ()
    rules: tuple[Rule, ...] = ()
    sinks: tuple[Sink, ...] = ()


@dataclass(slots=True)
class _Pending:
    """One sampled step whose numbers are still on the device."""

    sample: Sample
    readings: list[Reading] = field(default_factory=list)


class Pipeline:
    """Collects the readings of sampled steps and turns them into reports.

    Args:
        parts: monitors, bounds, rules and sinks.
        selection: which metrics and scopes are reported.
        isolation: what to do when a part fails.
        model: facts about the model.

    Attributes:
        history: the reports so far.
        first_seen: the step since which a recommendation stands, by knob and scope.
        advised: the knobs that have been advised on.
    """

    def __init__(
        self, parts: Parts, selection: Selection, isolation: Isolation, model: ModelInfo
    ) -> None:
        self.history = History(model)
        self.first_seen: dict[tuple[str, str], int] = {}
        self.advised: tuple[str, ...] = ()
        self._parts = parts
        self._selection = selection
        self._isolation = isolation
        self._names = _names(parts)
        self._pending: list[_Pending] = []
        self._opened = False

    @property
    def has_pending(self) -> bool:
        """Whether sampled steps wait for a report."""
        return bool(self._pending)

    def read(self, sample: Sample) -> None:
        """Lets every monitor read a sampled step; nothing travels to the host.

        Args:
            sample: the step.
        """
        pending = _Pending(sample)
        for monitor in self._parts.monitors:
            readings = self._isolation.run(self._names[id(monitor)], _read, monitor, sample)
            pending.readings.extend(readings or ())
        self._pending.append(pending)

    def report(self, run: RunInfo, facts: Sequence[Tensor], learn: Learn) -> Report:
        """Makes the report of all samples since the last one, with one transfer to the host.

        Args:
            run: the header, for sinks that have not been opened yet.
            facts: tensors that the facts about the model still need.
            learn: called with their numbers; returns the completed facts.

        Returns:
            The report, already told to the sinks.
        """
        pending, self._pending = self._pending, []
        settings = [item.sample.tensors() for item in pending]
        values = [
            tensor for item in pending for reading in item.readings for tensor in reading.tensors()
        ]
        numbers = iter(
            fetch([*facts, *(tensor for group in settings for tensor in group), *values])
        )
        self.history.model = learn([next(numbers) for _ in facts])
        steps = tuple(
            item.sample.complete([next(numbers) for _ in group])
            for item, group in zip(pending, settings, strict=True)
        )
        measurements: list[Measurement] = []
        for item, step in zip(pending, steps, strict=True):
            for reading in item.readings:
                fetched = [number for _ in reading.tensors() for number in next(numbers)]
                measurements += self._kept(reading.measurements(step.step, fetched), step)
        report = self._judged(steps, tuple(measurements), pending)
        self._tell(replace(run, model=self.history.model), report)
        return report

    def close(self) -> None:
        """Closes every sink, whatever has happened to it."""
        with ExitStack() as all_of_them:
            for sink in reversed(self._parts.sinks):
                name = f"closing of {self._names[id(sink)]}"
                all_of_them.callback(self._isolation.run, name, sink.close)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the first report, since when advice stands, monitors."""
        return {
            "first_report": self.history[0].to_dict() if self.history else None,
            "first_seen": [[knob, scope, step] for (knob, scope), step in self.first_seen.items()],
            "advised": list(self.advised),
            "monitors": {
                name: self._isolation.run(name, monitor.state_dict) or {}
                for monitor in self._parts.monitors
                if (name := self._names[id(monitor)])
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], model: ModelInfo) -> None:
        """Takes back what `state_dict` returned; a damaged state changes nothing.

        Args:
            state: of a watch with the same monitors; others are left as they are.
            model: the facts about the model at that time.

        Raises:
            KeyError: if something is missing from the state.
        """
        history = History(model)
        if state["first_report"] is not None:
            history.append(Report.from_dict(state["first_report"]))
        first_seen = {(knob, scope): step for knob, scope, step in state["first_seen"]}
        monitors, advised = dict(state["monitors"]), tuple(state["advised"])
        self.history, self.first_seen, self.advised = history, first_seen, advised
        for monitor in self._parts.monitors:
            name = self._names[id(monitor)]
            saved = monitors.get(name)
            if saved:
                self._isolation.run(name, monitor.load_state_dict, saved)

    def _kept(self, measurements: Iterable[Measurement], step: StepInfo) -> list[Measurement]:
        """What is wanted; a step that the loss scaler skipped has no gradient to speak of."""
        return [
            item
            for item in measurements
            if self._selection.keeps(item.metric, item.scope)
            and not (
                step.skipped
                and item.metric.startswith(("gradient_", "clip_", "update_", "unmoved_"))
            )
        ]

    def _judged(
        self,
        steps: tuple[StepInfo, ...],
        measurements: tuple[Measurement, ...],
        pending: Sequence[_Pending],
    ) -> Report:
        report = Report(
            step=steps[-1].step,
            steps=steps,
            measurements=measurements,
            verdicts=tuple(self._verdicts(steps, measurements)),
        )
        self.history.append(report)
        advice = self._advice(report.step)
        report = replace(report, recommendations=advice, notes=self._notes(pending))
        self.history.replace_newest(report)
        return report

    def _verdicts(
        self, steps: Sequence[StepInfo], measurements: Sequence[Measurement]
    ) -> list[Verdict]:
        by_step = {step.step: step for step in steps}
        newest = {(item.metric, item.scope): item for item in measurements}
        verdicts: list[Verdict] = []
        for bound in self._parts.bounds:
            concerned = [item for item in newest.values() if item.metric == bound.metric]
            judged = self._isolation.run(
                self._names[id(bound)], _judge, bound, concerned, by_step, self.history.model
            )
            verdicts += judged or ()
        return verdicts

    def _advice(self, step: int) -> tuple[Recommendation, ...]:
        advice: list[Recommendation] = []
        for rule in self._parts.rules:
            given = self._isolation.run(self._names[id(rule)], _advise, rule, self.history)
            advice += given or ()
        dated = [
            replace(item, since_step=self.first_seen.setdefault((item.knob, item.scope), step))
            for item in advice
        ]
        self.advised = tuple(dict.fromkeys([*self.advised, *(item.knob for item in advice)]))
        standing = {(item.knob, item.scope) for item in dated}
        self.first_seen = {key: step for key, step in self.first_seen.items() if key in standing}
        return tuple(sorted(dated, key=lambda item: -SEVERITIES.index(item.severity)))

    def _notes(self, pending: Sequence[_Pending]) -> tuple[str, ...]:
        notes = [note for item in pending for note in item.sample.view.notes]
        return tuple(dict.fromkeys([*notes, *self._isolation.notes]))

    def _tell(self, run: RunInfo, report: Report) -> None:
        for sink in self._parts.sinks:
            name = self._names[id(sink)]
            if not self._opened:
                self._isolation.run(name, sink.open, run)
            self._isolation.run(name, sink.write, report)
        self._opened = True


def _names(parts: Parts) -> dict[int, str]:
    """How each part is called in messages: "sink MemorySink", the next one "sink MemorySink 2"."""
    roles: dict[str, Sequence[object]] = {
        "monitor": parts.monitors,
        "bound": parts.bounds,
        "rule": parts.rules,
        "sink": parts.sinks,
    }
    counts: Counter[str] = Counter()
    names: dict[int, str] = {}
    for role, group in roles.items():
        for part in group:
            name = f"{role} {type(part).__name__}"
            counts[name] += 1
            names[id(part)] = name if counts[name] == 1 else f"{name} {counts[name]}"
    return names


def _read(monitor: Monitor, sample: Sample) -> list[Reading]:
    result = monitor.read(sample.view)
    readings = [result] if isinstance(result, Reading) else list(result)
    for reading in readings:
        if reading.metric not in monitor.metrics:
            raise ValueError(
                f"{type(monitor).__name__}.read returned the metric {reading.metric!r}, which is "
                f"not among its metrics {monitor.metrics}"
            )
    return readings


def _advise(rule: Rule, history: History) -> list[Recommendation]:
    advice = list(rule.advise(history))
    for item in advice:
        if not isinstance(item, Recommendation):
            raise TypeError(f"{type(rule).__name__}.advise must give Recommendations, got {item!r}")
    return advice


def _judge(
    bound: Bound,
    measurements: Sequence[Measurement],
    steps: dict[int, StepInfo],
    model: ModelInfo,
) -> list[Verdict]:
    verdicts = []
    for measurement in measurements:
        interval = bound.interval(measurement, steps[measurement.step], model)
        if interval is not None:
            verdicts.append(
                Verdict.of(measurement, interval, bound=type(bound).__name__, source=bound.source)
            )
    return verdicts
