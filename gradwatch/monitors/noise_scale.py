"""The readings that a noise scale is made of, and what they say together."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from gradwatch.numerics.running import Estimate, Window
from gradwatch.records import MODEL, Measurement, StepInfo
from gradwatch.records.judgement import SIGNIFICANCE

ADAM: Final = "the state of Adam"

WINDOW: Final = 200
FEWEST: Final = 50
"""Fewer readings say nothing about a ratio of two noisy means."""

READINGS_OF_A_MEMORY: Final = 20
"""More readings of Adam's state within its memory are the same reading again."""

_USUAL_BETA: Final = 0.999


@dataclass(slots=True)
class NoiseReadings:
    """The readings of one kind of source; readings of several kinds are never mixed.

    Attributes:
        text: how the source is called.
        window: square, variance, and whether gradients were clipped.
        silent: readings of other sources since the last one; at 200 everything is forgotten.
        newest: step of the newest reading in the window, -1 before the first.
    """

    text: str
    window: Window = field(default_factory=lambda: Window(WINDOW))
    silent: int = 0
    newest: int = -1

    def add(self, step: StepInfo, text: str, square: float, variance: float) -> None:
        """Takes a reading, unless it is nearly the one before.

        Args:
            step: the settings of its step.
            text: how the source is called in this step.
            square: of the true gradient [L²/P²].
            variance: of the gradient of one sample [L² sample/P²].
        """
        self.text, self.silent = text, 0
        apart = step.step - self.newest
        if text == ADAM and len(self.window) and 0 <= apart < spacing(step.betas):
            return
        clipped = math.nan if step.grads_clipped is None else float(step.grads_clipped)
        self.window.add(square, variance, clipped)
        self.newest = step.step

    def rest(self) -> None:
        """Another source was read in its place."""
        self.silent += 1
        if self.silent >= WINDOW:
            self.window.clear()

    @property
    def halves_ratio(self) -> float:
        """Noise scale of the newer half of the window over that of the older half.

        NaN where one of them is not positive.
        """
        middle = len(self.window) // 2
        squares, variances = self.window.column(0), self.window.column(1)
        sums = [
            sum(half) for item in (variances, squares) for half in (item[:middle], item[middle:])
        ]
        if not all(math.isfinite(value) and value > 0 for value in sums):
            return math.nan
        older_noise, newer_noise, older_square, newer_square = sums
        return (newer_noise / newer_square) / (older_noise / older_square)

    def state_dict(self) -> dict[str, Any]:
        """The readings as plain values."""
        return {
            "text": self.text,
            "window": self.window.state_dict(),
            "silent": self.silent,
            "newest": self.newest,
        }

    @classmethod
    def of(cls, kind: str, state: Mapping[str, Any]) -> "NoiseReadings":
        """From what `state_dict` returned.

        Args:
            kind: of the source.
            state: the readings.

        Returns:
            The same readings.
        """
        found = cls(kind)
        found.text, found.silent = str(state["text"]), int(state["silent"])
        found.newest = int(state["newest"])
        found.window.load_state_dict(state["window"])
        return found


def spacing(betas: Sequence[float] | None) -> int:
    """Steps between two readings of Adam's state that are worth a place in a mean.

    The state remembers about `1/(1 - beta2)` steps. Readings of every step are nearly the same
    one, so that their scatter says nothing of their common error.

    Args:
        betas: Adam's decay rates; 0.999 is taken for what is not known.

    Returns:
        A twentieth of the memory, at least 1.

    Example:
        >>> spacing((0.9, 0.999)), spacing((0.9, 0.95))
        (50, 1)
    """
    beta = betas[1] if betas is not None and len(betas) > 1 else _USUAL_BETA
    memory = 1.0 / (1.0 - (beta if 0.0 <= beta < 1.0 else _USUAL_BETA))
    # 1/(1 - 0.999) is a little above 1000 in floating point.
    return max(1, math.ceil(round(memory / READINGS_OF_A_MEMORY, 6)))


def share_of(flags: Sequence[float]) -> float:
    """Share of true among what is known.

    Args:
        flags: 1 for true, 0 for false, NaN for unknown.

    Returns:
        The share, NaN if nothing is known.

    Example:
        >>> share_of([1.0, 0.0, math.nan])
        0.5
    """
    known = [flag for flag in flags if not math.isnan(flag)]
    return sum(known) / len(known) if known else math.nan


def noise_scale(
    step: int, readings: NoiseReadings, batch_size: float, train_size: int | None
) -> Iterator[Measurement]:
    """The noise scale, or the least that it can be where the gradient is lost in the noise.

    Args:
        step: the optimizer step.
        readings: at least 50.
        batch_size: samples per step; NaN if unknown.
        train_size: number of training samples, if known.

    Yields:
        `noise_scale` if the mean square is significant, else `noise_scale_at_least`: the mean
        variance over the mean square plus two standard errors, a negative mean taken for 0.
    """
    square, variance = readings.window.mean(0), readings.window.mean(1)
    if square.significant:
        metric, estimate = "noise_scale", readings.window.ratio(1, 0)
    else:
        metric, estimate = "noise_scale_at_least", _at_least(square, variance, train_size)
    if math.isfinite(estimate.value):
        yield Measurement(
            metric=metric,
            scope=MODEL,
            step=step,
            value=estimate.value,
            unit="sample",
            standard_error=estimate.error,
            source=readings.text,
            inputs=_inputs(readings, square, variance, batch_size),
        )


def _at_least(square: Estimate, variance: Estimate, train_size: int | None) -> Estimate:
    largest_square = max(square.value, 0.0) + SIGNIFICANCE * square.standard_error
    if not (variance.value > 0.0 and largest_square > 0.0):
        return Estimate(math.nan, math.nan, 0)
    value = variance.value / largest_square
    return Estimate(value if train_size is None else min(value, float(train_size)), math.nan, 0)


def _inputs(
    readings: NoiseReadings, square: Estimate, variance: Estimate, batch_size: float
) -> dict[str, float]:
    return {
        "estimates": float(square.count),
        "gradient_square": square.value,
        "gradient_square_error": square.standard_error,
        "gradient_variance": variance.value,
        "variance_median": median(readings.window.column(1)),
        "halves_ratio": readings.halves_ratio,
        "clipped_share": share_of(readings.window.column(2)),
        "batch_size": batch_size,
        "step_of_adam": float(readings.text == ADAM),
    }
