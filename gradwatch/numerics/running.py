"""Running means of noisy readings on the host, with standard errors and in constant memory.

The readings of a training follow one another, so their errors are no independent draws. All
standard errors here are by batch means: the readings are cut into about 20 blocks of neighbours,
and the scatter of the blocks tells how well the mean is known, correlations shorter than a block
included.

There are two scatters of blocks: about the mean of all, and about the next block (von Neumann
1941). A mean over the newest readings stands for the value of now, so that a drift within them is
an error of it: `mean_of`, `ratio_of_means` and `Window` take the larger of the two. A mean over a
whole training is the mean of what changed in its course, and a change is no error of it:
`BlockMeans` takes the second one. Fewer than three blocks have no error.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from gradwatch.errors import ConfigError
from gradwatch.records import MODEL, Measurement
from gradwatch.records.judgement import SIGNIFICANCE

BLOCKS: Final = 20
"""Number of blocks of readings, or number of readings if there are fewer."""

MOST_BLOCKS: Final = 2 * BLOCKS
"""At so many blocks neighbours are merged."""


FEWEST: Final = 3
"""Fewer blocks do not tell how they scatter."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean of readings, or a ratio of two means.

    Attributes:
        value: the estimate; NaN without readings.
        standard_error: of the value; NaN for fewer than three readings.
        count: number of readings.
    """

    value: float
    standard_error: float
    count: int

    @property
    def significant(self) -> bool:
        """Whether the value is positive by more than two standard errors."""
        return self.value > SIGNIFICANCE * self.standard_error

    @property
    def relative_error(self) -> float:
        """Standard error over the size of the value; infinite for a value of 0."""
        return self.standard_error / abs(self.value) if self.value else math.inf

    @property
    def error(self) -> float | None:
        """The standard error, None where it is not known."""
        return None if math.isnan(self.standard_error) else self.standard_error


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of readings in order of time.

    Args:
        values: n readings.

    Returns:
        The mean and its standard error by batch means, a drift included.

    Example:
        >>> mean_of([1.0, 2.0, 3.0])
        Estimate(value=2.0, standard_error=0.5773502691896257, count=3)
    """
    return ratio_of_means(values, [1.0] * len(values))


def ratio_of_means(tops: Sequence[float], bottoms: Sequence[float]) -> Estimate:
    """The ratio of two means of paired readings in order of time.

    A mean of ratios would be biased. The error is that of the linearised ratio (delta method): with
    `r` the ratio, `t_b`, `u_b` the sums of block b of n blocks and `z_b = t_b - r u_b` of mean 0,
    it is the square root of the larger of `n/(n-1) sum_b z_b²` and
    `n/(2(n-1)) sum_b (z_{b+1} - z_b)²`, over `|sum_b u_b|`.

    Args:
        tops: n numerators.
        bottoms: n denominators.

    Returns:
        The ratio and its standard error by batch means, a drift included.

    Example:
        >>> ratio_of_means([2.0, 4.0], [1.0, 1.0]).value
        3.0
    """
    count = len(tops)
    blocks = min(BLOCKS, count)
    edges = [count * index // blocks for index in range(blocks + 1)] if blocks else []
    sums = [(sum(tops[start:end]), sum(bottoms[start:end])) for start, end in pairwise(edges)]
    return Estimate(*_ratio(sums, drift_is_error=True), count)


def _ratio(blocks: Sequence[tuple[float, float]], *, drift_is_error: bool) -> tuple[float, float]:
    """Sum of the numerators over sum of the denominators, and its standard error."""
    count = len(blocks)
    bottom = sum(block[1] for block in blocks)
    if not bottom:
        return math.nan, math.nan
    value = sum(block[0] for block in blocks) / bottom
    if count < FEWEST:
        return value, math.nan
    residuals = [top - value * part for top, part in blocks]
    # A product instead of a power: the power of a large float raises.
    differences = ((two - one) * (two - one) for one, two in pairwise(residuals))
    scatter = sum(differences) / 2
    if drift_is_error:
        # The other one second: a comparison with NaN is false.
        scatter = max(scatter, sum(residual * residual for residual in residuals))
    return value, math.sqrt(scatter * count / (count - 1)) / abs(bottom)


def slope_of(places: Sequence[float], values: Sequence[float]) -> Estimate:
    """Slope of a straight line through readings, by least squares.

    Args:
        places: n places.
        values: n readings.

    Returns:
        The slope in the unit of the values over that of the places, and its standard error for
        independent errors; NaN for fewer than three readings or a single place.

    Example:
        >>> slope_of([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]).value
        2.0
    """
    count = len(values)
    middle, mean = mean_of(places).value, mean_of(values).value
    spread = sum((place - middle) * (place - middle) for place in places)
    if count < 3 or not spread > 0:  # noqa: PLR2004
        return Estimate(math.nan, math.nan, count)
    pairs = list(zip(places, values, strict=True))
    slope = sum((place - middle) * (value - mean) for place, value in pairs) / spread
    residuals = [value - mean - slope * (place - middle) for place, value in pairs]
    scatter = sum(residual * residual for residual in residuals) / (count - 2)
    return Estimate(slope, math.sqrt(scatter / spread), count)


class Window:
    """The newest readings of a few numbers at a time, at most `size` of them.

    Args:
        size: how many readings are kept.
    """

    def __init__(self, size: int) -> None:
        self._rows: deque[tuple[float, ...]] = deque(maxlen=size)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, *row: float) -> None:
        """Takes a reading; the oldest one gives way.

        Args:
            row: its numbers, as many each time.
        """
        self._rows.append(row)

    def clear(self) -> None:
        """Forgets all readings."""
        self._rows.clear()

    def column(self, index: int = 0) -> list[float]:
        """One number of all readings, the oldest first.

        Args:
            index: which of the numbers.

        Returns:
            As many values as there are readings.
        """
        return [row[index] for row in self._rows]

    def mean(self, index: int = 0) -> Estimate:
        """The mean of one of the numbers.

        Args:
            index: which.

        Returns:
            The mean with its standard error, a drift included.
        """
        return mean_of(self.column(index))

    def ratio(self, top: int = 0, bottom: int = 1) -> Estimate:
        """The ratio of the means of two of the numbers.

        Args:
            top: which is the numerator.
            bottom: which is the denominator.

        Returns:
            The ratio with its standard error, a drift included.
        """
        return ratio_of_means(self.column(top), self.column(bottom))

    def state_dict(self) -> list[list[float]]:
        """The readings as plain lists."""
        return [list(row) for row in self._rows]

    def load_state_dict(self, state: Iterable[Sequence[float]]) -> None:
        """Takes back what `state_dict` returned.

        Args:
            state: the readings.
        """
        self._rows = deque((tuple(map(float, row)) for row in state), maxlen=self._rows.maxlen)


class BlockMeans:
    """A weighted mean since the start, with a standard error, in constant memory.

    It keeps 20 to 40 block sums; when there are 40 full ones, neighbours are merged and the
    blocks become twice as long.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[float, float]] = []
        self._length = 1
        self._filled = 0
        self.count = 0

    @property
    def weight(self) -> float:
        """Sum of all weights."""
        return sum(bottom for _, bottom in self._blocks)

    @property
    def estimate(self) -> Estimate:
        """The weighted mean of all readings; a drift is no error of it."""
        return Estimate(*_ratio(self._blocks, drift_is_error=False), self.count)

    def add(self, value: float, weight: float = 1.0) -> None:
        """Takes a reading.

        Args:
            value: the reading.
            weight: above 0.
        """
        if not self._blocks or self._filled == self._length:
            self._begin_block()
        top, bottom = self._blocks[-1]
        self._blocks[-1] = (top + weight * value, bottom + weight)
        self._filled += 1
        self.count += 1

    def _begin_block(self) -> None:
        if len(self._blocks) == MOST_BLOCKS:
            pairs = zip(self._blocks[::2], self._blocks[1::2], strict=True)
            self._blocks = [(one[0] + two[0], one[1] + two[1]) for one, two in pairs]
            self._length *= 2
        self._blocks.append((0.0, 0.0))
        self._filled = 0

    def state_dict(self) -> dict[str, Any]:
        """The sums as plain values."""
        return {
            "blocks": [list(block) for block in self._blocks],
            "length": self._length,
            "filled": self._filled,
            "count": self.count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned.

        Args:
            state: the sums.
        """
        blocks = [(float(top), float(bottom)) for top, bottom in state["blocks"]]
        length, filled, count = (int(state[name]) for name in ("length", "filled", "count"))
        self._blocks, self._length, self._filled, self.count = blocks, length, filled, count


def reading_of(measurements: Iterable[Measurement], metric: str) -> Measurement | None:
    """The value of a metric that may enter a running sum.

    Args:
        measurements: of one step.
        metric: name of the metric.

    Returns:
        That of the whole model if it is finite, else None.
    """
    return next(
        (
            item
            for item in measurements
            if item.metric == metric and item.scope == MODEL and math.isfinite(item.value)
        ),
        None,
    )


def where_defined(formula: Callable[..., float], *arguments: float) -> float | None:
    """The value of a formula, if its arguments are in its range.

    Measured numbers may be anything: an unbiased estimate of a variance may be negative.

    Args:
        formula: raises a ConfigError for arguments outside its range.
        arguments: of the formula.

    Returns:
        Its value if it is finite, else None.
    """
    try:
        value = formula(*arguments)
    except (ConfigError, ArithmeticError):
        return None
    return value if math.isfinite(value) else None
