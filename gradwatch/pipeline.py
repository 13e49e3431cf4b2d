"""From samples to reports: read, fetch once, judge, advise, tell."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor

from gradwatch.capture.part import CAPTURE
from gradwatch.capture.sample import Sample
from gradwatch.capture.selection import Selection
from gradwatch.interfaces import Bound, Monitor, Rule, Sink
from gradwatch.isolation import Isolation
from gradwatch.numerics.reading import Reading, fetch
from gradwatch.pending import Fetched, Pending
from gradwatch.records import (
    SEVERITIES,
    History,
    Measurement,
    ModelInfo,
    ProbeUse,
    Recommendation,
    Report,
    RunInfo,
    StepInfo,
    Verdict,
)
from gradwatch.serialise import to_json

Learn = Callable[[Mapping[str, Sequence[float]]], ModelInfo]
UseOfProbes = Callable[[int], ProbeUse | None]

_OF_A_STEP_TAKEN: Final = ("gradient_", "clip_", "update_", "unmoved_")
"""How the metrics begin that a step has only if the loss scaler did not skip it."""


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

    def names(self) -> dict[int, str]:
        """How each is called in messages: "sink MemorySink", the next one "sink MemorySink 2"."""
        roles: dict[str, Sequence[object]] = {
            "monitor": self.monitors,
            "bound": self.bounds,
            "rule": self.rules,
            "sink": self.sinks,
        }
        counts: Counter[str] = Counter()
        names: dict[int, str] = {}
        for role, group in roles.items():
            for part in group:
                name = f"{role} {type(part).__name__}"
                counts[name] += 1
                names[id(part)] = name if counts[name] == 1 else f"{name} {counts[name]}"
        return names

    @property
    def on_all_ranks(self) -> tuple[str, ...]:
        """The names of all but the sinks, which only one rank has."""
        names = self.names()
        return tuple(names[id(part)] for part in (*self.monitors, *self.bounds, *self.rules))


class Pipeline:
    """Collects the readings of sampled steps and turns them into reports.

    Args:
        parts: monitors, bounds, rules and sinks.
        selection: which metrics and scopes are reported.
        isolation: what to do when a part fails.
        model: facts about the model.
        shared: the parts whose failures concern all ranks, in the order of `read`'s `failures`.

    Attributes:
        history: the reports so far.
        first_seen: the step since which a recommendation stands, by knob and scope.
        advised: the knobs that have been advised on.
        clock: of the probes of all ranks, at the newest report; empty for a single process.
    """

    def __init__(
        self,
        parts: Parts,
        selection: Selection,
        isolation: Isolation,
        model: ModelInfo,
        shared: Sequence[str] = (),
    ) -> None:
        self.history = History(model)
        self.first_seen: dict[tuple[str, str], int] = {}
        self.advised: tuple[str, ...] = ()
        self.clock: tuple[float, ...] = ()
        self._parts = parts
        self._selection = selection
        self._isolation = isolation
        self._names = parts.names()
        self._shared = tuple(shared)
        self._probed = tuple(item.metrics for item in parts.monitors for _ in item.probed)
        self._pending: list[Pending] = []
        self._opened = False

    @property
    def has_pending(self) -> bool:
        """Whether sampled steps wait for a report."""
        return bool(self._pending)

    def read(self, sample: Sample | None, failures: Tensor | None = None) -> None:
        """Lets every monitor read a sampled step; nothing travels to the host.

        Args:
            sample: the step, None if it could not be captured.
            failures: for each shared part, on how many ranks it has failed; None if there are
                no other ranks.
        """
        pending = Pending(sample, failures, self._probed)
        self._pending.append(pending)
        if sample is None:
            return
        for monitor in self._parts.monitors:
            readings = self._isolation.run(self._names[id(monitor)], _read, monitor, sample)
            pending.readings.extend(readings or ())

    def report(self, run: RunInfo, learn: Learn, use_of_probes: UseOfProbes) -> Report | None:
        """Makes the report of all samples since the last one, with one transfer to the host.

        Args:
            run: the header, for sinks that have not been opened yet.
            learn: called with facts about layers that are new; returns the completed facts.
            use_of_probes: says at the step of the report what probes have cost.

        Returns:
            The report, already told to the sinks; None if there is nothing to report.
        """
        found = self._fetch()
        if not found:
            return None
        self.clock = found[-1].clock
        facts = {name: numbers for item in found for name, numbers in item.facts.items()}
        self.history.model = learn(facts)
        report = self._judged(found, use_of_probes(found[-1].step.step))
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
                name: to_json(self._isolation.run(name, monitor.state_dict) or {})
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

    def _fetch(self) -> list[Fetched]:
        """What is pending, on the host; without what not all ranks could contribute to."""
        pending, self._pending = self._pending, []
        tensors = [item.tensors() for item in pending]
        numbers = iter(fetch([tensor for group in tensors for tensor in group]))
        found = []
        for item, group in zip(pending, tensors, strict=True):
            arrived = [next(numbers) for _ in group]
            self._isolation.hear(item.failed(arrived, self._shared))
            whole = CAPTURE not in self._isolation.elsewhere
            if whole and (step := item.fetched(arrived)) is not None:
                found.append(step)
        return found

    def _kept(self, item: Fetched) -> list[Measurement]:
        """What is wanted; a step that the loss scaler skipped has no gradient to speak of."""
        return [
            found
            for found in self._with_derived(item)
            if self._selection.keeps(found.metric, found.scope)
            and not (item.step.skipped and found.metric.startswith(_OF_A_STEP_TAKEN))
        ]

    def _with_derived(self, item: Fetched) -> list[Measurement]:
        known = list(item.measurements)
        for monitor in self._parts.monitors:
            name = self._names[id(monitor)]
            known += (
                self._isolation.run(name, _derive, monitor, item, known, self.history.model) or ()
            )
        return known

    def _judged(self, found: Sequence[Fetched], probes: ProbeUse | None) -> Report:
        steps = tuple(item.step for item in found)
        measurements = _lean([value for item in found for value in self._kept(item)])
        report = Report(
            step=steps[-1].step,
            steps=steps,
            measurements=measurements,
            verdicts=tuple(self._verdicts(steps, measurements)),
            probes=probes,
        )
        self.history.append(report)
        advice = self._advice(report.step)
        notes = [note for item in found for note in item.notes]
        notes = list(dict.fromkeys([*notes, *self._isolation.notes]))
        report = replace(report, recommendations=advice, notes=tuple(notes))
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

    def _tell(self, run: RunInfo, report: Report) -> None:
        for sink in self._parts.sinks:
            name = self._names[id(sink)]
            if not self._opened:
                self._isolation.run(name, sink.open, run)
            self._isolation.run(name, sink.write, report)
        self._opened = True


def _read(monitor: Monitor, sample: Sample) -> list[Reading]:
    result = monitor.read(sample.view)
    readings = [result] if isinstance(result, Reading) else list(result)
    for reading in readings:
        _check_metric(monitor, "read", reading.metric)
    return readings


def _lean(measurements: Sequence[Measurement]) -> tuple[Measurement, ...]:
    """Only the newest value of a metric is judged, so only it keeps what a bound needs."""
    newest = {(item.metric, item.scope): place for place, item in enumerate(measurements)}
    kept = frozenset(newest.values())
    return tuple(
        item if place in kept or not item.inputs else replace(item, inputs={})
        for place, item in enumerate(measurements)
    )


def _derive(
    monitor: Monitor, item: Fetched, known: Sequence[Measurement], model: ModelInfo
) -> list[Measurement]:
    derived = list(monitor.derive(item.step, tuple(known), model))
    for measurement in derived:
        _check_metric(monitor, "derive", measurement.metric)
    return derived


def _check_metric(monitor: Monitor, method: str, metric: str) -> None:
    if metric not in monitor.metrics:
        raise ValueError(
            f"{type(monitor).__name__}.{method} returned the metric {metric!r}, which is not "
            f"among its metrics {monitor.metrics}"
        )


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
