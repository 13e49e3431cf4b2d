"""One sampled step on its way to the host."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from torch import Tensor

from gradwatch.capture.ranks.reduction import INCOMPLETE
from gradwatch.capture.sample import Sample
from gradwatch.numerics.reading import Reading
from gradwatch.records import Measurement, StepInfo

SOME_RANKS_ONLY: Final = "only some of the ranks know their part of it"


@dataclass(frozen=True, slots=True)
class Fetched:
    """A sampled step on the host.

    Attributes:
        step: its settings.
        measurements: its values, all of them.
        facts: `weight_facts` of each layer that it was the first to show.
        notes: what could not be measured, and why.
        clock: of the probes of all ranks; empty for a single process.
    """

    step: StepInfo
    measurements: tuple[Measurement, ...]
    facts: Mapping[str, Sequence[float]]
    notes: tuple[str, ...]
    clock: tuple[float, ...] = ()


@dataclass(slots=True)
class Pending:
    """A sampled step whose numbers are still on the device.

    Attributes:
        sample: the step, None if it could not be captured.
        failures: for each part that concerns all ranks, on how many of them it has failed, then
            whether a rank left in this step, then what only some ranks know; None if there are
            no others.
        probed: for each number that probes may measure, the metrics of its monitor.
        readings: of all monitors.
    """

    sample: Sample | None
    failures: Tensor | None = None
    probed: Sequence[tuple[str, ...]] = ()
    readings: list[Reading] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """What must travel to the host."""
        found = [] if self.failures is None else [self.failures]
        if self.sample is not None:
            clock = [] if self.sample.clock is None else [self.sample.clock]
            found += [*clock, *self.sample.facts.values(), *self.sample.tensors()]
        return found + [tensor for reading in self.readings for tensor in reading.tensors()]

    def failed(self, numbers: Sequence[Sequence[float]], parts: Sequence[str]) -> list[str]:
        """The parts that have failed on any rank.

        Args:
            numbers: what `tensors` became.
            parts: all that concern all ranks.

        Returns:
            Their names.
        """
        if self.failures is None:
            return []
        # What follows them is about this step alone.
        return [part for part, count in zip(parts, numbers[0], strict=False) if count > 0]

    def fetched(self, numbers: Sequence[Sequence[float]]) -> Fetched | None:
        """The step with its numbers.

        Args:
            numbers: what `tensors` became.

        Returns:
            The step, or None if it could not be captured by all ranks.
        """
        made_of = [*INCOMPLETE.values(), *self.probed]
        left, *incomplete = (0.0,) if self.failures is None else numbers[0][-1 - len(made_of) :]
        if self.sample is None or left > 0:
            return None
        rest = iter(numbers[0 if self.failures is None else 1 :])
        clock = () if self.sample.clock is None else tuple(next(rest))
        facts = {name: next(rest) for name in self.sample.facts}
        step = self.sample.complete([next(rest) for _ in self.sample.tensors()])
        worthless = [item for item, count in zip(made_of, incomplete, strict=False) if count > 0]
        lost = {metric for metrics in worthless for metric in metrics}
        notes = [f"{', '.join(metrics)}: {SOME_RANKS_ONLY}" for metrics in dict.fromkeys(worthless)]
        return Fetched(
            replace(step, grads_clipped=None) if "clip_coefficient" in lost else step,
            tuple(item for item in self._measurements(step.step, rest) if item.metric not in lost),
            facts,
            (*self.sample.view.notes, *notes),
            clock,
        )

    def _measurements(self, step: int, numbers: Iterator[Sequence[float]]) -> Iterator[Measurement]:
        for reading in self.readings:
            values = [number for _ in reading.tensors() for number in next(numbers)]
            yield from reading.measurements(step, values)
