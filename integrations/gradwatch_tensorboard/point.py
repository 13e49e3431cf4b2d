"""A report as points of curves."""

import math
from collections.abc import Iterable
from typing import Any

from gradwatch.records import MODEL, Measurement, Report, Verdict
from gradwatch_tensorboard.tag import LEARNING_RATE, LOWER, UPPER, Tags

Points = dict[tuple[str, int], float]
"""The value of each tag and step."""


def points(report: Report, tags: Tags, *, per_layer: bool) -> Points:
    """Everything in a report that can be drawn.

    Args:
        report: the report.
        tags: makes the tags of the run.
        per_layer: also what is about single parameters, layers and blocks.

    Returns:
        The points, those of each tag by their step: a curve must not go back.

    Example:
        >>> loss = Measurement(metric="loss", scope="model", step=7, value=0.5)
        >>> points(Report(step=7, measurements=(loss,)), Tags("gradwatch"), per_layer=True)
        {('gradwatch/loss', 7): 0.5}
    """
    drawn: Points = {
        (tags.of(LEARNING_RATE), step.step): float(step.lr)
        for step in report.steps
        if step.lr is not None
    }
    for item in report.measurements:
        if per_layer or item.scope == MODEL:
            drawn[_place(item, tags)] = float(item.value)
    judged = (
        verdict
        for verdict in report.verdicts
        if verdict.status in {"holds", "violated"}
        and (per_layer or verdict.measurement.scope == MODEL)
    )
    drawn |= _edges(judged, tags)
    return dict(sorted(drawn.items()))


def draw_together(writer: Any, values: Points) -> None:
    """Draws with one event a step: an event a value takes ten times as long.

    Args:
        writer: a `SummaryWriter` of torch.
        values: what to draw.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415 - an extra

    by_step: dict[int, list[Any]] = {}
    for (tag, step), value in values.items():
        by_step.setdefault(step, []).append(Summary.Value(tag=tag, simple_value=value))
    for step, entries in sorted(by_step.items()):
        writer.file_writer.add_summary(Summary(value=entries), step)


def draw_singly(writer: Any, values: Points) -> None:
    """Draws with a writer of the user's, of which only `add_scalar` is known.

    Args:
        writer: anything with that method.
        values: what to draw.
    """
    for (tag, step), value in values.items():
        writer.add_scalar(tag, value, step)


def _edges(verdicts: Iterable[Verdict], tags: Tags) -> Points:
    # Of several bounds on one value, the edge that leaves it the least room.
    tightest: Points = {}
    for verdict in verdicts:
        tag, step = _place(verdict.measurement, tags)
        lower, upper = (tag + LOWER, step), (tag + UPPER, step)
        tightest[lower] = max(tightest.get(lower, -math.inf), verdict.interval.lower)
        tightest[upper] = min(tightest.get(upper, math.inf), verdict.interval.upper)
    return {place: edge for place, edge in tightest.items() if math.isfinite(edge)}


def _place(item: Measurement, tags: Tags) -> tuple[str, int]:
    return tags.of(item.metric, item.scope), item.step
