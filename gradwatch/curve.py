"""A report as points of curves: the one flat set of names and numbers that every logger gets."""

import math
from collections.abc import Iterable

from gradwatch.records import MODEL, SEVERITIES, Measurement, Recommendation, Report, Verdict
from gradwatch.tag import LEARNING_RATE, LOWER, UPPER, Tags

Points = dict[tuple[str, int], float]
"""The value of each tag and step."""


class Curves:
    """Turns the reports of one run into points, one report after the other.

    Args:
        tag_prefix: what all tags begin with.
        per_layer: also what is about single parameters, layers and blocks.
        advised: knobs that have been advised on before, so that their curves go on with 0.

    Attributes:
        tags: the names of the curves.

    Example:
        >>> loss = Measurement(metric="loss", scope="model", step=7, value=0.5)
        >>> Curves().points(Report(step=7, measurements=(loss,)))
        {('gradwatch/loss', 7): 0.5}
    """

    def __init__(
        self, tag_prefix: str = "gradwatch", *, per_layer: bool = True, advised: Iterable[str] = ()
    ) -> None:
        self.tags = Tags(tag_prefix)
        self._per_layer = per_layer
        self._knobs = set(advised)

    def points(self, report: Report) -> Points:
        """Everything in a report that can be drawn.

        Args:
            report: newer than the ones before.

        Returns:
            The points, those of each tag by their step: a curve must not go back. Values and
            learning rates stand at the step they belong to, the edges of a bound beside the
            value it judged if it came to "holds" or "violated", advice at the report's step.
        """
        drawn: Points = {
            (self.tags.of(LEARNING_RATE), step.step): float(step.lr)
            for step in report.steps
            if step.lr is not None
        }
        for item in report.measurements:
            if self._draws(item):
                drawn[self._place(item)] = float(item.value)
        drawn |= self._edges(
            verdict
            for verdict in report.verdicts
            if verdict.status in {"holds", "violated"} and self._draws(verdict.measurement)
        )
        for knob, level in self._levels(report.recommendations).items():
            drawn[self.tags.advice(knob), report.step] = level
        return dict(sorted(drawn.items()))

    def _draws(self, item: Measurement) -> bool:
        return self._per_layer or item.scope == MODEL

    def _place(self, item: Measurement) -> tuple[str, int]:
        return self.tags.of(item.metric, item.scope), item.step

    def _edges(self, verdicts: Iterable[Verdict]) -> Points:
        # Of several bounds on one value, the edge that leaves it the least room.
        tightest: Points = {}
        for verdict in verdicts:
            tag, step = self._place(verdict.measurement)
            lower, upper = (tag + LOWER, step), (tag + UPPER, step)
            tightest[lower] = max(tightest.get(lower, -math.inf), verdict.interval.lower)
            tightest[upper] = min(tightest.get(upper, math.inf), verdict.interval.upper)
        return {place: edge for place, edge in tightest.items() if math.isfinite(edge)}

    def _levels(self, recommendations: Iterable[Recommendation]) -> dict[str, float]:
        # A knob that has spoken goes on with 0 when it is silent: its curve must come down.
        levels = dict.fromkeys(sorted(self._knobs), 0.0)
        for item in recommendations:
            level = float(SEVERITIES.index(item.severity))
            levels[item.knob] = max(level, levels.get(item.knob, 0.0))
        self._knobs.update(levels)
        return levels


def by_step(points: Points) -> dict[int, dict[str, float]]:
    """The points as one flat dictionary a step, which is what loggers take.

    Args:
        points: of a report.

    Returns:
        For each step, oldest first, the value of each tag.

    Example:
        >>> by_step({("gradwatch/loss", 7): 0.5, ("gradwatch/loss", 3): 0.75})
        {3: {'gradwatch/loss': 0.75}, 7: {'gradwatch/loss': 0.5}}
    """
    steps: dict[int, dict[str, float]] = {}
    for (tag, step), value in points.items():
        steps.setdefault(step, {})[tag] = value
    return dict(sorted(steps.items()))
