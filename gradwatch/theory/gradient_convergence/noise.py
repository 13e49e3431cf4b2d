"""Unbiased estimates of the square of the true gradient and of the variance around it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from gradwatch.errors import ConfigError
from gradwatch.theory.argument import (
    at_least_one,
    inside_unit,
    not_negative,
    require,
    values_of,
)


class GradientEstimate(NamedTuple):
    """Estimates that are right on average; a single one may be negative.

    Attributes:
        square: ||grad f||², of the true gradient [(L/P)²].
        variance: trace of a covariance; each function says of what [(L/P)²].
    """

    square: float
    variance: float


def microbatch_estimate(gradients: ArrayLike, microbatch_size: float) -> GradientEstimate:
    """Square of the true gradient and variance per sample from A independent micro-batches.

    With S = sum_a g_a and q = sum_a ||g_a||²: square = (||S||² - q) / (A (A-1)), variance =
    b (q - ||S||²/A) / (A-1). The square of the mean gradient itself is too large by sigma²/(A b).

    Args:
        gradients: (A, d), mean gradient of each micro-batch, A at least 2 [L/P].
        microbatch_size: b, samples in each, at least 1.

    Returns:
        The estimates; variance is per sample.

    Raises:
        ConfigError: If gradients is not (A, d) with A >= 2 and finite, or microbatch_size < 1.

    References:
        Derived here.

    Example:
        >>> microbatch_estimate([[1, 0, 2], [0, 1, 1], [1, 1, 0], [2, 0, 1]], 8).square
        1.8333333333333333
    """
    require(at_least_one(microbatch_size=microbatch_size))
    rows = values_of("gradients", gradients, dimensions=2)
    count = len(rows)
    if count < 2:
        raise ConfigError(f"gradients must hold at least 2 micro-batches, got {count}")
    parts = float(np.sum(rows**2))
    total = float(np.sum(rows.sum(axis=0) ** 2))
    return GradientEstimate(
        (total - parts) / (count * (count - 1)),
        microbatch_size * (parts - total / count) / (count - 1),
    )


def weighted_estimate(
    total_square: float, part_squares: float, share_squares: float
) -> GradientEstimate:
    """The same from micro-batches of any size, whose contributions c_i add up to the gradient S.

    c_i = p_i g_i with shares p_i that add up to 1. With T = ||S||², q = sum ||c_i||², s = sum p_i²:
    square = (T - q) / (1 - s), variance = (q - s T) / (1 - s), since E T = ||grad f||² + V and
    E q = s ||grad f||² + V.

    Args:
        total_square: T [(L/P)²].
        part_squares: q [(L/P)²].
        share_squares: s, in (0, 1); 1/A for A equal shares.

    Returns:
        The estimates; variance is V, that of S. Times B it is per sample if shares follow sizes.

    Raises:
        ConfigError: If an argument is outside its range.

    References:
        Derived here.

    Example:
        >>> weighted_estimate(1.0, 0.75, 0.5)
        GradientEstimate(square=0.5, variance=0.5)
    """
    require(
        not_negative(total_square=total_square, part_squares=part_squares),
        inside_unit(share_squares=share_squares),
    )
    rest = 1.0 - share_squares
    return GradientEstimate(
        (total_square - part_squares) / rest,
        (part_squares - share_squares * total_square) / rest,
    )
