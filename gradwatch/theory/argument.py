"""Checks of arguments that raise, beside those that describe a fault.

Units in this package: L is the unit of the loss, P that of a parameter. A gradient is L/P, its
square and its variance (L/P)², a curvature L/P², a learning rate of plain SGD P²/L.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwatch.errors import ConfigError
from gradwatch.theory.norm_preservation.argument import (
    fault_in,
    inside_unit,
    not_negative,
    positive,
    whole,
)

__all__ = [
    "Vector",
    "above_one",
    "at_least_one",
    "fault_in",
    "finite",
    "inside_unit",
    "keep_rate",
    "momentum_rate",
    "not_negative",
    "positive",
    "require",
    "values_of",
    "whole",
]

Vector = NDArray[np.float64]


def require(*faults: str) -> None:
    """Raises the first fault that a check has described.

    Args:
        faults: descriptions; an empty one is no fault.

    Raises:
        ConfigError: if any is not empty.
    """
    if fault := next(filter(None, faults), ""):
        raise ConfigError(fault)


def finite(**values: float) -> str:
    """Values of either sign."""
    return fault_in(values, math.isfinite, "be finite")


def at_least_one(**values: float) -> str:
    """Sizes that need not be whole."""
    return fault_in(values, lambda v: 1 <= v < math.inf, "be finite and at least 1")


def above_one(**values: float) -> str:
    """Factors that must enlarge."""
    return fault_in(values, lambda v: 1 < v < math.inf, "be finite and above 1")


def keep_rate(**values: float) -> str:
    """Probabilities of keeping a unit."""
    return fault_in(
        values, lambda v: 0 < v <= 1, "lie in (0, 1], as the probability of keeping a unit"
    )


def momentum_rate(**values: float) -> str:
    """Momentum coefficients."""
    return fault_in(values, lambda v: 0 <= v < 1, "lie in [0, 1)")


def values_of(name: str, values: ArrayLike, dimensions: int = 1) -> Vector:
    """A non-empty array of finite numbers.

    Args:
        name: of the argument.
        values: what was given.
        dimensions: how many the array must have.

    Returns:
        The array in double precision.

    Raises:
        ConfigError: if it has another number of dimensions, no entry, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != dimensions or array.size == 0:
        raise ConfigError(
            f"{name} must be a non-empty array of {dimensions} dimensions, got shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ConfigError(f"{name} must hold finite numbers only, got {array}")
    return array
