"""Checks of arguments: each describes the first fault it finds, or returns an empty string.

`require` raises what they describe, `values_of` raises itself.

Units in this package: L is the unit of the loss, P that of a parameter. A gradient is L/P, its
square and its variance (L/P)², a curvature L/P², a learning rate of plain SGD P²/L.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradwatch.errors import ConfigError

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


def fault_in(values: Mapping[str, float], holds: Callable[[float], bool], need: str) -> str:
    """Describes the first value that is no number or breaks its range; empty if there is none."""
    faults = (_fault(name, value, holds, need) for name, value in values.items())
    return next(filter(None, faults), "")


def _fault(name: str, value: Any, holds: Callable[[Any], bool], need: str) -> str:
    if not isinstance(value, Real) or isinstance(value, bool):
        return f"{name} must be a number, got {value!r}"
    try:
        float(value)  # a whole number may have no float, and every formula needs one
    except OverflowError:
        return f"{name} must {need}, got a number that is too large"
    return "" if holds(value) else f"{name} must {need}, got {value}"


def whole(least: int = 1, **values: float) -> str:
    """Values that must be counts."""
    need = f"be a whole number of at least {least}"
    return fault_in(values, lambda v: v >= least and float(v).is_integer(), need)


def positive(**values: float) -> str:
    """Values that must be positive and finite."""
    return fault_in(values, lambda v: 0 < v < math.inf, "be positive and finite")


def not_negative(**values: float) -> str:
    """Values that must be finite and not negative."""
    return fault_in(values, lambda v: 0 <= v < math.inf, "be finite and at least 0")


def inside_unit(**values: float) -> str:
    """Values that must lie between 0 and 1, both excluded."""
    return fault_in(values, lambda v: 0 < v < 1, "lie in (0, 1)")


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
