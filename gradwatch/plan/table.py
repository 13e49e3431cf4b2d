"""The answer of a comparison of candidate networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradwatch.table import number, text_table

CAVEAT = (
    "Constants are those at initialisation, 7 to 30 times below later values: the table ranks "
    "candidates; the steps are optimistic."
)
COLUMNS = (
    "candidate",
    "parameters",
    "L",
    "sigma²",
    "D",
    "noise",
    "lr",
    "batch",
    "steps",
    "cost",
    "group",
)
LEAST_DIFFERENCE = 0.25  # of the cost: less is no difference, however exact the constants are


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One candidate: its constants at initialisation and how it would be trained.

    Attributes:
        name: of the candidate.
        parameters: how many are trained.
        smoothness: L, top eigenvalue of the Hessian [L/P²].
        variance: sigma², of the gradient of one sample [(L/P)²].
        variance_error: its standard error [(L/P)²].
        loss_gap: D, mean loss above the lowest loss [L].
        batch_size: samples per step.
        learning_rate: of plain SGD [P²/L].
        steps: until the bound is the target.
        group: 1 for the cheapest candidates and those as good as them; then 2, and so on.
    """

    name: str
    parameters: int
    smoothness: float
    variance: float
    variance_error: float
    loss_gap: float
    batch_size: int
    learning_rate: float
    steps: int | float
    group: int = 0

    @property
    def noise(self) -> float:
        """Variance of the gradient of a step, sigma²/B [(L/P)²]."""
        return self.variance / self.batch_size

    @property
    def cost(self) -> int | float:
        """Gradients of single samples that the training takes, B x steps."""
        return self.batch_size * self.steps

    @property
    def cost_error(self) -> float:
        """About the relative standard error of the cost, which is proportional to sigma²."""
        return self.variance_error / self.variance if self.variance else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Candidates by cost; print it for a table.

    Attributes:
        target: the wanted mean square of the gradient [(L/P)²].
        rows: the candidates, cheapest first.
    """

    target: float
    rows: tuple[PlanRow, ...]

    @property
    def equivalent(self) -> tuple[str, ...]:
        """Names of the candidates between which the cost does not decide: the first group."""
        return tuple(row.name for row in self.rows if row.group == 1)

    def __getitem__(self, name: str) -> PlanRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        title = f"Trainings until the mean square of the gradient is {number(self.target)}:"
        return "\n".join([title, text_table(COLUMNS, [_cells(row) for row in self.rows]), CAVEAT])


def starts_a_group(first: PlanRow, row: PlanRow) -> bool:
    """Whether a candidate costs more than the first of a group by more than the measurement error.

    Args:
        first: the cheapest of the group.
        row: a candidate that is not cheaper.

    Returns:
        True if the cost is above by more than 25 % and two standard errors of the difference.
    """
    error = 2.0 * math.hypot(first.cost_error, row.cost_error)
    return row.cost > first.cost * (1.0 + max(LEAST_DIFFERENCE, error))


def groups(rows: Sequence[PlanRow]) -> list[int]:
    """Numbers the groups of candidates of equal cost.

    Args:
        rows: cheapest first.

    Returns:
        One number a row, from 1.
    """
    numbers: list[int] = []
    first = None
    for row in rows:
        if first is None or starts_a_group(first, row):
            first = row
            numbers.append(numbers[-1] + 1 if numbers else 1)
        else:
            numbers.append(numbers[-1])
    return numbers


def _cells(row: PlanRow) -> list[str]:
    return [
        row.name,
        str(row.parameters),
        number(row.smoothness),
        f"{number(row.variance)} ± {row.variance_error:.2g}",
        number(row.loss_gap),
        number(row.noise),
        number(row.learning_rate),
        str(row.batch_size),
        str(row.steps),
        number(row.cost),
        str(row.group),
    ]
