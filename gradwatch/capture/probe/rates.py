"""How often each probe runs: a budget divided by the square roots of the costs."""

import math
from collections.abc import Mapping


def rates_within(
    costs: Mapping[str, float],
    *,
    budget: float,
    most: float,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The rates that keep the readings as fresh as the budget allows.

    The newest reading of a probe at rate `r_i` is on average `1/(2 r_i)` steps old. The sum of
    these ages is smallest, at a given total cost `sum r_i c_i`, for `r_i` proportional to
    `1/sqrt(c_i)` (Lagrange): of the time each gets a share proportional to `sqrt(c_i)`. A probe
    that already runs as often as it can leaves the rest to the others (water-filling).

    Args:
        costs: seconds of one run of each, above 0.
        budget: seconds a step for all of them.
        most: the highest rate there is [runs a step].
        weights: factors of the rates; 1 where one is left out.

    Returns:
        Runs a step, by name; together they cost no more than the budget.

    Example:
        >>> rates_within({"cheap": 1.0, "dear": 25.0}, budget=6.0, most=2.0)
        {'cheap': 1.0, 'dear': 0.2}
    """
    roots = {name: math.sqrt(cost) / (weights or {}).get(name, 1.0) for name, cost in costs.items()}
    waiting = sorted(costs, key=lambda name: roots[name])  # who reaches the highest rate first
    rates, left = dict.fromkeys(costs, 0.0), budget
    while waiting:
        name, level = waiting[0], left / sum(costs[name] / roots[name] for name in waiting)
        rates[name] = min(most, max(0.0, level / roots[name]))
        left -= rates[name] * costs[name]
        waiting = waiting[1:]
    return rates
