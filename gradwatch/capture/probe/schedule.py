"""Which probes run in a sampled step: no more than the budget pays for."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Final

from gradwatch.capture.probe.rates import rates_within

PACES: Final = 9
"""Intervals between two readings of the clock whose median says how long a step takes."""
EAGERNESS: Final = 4.0
"""By how much a probe that has not run yet weighs more than the others."""
_ROUNDING: Final = 1e-9


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


@dataclass(slots=True)
class _Turn:
    """Where a probe stands.

    Attributes:
        since: the step that its next turn is counted from.
        carried: share of a turn that it had too much when it ran last.
        runs: how often it ran.
        used: how often it evaluated something in that.
        runs_read: `runs` when the clock was read last.
        used_read: `used` at that time.
        idle: it had nothing to do when it ran last.
    """

    since: int = 0
    carried: float = 0.0
    runs: int = 0
    used: int = 0
    runs_read: int = 0
    used_read: int = 0
    idle: bool = False


class Schedule:
    """Spreads probes over a training so that they take at most a share of its time.

    A probe is due when its turn has come and the budget pays for it. Turns come at the rates of
    `rates_within`. The budget is the share of all time so far, less what was spent, so it is
    never exceeded, except by what a probe takes longer than it did so far. Nothing is caught up:
    a probe that had to wait runs once, and what nobody spends is left to the training.

    A probe that has not run yet is taken to cost as many steps as it says it needs gradients. It
    needs no turn and runs as soon as the budget pays for it; to that end it weighs `EAGERNESS`
    times as much as the others, which slows them down until then, but never stops them.

    It is a function of the steps and of the clock that was read last. Where that is the same on
    all ranks, all of them probe in the same steps.

    Args:
        costs: of each probe in gradients of a whole batch, by name.
        budget: share of the training time; None runs every probe in every sampled step.
        every: steps from one sampled step to the next.

    Attributes:
        origin: the step at which the watch was attached; time counts from there.
    """

    def __init__(self, costs: Mapping[str, float], budget: float | None, every: int = 1) -> None:
        self._declared = dict(costs)
        self._budget = budget
        self._every = every
        self._turns = {name: _Turn() for name in costs}
        self._rates: dict[str, float] = {}
        self._step = 0
        self._clock = Clock()
        self._paces: deque[float] = deque(maxlen=PACES)
        self._pace = 0.0
        self._owed = 0.0
        self.origin = 0

    def starts_at(self, step: int) -> None:
        """The training begins, or goes on, at this step; time counts from here."""
        self.origin = step

    def due(
        self, step: int, *, without: frozenset[str] = frozenset(), elapsed: float | None = None
    ) -> list[str]:
        """The probes to run in a sampled step.

        Args:
            step: the optimizer step.
            without: those that are switched off.
            elapsed: seconds until now; None counts on the pace of the newest intervals instead,
                for ranks that must agree.

        Returns:
            Their names.
        """
        self._step = step
        names = [name for name in self._turns if name not in without]
        if self._budget is None:
            return names
        self._pace = self._pace_at(step, elapsed)
        self._rates = self._rates_of(names)
        money, chosen = self._money(step, elapsed), []
        for name in self._in_order(self._rates):
            if self._price(name) <= money:
                money -= self._price(name)
                chosen.append(name)
        return chosen

    def ran(self, name: str, *, used: bool) -> None:
        """A probe that was due has run.

        Args:
            name: which.
            used: it evaluated something; a run that had nothing to do says nothing about the price
                of one that has.
        """
        turn, rate = self._turns[name], self._rates.get(name, 0.0)
        # Only what a turn came too late because not every step is sampled.
        late = self._progress(name, rate) - 1 if turn.runs else 0.0
        turn.carried = min(max(0.0, late), rate * self._every)
        turn.since = self._step
        turn.runs += 1
        turn.idle = not used
        turn.used += used
        self._owed += self._price(name) if used else self._mean_cost(name)

    def read(self, clock: Clock) -> None:
        """Takes the time that has really passed.

        Args:
            clock: of all ranks together.
        """
        steps = clock.steps - self._clock.steps
        if steps > 0:
            self._paces.append((clock.elapsed - self._clock.elapsed) / steps)
        self._clock = clock
        self._pace = self._pace_at(0, None)
        for turn in self._turns.values():
            turn.runs_read, turn.used_read = turn.runs, turn.used
        self._owed = 0.0

    def next_due(self, step: int, *, without: frozenset[str] = frozenset()) -> dict[str, int]:
        """When each probe will run next, if everything goes on as it did so far.

        Args:
            step: that is over.
            without: probes that are switched off.

        Returns:
            A sampled step by name, of those that had something to do when they ran last; nothing
            before the clock was read.
        """
        names = [name for name in self._turns if name not in without]
        waits = dict.fromkeys(names, 1.0) if self._budget is None else self._waits(step, names)
        return {
            name: math.ceil((step + max(1.0, wait)) / self._every - _ROUNDING) * self._every
            for name, wait in waits.items()
            if not self._turns[name].idle and math.isfinite(wait)
        }

    @property
    def used(self) -> bool:
        """Whether any probe has evaluated something."""
        return any(turn.used for turn in self._turns.values())

    @property
    def spent_share(self) -> float:
        """Share of the time that went into probes, when the clock was read last."""
        if self._clock.elapsed <= 0:
            return 0.0
        return sum(self._clock.spent.values()) / self._clock.elapsed

    def _pace_at(self, step: int, elapsed: float | None) -> float:
        """Seconds a step; one slow interval, such as the first step or a pause, is no pace."""
        paces, since = list(self._paces), step - self.origin - self._clock.steps
        if elapsed is not None and since > 0:
            paces.append((elapsed - self._clock.elapsed) / since)
        return median_low(paces) if self._paces else 0.0

    def _rates_of(self, names: Sequence[str]) -> dict[str, float]:
        if self._budget is None or self._pace <= 0:
            return {}
        return rates_within(
            {name: self._mean_cost(name) for name in names},
            budget=self._budget * self._pace,
            most=1 / self._every,
            weights={name: 1.0 if self._turns[name].runs else EAGERNESS for name in names},
        )

    def _in_order(self, rates: Mapping[str, float]) -> list[str]:
        """Those whose turn has come: first runs, the cheap ones first, then the most overdue."""
        fresh = [name for name in rates if not self._turns[name].runs]
        progress = {name: self._progress(name, rates[name]) for name in rates if name not in fresh}
        ready = [name for name in progress if progress[name] >= 1 - _ROUNDING]
        ready.sort(key=lambda name: -progress[name])
        return [*sorted(fresh, key=self._price), *ready]

    def _progress(self, name: str, rate: float) -> float:
        turn = self._turns[name]
        return turn.carried + rate * (self._step - turn.since)

    def _money(self, step: int, elapsed: float | None = None) -> float:
        """Seconds that may be spent now."""
        if self._budget is None or not self._clock.steps:
            return 0.0
        if elapsed is None:
            since = max(0, step - self.origin - self._clock.steps)
            elapsed = self._clock.elapsed + since * self._pace
        return self._budget * elapsed - sum(self._clock.spent.values()) - self._owed

    def _price(self, name: str) -> float:
        """Seconds of a run that evaluates something."""
        return self._seconds(name, self._turns[name].used_read)

    def _mean_cost(self, name: str) -> float:
        """Seconds of a run, also counting those in which there was nothing to do."""
        return max(self._seconds(name, self._turns[name].runs_read), _ROUNDING * self._pace)

    def _seconds(self, name: str, runs: int) -> float:
        spent = self._clock.spent.get(name, 0.0)
        return spent / runs if runs and spent > 0 else self._declared[name] * self._pace

    def _waits(self, step: int, names: Sequence[str]) -> dict[str, float]:
        """Steps until the turn of each has come and the budget pays for it."""
        rates = self._rates_of(names)
        if self._budget is None or not rates:
            return {}
        flow, money = self._budget * self._pace, self._money(step)
        known = [name for name in rates if self._turns[name].runs]
        waits = {}
        for name in known:
            turn = self._turns[name]
            left = (1 - turn.carried) / rates[name] if rates[name] else math.inf
            waits[name] = max(turn.since + left - step, (self._price(name) - money) / flow)
        free, needed = flow - sum(rates[name] * self._mean_cost(name) for name in known), 0.0
        for name in self._in_order({name: rates[name] for name in rates if name not in known}):
            needed += self._price(name)
            waits[name] = (needed - money) / free if free > 0 else math.inf
        return waits
