"""Where the training loss went over the newest steps."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import fmean, median, stdev
from typing import Final

from gradwatch.records import History
from gradwatch.rules.convergence import FALLING
from gradwatch.rules.recent import known, newest_value

ENOUGH_LOSSES: Final = 9
"""Three in each third."""
RISE: Final = 0.05
"""Relative rise of the smoothed loss that counts."""
LOST: Final = 10.0
"""Factor above the first loss from which a run is off."""
SPIKE: Final = 3.0
"""Factor above the median from which a loss is a spike."""
_SIGMAS: Final = 2.0
_LARGEST = 1e30  # of means that do not overflow


@dataclass(frozen=True, slots=True, kw_only=True)
class LossCourse:
    """The losses of some steps, smoothed by the means of their first and their last third.

    A loss that multiplies scatters as much as it grows, so that its means prove nothing. Losses
    above 0 are compared in logarithms as well.

    Attributes:
        first: the first loss of the run, NaN if unknown [L].
        older: mean of the first third [L].
        newer: mean of the last third [L].
        newer_error: its standard error [L].
        change_error: standard error of the difference of the means [L].
        largest: of all losses [L].
        middle: their median [L].
        count: their number, of the finite ones.
        blown_up: the newest loss is not finite.
        trend: slope over its standard error as the stationarity says it, NaN if unknown.
        growth: logarithm of the last third's geometric mean over that of the first, NaN if a loss
            is not above 0.
        growth_error: its standard error.
        newer_least: what the geometric mean of the last third is at least [L], NaN likewise.
    """

    first: float
    older: float
    newer: float
    newer_error: float
    change_error: float
    largest: float
    middle: float
    count: int
    blown_up: bool
    trend: float
    growth: float = math.nan
    growth_error: float = math.inf
    newer_least: float = math.nan

    @property
    def rising(self) -> bool:
        """By more than 5 %, and by more than the scatter explains; in logarithms above the first.

        Losses of batches that are far below the first one scatter over orders of magnitude.
        """
        change = self.newer - self.older
        clear = change > RISE * abs(self.older) and change > _SIGMAS * self.change_error
        multiplies = self.growth > max(math.log1p(RISE), _SIGMAS * self.growth_error)
        grown = multiplies and self.newer_least > self.first
        return self.blown_up or (self._enough and (clear or grown))

    @property
    def falling(self) -> bool:
        """By more than the scatter explains."""
        fell = self.older - self.newer > _SIGMAS * self.change_error
        return not self.blown_up and ((self._enough and fell) or self.trend <= FALLING)

    @property
    def above_first(self) -> bool:
        """By more than 5 %, for certain, and not on its way down; or not finite any more."""
        above = self._enough and self._least > self.first + RISE * abs(self.first)
        return self.blown_up or (above and not self.falling)

    @property
    def lost(self) -> bool:
        """Far above the first one, for certain, and not on its way down; or not finite any more."""
        far = self.first > 0 and self._least > LOST * self.first
        return self.blown_up or (self.above_first and far)

    @property
    def back_at_first(self) -> bool:
        """Within 5 % of the first one, for certain, and it neither rises nor falls."""
        near = abs(self.newer - self.first) + _SIGMAS * self.newer_error
        still = not self.rising and not self.falling
        return self._enough and still and near <= RISE * abs(self.first)

    @property
    def not_below_first(self) -> bool:
        """It has gained nothing since the start, and is not on its way down."""
        return self._enough and self.newer >= self.first and not self.falling

    @property
    def smooth(self) -> bool:
        """It neither rises nor jumps."""
        jumps = self.largest > SPIKE * self.middle
        return self._enough and not self.rising and not jumps

    @property
    def _least(self) -> float:
        """What the mean of the last third is at least, which is not below the geometric one."""
        least = self.newer - _SIGMAS * self.newer_error
        return max(least, self.newer_least) if self.newer_least > 0 else least

    @property
    def _enough(self) -> bool:
        return self.count >= ENOUGH_LOSSES


def loss_course(history: History, since: int, most: int | None = None) -> LossCourse | None:
    """The course of the training loss.

    Args:
        history: the reports so far.
        since: the first step that counts.
        most: number of newest losses that count; None for all.

    Returns:
        The course, None if no loss is known.
    """
    losses = _losses(history, since)[-(most or 0) :]
    finite = [loss for loss in losses if _is_finite(loss)]
    if not losses:
        return None
    third = max(1, len(finite) // 3)
    older, newer = finite[:third] or [math.nan], finite[-third:] or [math.nan]
    window = newest_value(history, "stationarity_recent")
    before, now = _logarithms(older), _logarithms(newer)
    return LossCourse(
        first=_first_loss(history),
        older=fmean(older),
        newer=fmean(newer),
        newer_error=_error(newer),
        change_error=math.hypot(_error(older), _error(newer)),
        largest=max(finite, default=math.nan),
        middle=median(finite) if finite else math.nan,
        count=len(finite),
        blown_up=not _is_finite(losses[-1]),
        trend=known(window.inputs, "loss_trend") if window else math.nan,
        growth=fmean(now) - fmean(before),
        growth_error=math.hypot(_error(before), _error(now)),
        newer_least=math.exp(fmean(now) - _SIGMAS * _error(now)),
    )


def early_loss(history: History) -> float:
    """The loss of the beginning, of which one small batch says little.

    Args:
        history: the reports so far.

    Returns:
        The median of the first nine known losses; NaN without any [L].
    """
    known_ones = (step.loss for report in history for step in report.steps if step.loss is not None)
    first = list(islice(filter(_is_finite, known_ones), ENOUGH_LOSSES))
    return median(first) if first else math.nan


def _losses(history: History, since: int) -> list[float]:
    """Of the steps that were taken, oldest first."""
    found: list[float] = []
    for report in history[:][::-1]:
        if report.step < since:
            break
        for step in reversed(report.steps):
            if step.step >= since and step.loss is not None and not step.skipped:
                found.append(step.loss)
    return found[::-1]


def _first_loss(history: History) -> float:
    seen = (step.loss for step in history[0].steps if step.loss is not None)
    return next((loss for loss in seen if _is_finite(loss)), math.nan)


def _logarithms(losses: Sequence[float]) -> list[float]:
    return [math.log(loss) for loss in losses] if min(losses) > 0 else [math.nan]


def _is_finite(loss: float) -> bool:
    return abs(loss) <= _LARGEST


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; infinite where the scatter is not known."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
