"""The answer of a comparison of candidate networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gradwatch.table import number, text_table

CAVEAT = (
    "Constants are those at initialisation; along a training they change by factors, up or down "
    "(7 to 30 times up in one experiment): lr and steps may be off either way; measure again "
    "during the training."
)
ABSOLUTE = (
    "|grad|² has another scale in another parametrisation, and the target is the same for all: "
    "costs are comparable only between candidates of the same output scale. See relative_target."
)
RELATIVE = (
    "Each target is a share of the candidate's own |grad|² at initialisation: costs are those of "
    "an equal relative decrease, not of an equal loss; a small |grad|² makes the target strict."
)
COLUMNS = (
    "candidate",
    "parameters",
    "|grad|²",
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
        gradient_square: |grad|², unbiased, so it may be negative [(L/P)²].
        gradient_square_error: about its standard error [(L/P)²].
        smoothness: L, top eigenvalue of the Hessian [L/P²].
        variance: sigma², of the gradient of one sample [(L/P)²].
        variance_error: its standard error [(L/P)²].
        loss_gap: D, mean loss above the lowest loss [L].
        target: wanted mean square of the gradient [(L/P)²].
        target_error: its standard error, 0 for one that was given [(L/P)²].
        batch_size: samples per step.
        learning_rate: of plain SGD [P²/L].
        steps: until the bound is the target.
        group: of about equal cost, numbered by rising cost from 1.
    """

    name: str
    parameters: int
    gradient_square: float
    gradient_square_error: float
    smoothness: float
    variance: float
    variance_error: float
    loss_gap: float
    target: float
    target_error: float
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
        """About the relative standard error of the cost, at most as sigma²/target²."""
        variance = self.variance_error / self.variance if self.variance else 0.0
        return math.hypot(variance, 2.0 * self.target_error / self.target)


@dataclass(frozen=True, slots=True)
class Plan:
    """Candidates by cost; print it for a table.

    Attributes:
        target: the wanted mean square of the gradient [(L/P)²], or None.
        relative_target: the wanted share of that at initialisation, or None.
        rows: the candidates, by rising cost.
    """

    target: float | None
    relative_target: float | None
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
        if self.target is not None:
            aim, scale = number(self.target), ABSOLUTE
        else:
            aim, scale = f"{self.relative_target:.4g} of |grad|² at initialisation", RELATIVE
        title = f"Trainings until the mean square of the gradient is {aim}:"
        table = text_table(COLUMNS, [_cells(row) for row in self.rows])
        return "\n".join([title, table, scale, CAVEAT])


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
        f"{number(row.gradient_square)} ± {row.gradient_square_error:.2g}",
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
