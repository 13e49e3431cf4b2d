"""Checks of arguments: each describes the first fault it finds, or returns an empty string."""

import math
from collections.abc import Callable, Mapping, Sequence


def fault_in(values: Mapping[str, float], holds: Callable[[float], bool], need: str) -> str:
    """Describes the first value that breaks its range; empty if there is none."""
    return next((f"{n} must {need}, got {v}" for n, v in values.items() if not holds(v)), "")


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


def dropout_rate(**values: float) -> str:
    """Probabilities of dropping a unit."""
    return fault_in(values, lambda v: 0 <= v < 1, "lie in [0, 1)")


def layer_widths(widths: Sequence[int], least: int = 1) -> str:
    """Widths of at least one layer."""
    entries = {f"widths[{i}]": width for i, width in enumerate(widths)}
    return whole(least, **entries) if entries else "widths must name at least one layer, got none"


def widths_with_kappas(widths: Sequence[int], kappas: Sequence[float]) -> str:
    """Widths and one relative variance for each."""
    if len(widths) != len(kappas):
        return f"kappas must hold one value per width, got {len(kappas)} for {len(widths)} widths"
    entries = {f"kappas[{i}]": kappa for i, kappa in enumerate(kappas)}
    return layer_widths(widths) or not_negative(**entries)
