"""Points of curves into an event file."""

from typing import Any

from gradwatch.curve import Points, by_step


def draw_together(writer: Any, values: Points) -> None:
    """Draws with one event a step: an event a value takes ten times as long.

    Args:
        writer: a `SummaryWriter` of torch.
        values: what to draw.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415 - an extra

    for step, row in by_step(values).items():
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in row.items()]
        writer.file_writer.add_summary(Summary(value=entries), step)


def draw_singly(writer: Any, values: Points) -> None:
    """Draws with a writer of the user's, of which only `add_scalar` is known.

    Args:
        writer: anything with that method.
        values: what to draw.
    """
    for (tag, step), value in values.items():
        writer.add_scalar(tag, value, step)
