"""The readings along the path of SGD, and what can be said of them together."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from gradwatch.monitors.noise_scale import share_of
from gradwatch.numerics.running import BlockMeans, slope_of

BEYOND: Final = 2.0
"""Step size times smoothness from which the theory of SGD says nothing."""


class PathReading(NamedTuple):
    """One reading; NaN for what is unknown.

    Attributes:
        step: the optimizer step.
        square: unbiased squared norm of the true gradient [L²/P²].
        variance: of the gradient of one sample [L² sample/P²].
        step_size: g [P²/L].
        smoothness: L [L/P²].
        batch_size: B [sample].
        loss: of the batch [L].
        loss_scale: of mixed precision.
        clipped: 1 if gradients were clipped, 0 if not.
    """

    step: float
    square: float
    variance: float
    step_size: float
    smoothness: float
    batch_size: float
    loss: float
    loss_scale: float
    clipped: float

    @property
    def edge(self) -> float:
        """Step size times smoothness, 2 at the edge of stability."""
        return self.step_size * self.smoothness


class Path:
    """The sums of the path version of the bound.

    Attributes:
        means: the weighted squares.
        noise: sum of `L g² sigma²/B` over the steps in `means` [L].
    """

    def __init__(self) -> None:
        self.means = BlockMeans()
        self.noise = 0.0
        self._newest_step: float | None = None
        self._counts = dict.fromkeys(("edge", "beyond", "seen", "clipped"), 0)

    @property
    def clipped_share(self) -> float:
        """Share of the readings with clipped gradients, NaN if never seen."""
        seen = self._counts["seen"]
        return self._counts["clipped"] / seen if seen else math.nan

    @property
    def beyond_share(self) -> float:
        """Share of the readings with a step size of 2/L or more, NaN if L was never known."""
        edge = self._counts["edge"]
        return self._counts["beyond"] / edge if edge else math.nan

    def add(self, row: PathReading) -> None:
        """Takes a reading, with the weight of the steps since the one before.

        It enters the sums if all of it is known and its step size is below 2/L.

        Args:
            row: the reading.
        """
        stands_for = 1.0 if self._newest_step is None else max(1.0, row.step - self._newest_step)
        self._newest_step = row.step
        self._counts["edge"] += not math.isnan(row.edge)
        self._counts["beyond"] += row.edge >= BEYOND
        self._counts["seen"] += not math.isnan(row.clipped)
        self._counts["clipped"] += row.clipped == 1.0
        weight = stands_for * row.step_size * (2.0 - row.edge)
        if weight > 0.0 and row.batch_size > 0.0:
            curved = stands_for * row.smoothness * row.step_size * row.step_size
            noise = curved * row.variance / row.batch_size
            if math.isfinite(noise) and math.isfinite(weight * row.square):
                self.means.add(row.square, weight)
                self.noise += noise

    def state_dict(self) -> dict[str, Any]:
        """The sums as plain values."""
        return {
            "means": self.means.state_dict(),
            "noise": self.noise,
            "newest_step": self._newest_step,
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` returned.

        Args:
            state: the sums.
        """
        noise, newest_step = float(state["noise"]), state["newest_step"]
        counts = {name: int(state["counts"][name]) for name in self._counts}
        self.means.load_state_dict(state["means"])
        self.noise, self._newest_step, self._counts = noise, newest_step, counts


def changes(values: Sequence[float]) -> float:
    """How often a setting changed.

    Args:
        values: of the setting, NaN where unknown.

    Returns:
        The number of changes.

    Example:
        >>> changes([0.1, 0.1, math.nan, 0.2])
        1.0
    """
    known = [value for value in values if not math.isnan(value)]
    return float(sum(one != two for one, two in pairwise(known)))


def lasting_changes(values: Sequence[float]) -> float:
    """How often a setting changed for longer than one reading.

    The last batch of an epoch may be smaller than the others, which is no change of the batch size.

    Args:
        values: of the setting, NaN where unknown.

    Returns:
        The number of changes; the first and the newest reading are not known to last.

    Example:
        >>> lasting_changes([32, 32, 17, 32, 32, 64, 64, 64])
        1.0
    """
    known = [value for value in values if not math.isnan(value)]
    inner = zip(known, known[1:], known[2:], strict=False)
    lasting = [here for before, here, after in inner if here in {before, after}]
    return changes(lasting)


def share_above(values: Sequence[float], limit: float) -> float:
    """Share of the known values that reach a limit.

    Args:
        values: NaN where unknown.
        limit: the limit.

    Returns:
        The share, NaN if nothing is known.

    Example:
        >>> share_above([1.0, 2.0, math.nan], 2.0)
        0.5
    """
    return share_of([math.nan if math.isnan(value) else float(value >= limit) for value in values])


def loss_trend(rows: Sequence[PathReading]) -> float:
    """Slope of the loss over its standard error.

    Args:
        rows: readings in order of time.

    Returns:
        Below -2 the loss is falling; NaN for fewer than three known losses.
    """
    known = [row for row in rows if not math.isnan(row.loss)]
    slope = slope_of([row.step for row in known], [row.loss for row in known])
    if slope.standard_error == 0.0:
        return math.copysign(math.inf, slope.value) if slope.value else 0.0
    return slope.value / slope.standard_error
