"""How rules speak of a chain of layers: its names, and the severity of what it does."""

from collections.abc import Sequence

from gradwatch.records import LayerInfo, Severity


def severity_of_factor(norm_factor: float) -> Severity:
    """How much a factor on the signal's norm hurts a training: the damage, not the deviation.

    Args:
        norm_factor: norm at the end of a chain over norm at its start, relative to what is
            wanted; above or below 1.

    Returns:
        `info` within [0.1, 10], `advice` within [0.01, 100], `warning` beyond.

    Example:
        >>> severity_of_factor(0.2), severity_of_factor(50.0), severity_of_factor(0.001)
        ('info', 'advice', 'warning')
    """
    distance = max(norm_factor, 1 / norm_factor) if norm_factor > 0 else float("inf")
    if distance <= 10:  # noqa: PLR2004 - the scale of this function
        return "info"
    return "advice" if distance <= 100 else "warning"  # noqa: PLR2004 - as above


def span(layers: Sequence[LayerInfo]) -> str:
    """Names of the layers: all of them if few, else the first and the last.

    Args:
        layers: at least one, in order.

    Returns:
        The names in words.
    """
    names = [layer.name for layer in layers]
    few = 3
    if len(names) <= few:
        return ", ".join(names)
    return f"{names[0]} to {names[-1]} ({len(names)} layers)"
