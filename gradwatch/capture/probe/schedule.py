"""Which probes run in a sampled step: no more than the budget pays for."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Clock:
    """Where the time of a training went, up to some step; of all ranks added up.

    Attributes:
        steps: optimizer steps since the watch was attached.
        elapsed: seconds since then.
        spent: seconds in each probe, by name.
    """

    steps: int = 0
    elapsed: float = 0.0
    spent: Mapping[str, float] = field(default_factory=dict)


class Schedule:
    """Spreads probes over a training so that they take at most a share of its time.

    It is a function of the steps and of the clock that was read last, which is the same on all
    ranks, so that all of them probe in the same steps. Between two readings it counts on what
    steps and probes have taken so far. Probes take turns; one that has not run yet is taken to
    cost as many steps as it says it needs gradients.

    Args:
        costs: of each probe in gradients of a whole batch, by name.
        budget: share of the training time; None runs every probe in every sampled step.

    Attributes:
        origin: the step at which the watch was attached; time counts from there.
    """

    def __init__(self, costs: Mapping[str, float], budget: float | None) -> None:
        self._costs = dict(costs)
        self._budget = budget
        self._queue = list(costs)
        self._runs: Counter[str] = Counter()
        self._counted: Counter[str] = Counter()
        self._clock = Clock()
        self._owed = 0.0
        self.origin = 0

    def starts_at(self, step: int) -> None:
        """The training begins, or goes on, at this step; time counts from here."""
        self.origin = step

    def due(self, step: int, *, without: frozenset[str] = frozenset()) -> list[str]:
        """The probes to run in a sampled step.

        Args:
            step: the optimizer step.
            without: those that are switched off.

        Returns:
            Their names.
        """
        waiting = [name for name in self._queue if name not in without]
        if self._budget is None:
            return waiting
        allowance, chosen = self._allowance(step), []
        for name in waiting:
            if not 0 < self._cost(name) <= allowance:
                break  # the others wait for their turn, or cheap ones would always go first
            allowance -= self._cost(name)
            chosen.append(name)
        return chosen

    def ran(self, name: str, *, used: bool) -> None:
        """A probe has run.

        Args:
            name: which.
            used: it evaluated something; one that had nothing to do says nothing about its cost.
        """
        self._queue.remove(name)
        self._queue.append(name)
        if used:
            self._owed += self._cost(name)
            self._runs[name] += 1

    def read(self, clock: Clock) -> None:
        """Takes the time that has really passed.

        Args:
            clock: of all ranks together.
        """
        self._clock = clock
        self._counted = self._runs.copy()
        self._owed = 0.0

    @property
    def spent_share(self) -> float:
        """Share of the time that went into probes, when the clock was read last."""
        if self._clock.elapsed <= 0:
            return 0.0
        return sum(self._clock.spent.values()) / self._clock.elapsed

    def _cost(self, name: str) -> float:
        runs = self._counted[name]
        if runs and self._clock.spent.get(name, 0.0) > 0:
            return self._clock.spent[name] / runs
        return self._costs[name] * self._seconds_a_step

    @property
    def _seconds_a_step(self) -> float:
        return self._clock.elapsed / self._clock.steps if self._clock.steps else 0.0

    def _allowance(self, step: int) -> float:
        if self._budget is None or not self._clock.steps:
            return 0.0
        since = max(0, step - self.origin - self._clock.steps)
        elapsed = self._clock.elapsed + since * self._seconds_a_step
        return self._budget * elapsed - sum(self._clock.spent.values()) - self._owed
