"""When probes run: within the budget, each of them, at rates that keep all readings fresh."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.capture.probe.rates import rates_within
from gradwatch.capture.probe.schedule import EAGERNESS, Clock, Schedule

COSTS = {"noise": 1.0, "smoothness": 2.0, "dropout": 2.0, "inputs": 0.05, "sharpness": 25.0}


@dataclass
class Training:
    """A training with a clock of its own.

    Attributes:
        schedule: that is followed.
        costs: seconds of each probe; of one that has nothing to do, too.
        every: steps from one sampled step to the next.
        report: steps from one reading of the clock to the next.
        joint: the schedule must not look at the clock in between.
        idle: probes that have nothing to do.
        ran: steps in which each probe ran.
        excess: the most that was ever spent beyond a share of the time [s].
    """

    schedule: Schedule
    costs: Mapping[str, float]
    every: int = 10
    report: int = 50
    joint: bool = False
    idle: frozenset[str] = frozenset()
    step: int = 0
    elapsed: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    ran: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spent = dict.fromkeys(self.costs, 0.0)
        self.ran = {name: [] for name in self.costs}

    def go(
        self,
        steps: int,
        *,
        seconds: Callable[[int], float] = lambda _: 1.0,
        without: frozenset[str] = frozenset(),
        budget: float = math.inf,
    ) -> "Training":
        """Trains on; checks after each step that no more than `budget` was spent."""
        for step in range(self.step, self.step + steps):
            self.elapsed += seconds(step)
            if step % self.every == 0:
                self._probe(step, without)
                if step % self.report == 0:
                    self.schedule.read(Clock(step + 1, self.elapsed, dict(self.spent)))
            assert self.share <= budget * (1 + 1e-9)
        self.step += steps
        return self

    def _probe(self, step: int, without: frozenset[str]) -> None:
        elapsed = None if self.joint else self.elapsed
        for name in self.schedule.due(step, without=without, elapsed=elapsed):
            assert name not in without
            self.schedule.ran(name, used=name not in self.idle)
            self.elapsed += self.costs[name]
            self.spent[name] += self.costs[name]
            self.ran[name].append(step)

    @property
    def share(self) -> float:
        return sum(self.spent.values()) / self.elapsed

    def count(self, name: str, since: int = 0) -> int:
        return len([step for step in self.ran[name] if step >= since])


def training(
    costs: Mapping[str, float],
    budget: float | None,
    *,
    every: int = 10,
    report: int = 50,
    joint: bool = False,
    idle: frozenset[str] = frozenset(),
    declared: Mapping[str, float] | None = None,
) -> Training:
    schedule = Schedule(costs if declared is None else declared, budget, every)
    return Training(schedule, costs, every, report, joint, idle)


def law(costs: Mapping[str, float], budget: float, every: int) -> dict[str, float]:
    """Runs a step at steps of one second, from the level where the costs fill the budget."""

    def rates(level: float) -> dict[str, float]:
        return {name: min(1 / every, level / math.sqrt(cost)) for name, cost in costs.items()}

    low, high = 0.0, 1e3
    for _ in range(200):
        level = (low + high) / 2
        full = sum(rate * costs[name] for name, rate in rates(level).items()) > budget
        low, high = (low, level) if full else (level, high)
    return rates(low)


several_costs = st.lists(st.sampled_from([0.05, 1.0, 2.0, 5.0, 25.0]), min_size=1, max_size=5).map(
    lambda costs: {str(place): cost for place, cost in enumerate(costs)}
)
budgets = st.sampled_from([0.01, 0.02, 0.1, 0.5])


# --- The law -----------------------------------------------------------------------------------


@given(
    costs=st.dictionaries(st.integers(0, 9).map(str), st.floats(1e-4, 1e4), max_size=6),
    budget=st.floats(1e-3, 1e3),
    most=st.floats(1e-3, 1.0),
)
def test_the_rates_meet_the_conditions_of_the_smallest_mean_age(
    costs: dict[str, float], budget: float, most: float
) -> None:
    rates = rates_within(costs, budget=budget, most=most)
    spent = sum(rates[name] * costs[name] for name in costs)
    assert spent <= budget * (1 + 1e-9)
    free = [name for name in costs if rates[name] < most * (1 - 1e-9)]
    levels = [rates[name] * math.sqrt(costs[name]) for name in free]
    assert all(rate <= most for rate in rates.values())
    if free:
        assert spent == pytest.approx(budget)
        assert max(levels) == pytest.approx(min(levels))
        # Those that run as often as they can would do so more often, if they could.
        assert all(
            most * math.sqrt(costs[name]) <= levels[0] * 1.001 for name in rates.keys() - free
        )


def test_a_weight_is_a_factor_of_the_rate() -> None:
    rates = rates_within({"a": 4.0, "b": 4.0}, budget=0.1, most=1.0, weights={"a": 3.0})
    assert rates["a"] == pytest.approx(3 * rates["b"])
    assert sum(rates.values()) * 4 == pytest.approx(0.1)


@settings(max_examples=25)
@given(costs=several_costs, budget=budgets, every=st.sampled_from([10, 50]), joint=st.booleans())
def test_in_the_long_run_the_rates_are_those_of_the_law(
    costs: dict[str, float], budget: float, every: int, joint: bool
) -> None:
    expected = law(costs, budget, every)
    start = int(4 * sum(costs.values()) / budget)
    steps = int(max(20 / min(expected.values()), 40 * every))
    found = training(costs, budget, every=every, joint=joint).go(start + steps)
    for name in costs:
        assert steps * expected[name] / 2 - 1 <= found.count(name, start)
        assert found.count(name, start) <= steps * expected[name] * 2 + 1


def test_a_dear_probe_does_not_starve_the_others() -> None:
    """In turns, each would run once in 1500 steps."""
    found = training(COSTS, 0.02, every=50).go(60_000)
    counts = {name: found.count(name) for name in COSTS}
    expected = {"noise": 133, "smoothness": 94, "dropout": 94, "inputs": 594, "sharpness": 27}
    assert counts == pytest.approx(expected, rel=0.1)


def test_what_a_cheap_probe_cannot_spend_goes_to_the_others() -> None:
    """It would get a fifth of the time, but already runs in every sampled step."""
    found = training({"cheap": 0.01, "dear": 0.16}, 0.02, every=50).go(20_000)
    assert found.count("cheap") == pytest.approx(20_000 / 50, rel=0.02)
    assert found.share == pytest.approx((0.01 + 0.16) / 50, rel=0.02)
    scarce = training({"cheap": 0.01, "dear": 16.0}, 0.02, every=50).go(40_000)
    assert scarce.count("cheap") == pytest.approx(40_000 / 50, rel=0.03)
    assert scarce.count("dear") == pytest.approx(40_000 * (0.02 - 0.01 / 50) / 16.0, rel=0.1)


def test_one_that_has_nothing_to_do_leaves_its_share_to_the_others() -> None:
    costs = {"idle": 0.001, "busy": 1.0}
    found = training(
        costs, 0.02, declared={"idle": 25.0, "busy": 1.0}, idle=frozenset({"idle"})
    ).go(20_000)
    assert found.spent["busy"] / found.elapsed > 0.018


# --- The budget --------------------------------------------------------------------------------


@given(
    costs=several_costs,
    budget=budgets,
    every=st.sampled_from([1, 10, 50]),
    report=st.sampled_from([50, 250]),
    paces=st.lists(st.sampled_from([1.0, 1.5, 10.0, 100.0]), min_size=1, max_size=8),
    off=st.sets(st.integers(0, 4).map(str), max_size=2),
    idle=st.sets(st.integers(0, 4).map(str), max_size=2),
)
def test_no_more_than_the_budget_is_spent_at_any_time(
    costs: dict[str, float],
    budget: float,
    every: int,
    report: int,
    paces: list[float],
    off: set[str],
    idle: set[str],
) -> None:
    """Steps of at least a second, and probes that cost as many seconds as they say gradients."""
    found = training(costs, budget, every=every, report=report, idle=frozenset(idle))
    found.go(300, seconds=lambda step: paces[step // 40 % len(paces)], budget=budget)
    found.go(900, without=frozenset(off), budget=budget)
    found.go(300, seconds=lambda step: paces[step % len(paces)], budget=budget)


@given(costs=several_costs, budget=budgets, report=st.sampled_from([50, 500]))
def test_ranks_that_count_on_the_pace_keep_to_it_as_well(
    costs: dict[str, float], budget: float, report: int
) -> None:
    training(costs, budget, report=report, joint=True).go(2000, budget=budget)


@given(
    costs=several_costs,
    budget=budgets,
    factor=st.sampled_from([0.01, 0.2, 5.0]),
    every=st.sampled_from([1, 10, 50]),
    joint=st.booleans(),
)
def test_what_a_first_run_takes_too_long_is_paid_back(
    costs: dict[str, float], budget: float, factor: float, every: int, joint: bool
) -> None:
    """Until the clock is read nobody knows what a probe costs: one surprise each."""
    declared = {name: cost * factor for name, cost in costs.items()}
    found = training(costs, budget, every=every, joint=joint, declared=declared).go(2000)
    surprise = sum(costs.values()) * (1 + 50 // every) * (factor < 1)
    assert sum(found.spent.values()) <= budget * found.elapsed + surprise


def test_ranks_whose_steps_became_faster_pay_it_back() -> None:
    found = training({"a": 1.0}, 0.02, report=500, joint=True)
    found.go(5001, seconds=lambda _: 10.0).go(20_000, seconds=lambda _: 0.1)
    assert found.share <= 0.02


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("costs", [{"a": 1.0}, COSTS])
def test_the_budget_is_used(costs: dict[str, float], joint: bool) -> None:
    assert training(costs, 0.02, joint=joint).go(30_000).share >= 0.018


def test_a_slow_first_step_is_no_pace() -> None:
    def seconds(step: int) -> float:
        return 1.0 if step else 100.0

    late = training(COSTS, 0.02, every=50, report=500).go(30_000, seconds=seconds)
    plain = training(COSTS, 0.02, every=50, report=500).go(30_000)
    for name in COSTS:
        assert late.ran[name][0] <= plain.ran[name][0] + 50
        assert late.count(name) == pytest.approx(plain.count(name), rel=0.1, abs=1.5)


# --- First runs, and no bursts -----------------------------------------------------------------


@given(costs=several_costs, budget=budgets, joint=st.booleans())
def test_each_probe_runs_soon(costs: dict[str, float], budget: float, joint: bool) -> None:
    """Alone they would be done with their first runs after `sum / budget` steps."""
    needed = sum(costs.values()) / budget
    found = training(costs, budget, joint=joint)
    found.go(int(needed * (1 + len(costs) / EAGERNESS)) + 60)
    assert all(found.ran.values())


def test_first_runs_come_as_early_as_the_budget_allows_the_cheap_ones_first() -> None:
    found = training(COSTS, 0.02, every=50).go(3000)
    first = {name: steps[0] for name, steps in found.ran.items()}
    assert first["inputs"] <= first["noise"] <= 100
    assert first["noise"] <= first["smoothness"] <= 200
    assert first["sharpness"] <= 1.15 * sum(COSTS.values()) / 0.02
    assert found.count("noise") >= 3, "it goes on meanwhile, slower"


def test_a_probe_that_was_off_does_not_catch_up() -> None:
    found = training({"a": 1.0, "b": 1.0}, 0.02)
    found.go(1000).go(10_000, without=frozenset({"a"})).go(10_000)
    steps = found.ran["a"]
    assert len(steps) > 80
    assert min(b - a for a, b in pairwise(steps)) >= 80


def test_money_that_nobody_spent_starts_no_burst() -> None:
    """After a pause of an hour there would be enough for 72 runs in a row."""
    found = training({"a": 1.0}, 0.02)
    found.go(1000).go(1, seconds=lambda _: 3600.0).go(2000)
    steps = found.ran["a"]
    assert min(b - a for a, b in pairwise(steps)) >= 40


def test_no_probe_before_the_clock_was_read() -> None:
    assert Schedule({"a": 1.0}, 1.0).due(1000) == []
    assert Schedule({"a": 1.0}, 1.0).due(1000, elapsed=1e9) == []


def test_without_a_budget_every_probe_is_due() -> None:
    schedule = Schedule({"a": 1.0, "b": 1.0, "c": 1.0}, None)
    assert schedule.due(0) == ["a", "b", "c"]
    assert schedule.due(0, without=frozenset({"b"})) == ["a", "c"]
    assert schedule.next_due(0, without=frozenset({"b"})) == {"a": 1, "c": 1}


def test_one_that_is_off_does_not_hold_up_the_others() -> None:
    schedule = Schedule({"off": 1e9, "on": 1.0}, 0.5)
    schedule.read(Clock(100, 100.0))
    assert schedule.due(100, without=frozenset({"off"})) == ["on"]


def test_a_resumed_run_does_not_count_the_steps_before() -> None:
    schedule = Schedule({"a": 1.0}, 0.02)
    schedule.starts_at(100_000)
    schedule.read(Clock(1, 1.0))
    assert schedule.due(100_010) == []
    assert schedule.due(100_100) == ["a"]
    schedule.ran("a", used=True)
    assert schedule.due(100_110) == []


@given(costs=several_costs, budget=budgets, again=st.sets(st.integers(0, 200)))
def test_equal_clocks_give_equal_decisions(
    costs: dict[str, float], budget: float, again: set[int]
) -> None:
    """Also where a step raised on one rank and is taken again."""
    ranks = [Schedule(costs, budget, 10), Schedule(costs, budget, 10)]
    spent = dict.fromkeys(costs, 0.0)
    for step in range(0, 2000, 10):
        if step // 10 in again:
            ranks[1].due(step)
        first, second = (rank.due(step) for rank in ranks)
        assert first == second
        for name in first:
            spent[name] += costs[name]
            for rank in ranks:
                rank.ran(name, used=True)
        if step % 50 == 0:
            clock = Clock(step + 1, 1.0 + step + sum(spent.values()), dict(spent))
            for rank in ranks:
                rank.read(clock)
        assert ranks[0].next_due(step) == ranks[1].next_due(step)


# --- When the next is due ----------------------------------------------------------------------


@given(cost=st.sampled_from([0.05, 1.0, 7.0]), budget=budgets, every=st.sampled_from([1, 10, 50]))
def test_a_single_probe_runs_about_when_it_was_said(cost: float, budget: float, every: int) -> None:
    found, said = training({"a": cost}, budget, every=every).go(1), {}
    for _ in range(40):
        last = found.step - 1
        said[last] = found.schedule.next_due(last)["a"]
        found.go(50)
    found.go(2000)
    for last, told in said.items():
        assert told > last
        assert told % every == 0
        soonest = next(step for step in found.ran["a"] if step > last)
        assert abs(soonest - told) <= every + max(3, 0.2 * (told - last))


def test_of_several_it_is_about_right() -> None:
    found = training(COSTS, 0.02, every=50).go(10_001)
    told = found.schedule.next_due(10_000)
    found.go(5000)
    for name in COSTS:
        runs = [step for step in found.ran[name] if step > 10_000]
        assert told[name] - 10_000 == pytest.approx(runs[0] - 10_000, rel=0.2, abs=200)


def test_a_first_run_is_foretold_as_well() -> None:
    found = training(COSTS, 0.02, every=50).go(1)
    told = found.schedule.next_due(0)
    found.go(3000)
    for name in COSTS:
        assert told[name] == pytest.approx(found.ran[name][0], rel=0.15, abs=100)


def test_nothing_is_foretold_of_what_is_off_or_has_nothing_to_do() -> None:
    costs = {"idle": 1.0, "off": 1.0, "on": 1.0}
    found = training(costs, 0.02, idle=frozenset({"idle"})).go(1000)
    assert set(found.schedule.next_due(1000, without=frozenset({"off"}))) == {"on"}
    assert Schedule(costs, 0.02).next_due(0) == {}
