"""The four extension points, each an abstract class with one required method.

| role      | question                  | method                                            |
|-----------|---------------------------|---------------------------------------------------|
| `Monitor` | what is the value now?    | `read(view)`, device tensors, no host read        |
| `Bound`   | what should it be?        | `interval(measurement, step, model)`, pure floats |
| `Rule`    | what should the user do?  | `advise(history)`, pure, sees reports only        |
| `Sink`    | who is told?              | `write(report)`                                   |
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
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
    from gradwatch.capture.view import StepView
    from gradwatch.numerics.reading import Reading

Need = Literal["activations", "parameters", "updates", "microbatches"]


class Monitor(ABC):
    """Measures one family of quantities.

    Attributes:
        metrics: the names of all metrics that `read` may return; unique within a watch.
        needs: what must be captured besides the gradient norms, which are always there:
            `parameters` (their norms), `updates` (parameters before and after the step),
            `activations` (forward hooks on the layers), `microbatches` (hooks on the parameters).
    """

    metrics: ClassVar[tuple[str, ...]]
    needs: ClassVar[frozenset[Need]] = frozenset()

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
