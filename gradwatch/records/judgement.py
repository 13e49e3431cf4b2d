"""A measured value, the interval that theory gives for it, and the verdict of the two."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from gradwatch.errors import ConfigError

Kind = Literal["explicit", "law", "order", "heuristic"]
Status = Literal["holds", "violated", "vacuous", "undecided"]

MODEL: Final = "model"
"""The scope of a measurement of the whole model."""

SIGNIFICANCE: Final = 2.0
"""A value is outside only by more than this many of its standard errors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number that a monitor measured.

    Attributes:
        metric: snake_case name, the same in code, TensorBoard and documentation.
        scope: a parameter, a layer, a block, or "model".
        step: the optimizer step it belongs to.
        value: the number; may be NaN or infinite.
        unit: in terms of L, P and A; "1" for a pure number.
        standard_error: of the value, in the same unit, where it is known.
        source: what it was estimated from, where there are several ways.
        inputs: other numbers of the same moment that a bound needs to judge the value.
    """

    metric: str
    scope: str
    step: int
    value: float
    unit: str = "1"
    standard_error: float | None = None
    source: str = ""
    inputs: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where theory says that a value lies, and how far that statement can be trusted.

    Attributes:
        lower: smallest allowed value; -inf when open.
        upper: largest allowed value; inf when open.
        kind: `explicit` (a theorem with its constants), `law` (an exact or asymptotic law
            with a stated tolerance), `order` (known up to a constant), `heuristic`.
        vacuous: why the statement is true of anything at this size; empty if it is not.
        undecided: which assumption is not met; empty if all are.

    Raises:
        ConfigError: if `lower` exceeds `upper` or either is NaN.
    """

    lower: float = -math.inf
    upper: float = math.inf
    kind: Kind = "explicit"
    vacuous: str = ""
    undecided: str = ""

    def __post_init__(self) -> None:
        if not self.lower <= self.upper:
            raise ConfigError(
                f"Interval needs lower <= upper, got {self.lower} and {self.upper}; "
                "say undecided='...' when no interval can be given"
            )

    def margin(self, value: float) -> float:
        """Distance of `value` to the nearer edge as a pure number, negative outside.

        The scale is the width of the interval or, when it is one-sided, its finite edge.

        Args:
            value: the measured value, in the unit of the interval.

        Returns:
            The margin; NaN if the value is NaN or no edge is finite.

        Example:
            >>> Interval(lower=0.0, upper=2.0).margin(0.5)
            0.25
            >>> Interval(upper=2.0).margin(3.0)
            -0.5
        """
        edges = [edge for edge in (self.lower, self.upper) if math.isfinite(edge)]
        if not edges or math.isnan(value):
            return math.nan
        scale = self.upper - self.lower if len(edges) == 2 else abs(edges[0])  # noqa: PLR2004
        # An infinite value minus an open edge is NaN, and says nothing about the other edge.
        distances = (value - self.lower, self.upper - value)
        distance = min(distance for distance in distances if not math.isnan(distance))
        return distance / scale if scale > 0 else distance


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What comparing one measurement with one bound came to.

    Attributes:
        measurement: what was measured.
        bound: name of the bound.
        interval: what the bound allows.
        status: `holds` inside, `violated` outside by more than the standard error allows,
            `vacuous` or `undecided` as the interval says.
        margin: distance to the nearer edge, a pure number, negative outside.
        source: the paper and the statement.
        because: why the verdict is vacuous or undecided; empty otherwise.
    """

    measurement: Measurement
    bound: str
    interval: Interval
    status: Status
    margin: float
    source: str
    because: str = ""

    @classmethod
    def of(
        cls, measurement: Measurement, interval: Interval, *, bound: str, source: str
    ) -> "Verdict":
        """Compares a measurement with an interval.

        Args:
            measurement: what was measured.
            interval: what is allowed.
            bound: name of the bound that gave the interval.
            source: the paper and the statement.

        Returns:
            The verdict.

        Example:
            >>> value = Measurement(metric="loss", scope="model", step=0, value=3.0)
            >>> Verdict.of(value, Interval(upper=2.0), bound="Small", source="here").status
            'violated'
        """
        status, because = _status(measurement, interval)
        return cls(
            measurement=measurement,
            bound=bound,
            interval=interval,
            status=status,
            margin=interval.margin(measurement.value),
            source=source,
            because=because,
        )


def _status(measurement: Measurement, interval: Interval) -> tuple[Status, str]:
    if interval.undecided:
        return "undecided", interval.undecided
    if interval.vacuous:
        return "vacuous", interval.vacuous
    if math.isnan(measurement.value):
        return "undecided", "the value is not a number"
    slack = SIGNIFICANCE * (measurement.standard_error or 0.0)
    if math.isnan(slack):
        return "undecided", "the standard error is not a number"
    inside = interval.lower - slack <= measurement.value <= interval.upper + slack
    return ("holds" if inside else "violated"), ""
