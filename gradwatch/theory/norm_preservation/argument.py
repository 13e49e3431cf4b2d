"""Checks of arguments that only this theory has; the others are in `theory.argument`."""

from collections.abc import Sequence

from gradwatch.theory.argument import fault_in, not_negative, whole


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
