"""Which metrics and scopes a watch reports."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache

from gradwatch.errors import ConfigError


class Selection:
    """Glob patterns on "metric" or "metric/scope".

    Args:
        include: what to report; None for everything.
        exclude: what to leave out of that.
        metrics: the metrics that the monitors offer.

    Raises:
        ConfigError: if a pattern names no metric.

    Example:
        >>> only = Selection(["gradient_norm/encoder.*"], None, ["gradient_norm", "loss"])
        >>> only.keeps("gradient_norm", "encoder.0.weight"), only.keeps("loss", "model")
        (True, False)
    """

    def __init__(
        self, include: Sequence[str] | None, exclude: Sequence[str] | None, metrics: Sequence[str]
    ) -> None:
        self._include = _patterns("include", include, metrics)
        self._exclude = _patterns("exclude", exclude, metrics) or []
        self.keeps = cache(self._keeps)

    def keeps_some_of(self, metric: str) -> bool:
        """Whether any scope of a metric can be reported.

        Args:
            metric: its name.

        Returns:
            False only if no value of the metric is wanted.
        """
        wanted = self._include is None or any(fnmatchcase(metric, m) for m, _ in self._include)
        return wanted and not any(s == "*" and fnmatchcase(metric, m) for m, s in self._exclude)

    def _keeps(self, metric: str, scope: str) -> bool:
        wanted = self._include is None or _matches(self._include, metric, scope)
        return wanted and not _matches(self._exclude, metric, scope)


def _patterns(
    argument: str, patterns: Sequence[str] | None, metrics: Sequence[str]
) -> list[tuple[str, str]] | None:
    if patterns is None:
        return None
    if isinstance(patterns, str):
        raise ConfigError(f"{argument} must be a list of patterns, got the string {patterns!r}")
    if not isinstance(patterns, Iterable) or not all(isinstance(item, str) for item in patterns):
        raise ConfigError(f"{argument} must be a list of patterns, got {patterns!r}")
    pairs = []
    for pattern in patterns:
        metric, _, scope = pattern.partition("/")
        if not any(fnmatchcase(known, metric) for known in metrics):
            raise ConfigError(
                f"{argument} has {pattern!r}, which names no metric; the metrics are "
                f"{', '.join(sorted(metrics))}. Patterns read 'metric' or 'metric/scope', "
                "as in 'gradient_norm/encoder.*'"
            )
        pairs.append((metric, scope or "*"))
    return pairs


def _matches(patterns: Sequence[tuple[str, str]], metric: str, scope: str) -> bool:
    return any(fnmatchcase(metric, m) and fnmatchcase(scope, s) for m, s in patterns)
