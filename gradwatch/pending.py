"""One sampled step on its way to the host."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gradwatch.capture.sample import Sample
from gradwatch.numerics.reading import Reading
from gradwatch.records import Measurement, StepInfo


@dataclass(frozen=True, slots=True)
class Fetched:
    """A sampled step on the host.

    Attributes:
        step: its settings.
        measurements: its values, all of them.
        facts: `weight_facts` of each layer that it was the first to show.
        notes: what could not be measured, and why.
    """

    step: StepInfo
    measurements: tuple[Measurement, ...]
    facts: Mapping[str, Sequence[float]]
    notes: tuple[str, ...]


@dataclass(slots=True)
class Pending:
    """A sampled step whose numbers are still on the device.

    Attributes:
        sample: the step, None if it could not be captured.
        failures: for each part that concerns all ranks, on how many of them it has failed; None
            if there are no others.
        readings: of all monitors.
    """

    sample: Sample | None
    failures: Tensor | None = None
    readings: list[Reading] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """What must travel to the host."""
        found = [] if self.failures is None else [self.failures]
        if self.sample is not None:
            found += [*self.sample.facts.values(), *self.sample.tensors()]
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
        return [part for part, count in zip(parts, numbers[0], strict=True) if count > 0]

    def fetched(self, numbers: Sequence[Sequence[float]]) -> Fetched | None:
        """The step with its numbers.

        Args:
            numbers: what `tensors` became.

        Returns:
            The step, or None if it could not be captured.
        """
        if self.sample is None:
            return None
        rest = iter(numbers[0 if self.failures is None else 1 :])
        facts = {name: next(rest) for name in self.sample.facts}
        step = self.sample.complete([next(rest) for _ in self.sample.tensors()])
        measurements = tuple(self._measurements(step.step, rest))
        return Fetched(step, measurements, facts, tuple(self.sample.view.notes))

    def _measurements(self, step: int, numbers: Iterator[Sequence[float]]) -> Iterator[Measurement]:
        for reading in self.readings:
            values = [number for _ in reading.tensors() for number in next(numbers)]
            yield from reading.measurements(step, values)
