"""The four extension points, each an abstract class with one required method.

| role      | question                  | method                                            |
|-----------|---------------------------|---------------------------------------------------|
| `Monitor` | what is the value now?    | `read(view)`, device tensors, no host read        |
| `Bound`   | what should it be?        | `interval(measurement, step, model)`, pure floats |
| `Rule`    | what should the user do?  | `advise(history)`, pure, sees reports only        |
| `Sink`    | who is told?              | `write(report)`                                   |
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gradwatch.records import (
    History,
    Interval,
    Measurement,
    ModelInfo,
    Recommendation,
    Report,
    RunInfo,
    StepInfo,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gradwatch.capture.probe.view import ProbeView
    from gradwatch.capture.view import StepView
    from gradwatch.numerics.reading import Reading

Need = Literal[
    "activations",
    "parameters",
    "updates",
    "microbatches",
    "independent_gradients",
    "microbatch_covariance",
    "adam_moments",
]


class Monitor(ABC):
    """Measures one family of quantities.

    Attributes:
        metrics: the names of all metrics that `read` may return; unique within a watch.
        needs: what must be captured besides the gradient norms, which are always there:
            `parameters` (their norms), `updates` (parameters before and after the step),
            `activations` (forward hooks on the layers), `microbatches` (hooks on the parameters),
            `independent_gradients` (the same, where a step has more than one gradient),
            `microbatch_covariance` (projections of them, where a step has four or more),
            `adam_moments` (one pass over the state of an Adam).
        probed: names of the numbers that `probe` measures, unique within a watch; none for a
            monitor that does not run the model again.
        probe_cost: of one probe, in gradients of a whole batch; what it took is measured later.
    """

    metrics: ClassVar[tuple[str, ...]]
    needs: ClassVar[frozenset[Need]] = frozenset()
    probed: ClassVar[tuple[str, ...]] = ()
    probe_cost: float = 1.0

    @abstractmethod
    def read(self, view: "StepView") -> "Reading | Iterable[Reading]":
        """Reads the values of one sampled step, as tensors that stay on their device.

        Must not read a tensor on the host (`.item()`, `float()`, `print`): the watch does it
        once per report for all monitors together. A value that the run cannot give is left
        out, and `view.note(reason)` says why.

        Args:
            view: the sampled step.

        Returns:
            One or several readings.
        """

    def probe(self, view: "ProbeView") -> "Mapping[str, Tensor]":
        """Runs the model again, in some of the sampled steps, as far as the budget allows.

        Called before `read`, with the parameters as they were before the optimizer step. Random
        streams, buffers and gradients of the training are protected. No host reads.

        Args:
            view: the training loss as a function of the parameters.

        Returns:
            Single numbers by name, those of `probed`, or nothing if there is no use in it in this
            step. Those of several ranks are averaged; `read` finds them in `view.probed`.
        """
        return {}

    def joint_sums(self, view: "ProbeView") -> int:
        """How many sums over the ranks one probe takes: gradients and products of `curvature`.

        Must be the same on all ranks: it may depend on the settings of the monitor and on the kind
        of the optimizer, not on what was measured.

        Args:
            view: without objectives.

        Returns:
            Their number; 0 if each rank probes by itself, and their numbers are averaged.
        """
        return 0

    def derive(
        self, step: StepInfo, measurements: Sequence[Measurement], model: ModelInfo
    ) -> Iterable[Measurement]:
        """Works out what follows from the values of one sampled step, on the host.

        Called once for each sampled step, in order, when its values have arrived. Running sums
        belong here.

        Args:
            step: the settings of the step.
            measurements: of this step: of all monitors' `read`, and of the `derive` of those that
                stand before this one in the list.
            model: facts about the model.

        Returns:
            Further measurements.
        """
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What must survive a checkpoint, as plain values; nothing by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned."""


class Bound(ABC):
    """States what a metric should be.

    Attributes:
        metric: the metric that it judges.
        source: authors, year, statement, arXiv id.
    """

    metric: str
    source: ClassVar[str]

    @abstractmethod
    def interval(
        self, measurement: Measurement, step: StepInfo, model: ModelInfo
    ) -> Interval | None:
        """Gives the interval that a measured value should lie in.

        Args:
            measurement: the newest value of `metric` for one scope.
            step: the settings of its step.
            model: facts about the model.

        Returns:
            The interval, or None where the statement says nothing about this measurement.
        """


class Rule(ABC):
    """Turns verdicts into concrete changes, and stays silent where theory is silent."""

    @abstractmethod
    def advise(self, history: History) -> Iterable[Recommendation]:
        """Gives the recommendations that stand now.

        Must be a pure function of the reports: the same history, the same advice.

        Args:
            history: the reports so far, the newest last; never empty. `history.model` has
                the facts about the model.

        Returns:
            The recommendations; none is a good answer.
        """


class Sink(ABC):
    """Tells somebody: a file, a dashboard, a list in memory."""

    def open(self, run: RunInfo) -> None:
        """Called once, before the first report.

        Args:
            run: facts about the run. `run.first_step` above 0 means that it was resumed:
                what was written at that step or later is superseded.
        """

    @abstractmethod
    def write(self, report: Report) -> None:
        """Takes one report.

        Args:
            report: the report.
        """

    def close(self) -> None:
        """Called once, at the end, even if `write` has failed."""
