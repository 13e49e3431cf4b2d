"""What a report says in words, as Markdown, for dashboards that show text."""

import re
from collections.abc import Sequence
from typing import Final

from gradwatch.records import Measurement, Recommendation, Report
from gradwatch.tag import Tags

BREAK_EVEN: Final = "break_even_step"
_MEANING: Final = (
    "From about here on the steps are as large as the curvature can stand: it mostly grows no "
    "further, and the loss falls unevenly. As long as the loss falls, that is normal."
)
_CONJECTURE: Final = (
    "That a larger learning rate or a smaller batch gets here earlier, at a lower curvature, is a "
    "conjecture of Jastrzębski et al. 2020, arXiv:2002.09572: an observation, no theorem."
)
_MARKDOWN: Final = re.compile(r"[\\`*_#]")


def texts(report: Report, tags: Tags) -> dict[str, str]:
    """All that a report says in words.

    Args:
        report: the report.
        tags: makes the names.

    Returns:
        Markdown by tag; what this report does not speak of is left out.
    """
    said = {
        tags.recommendations: recommendations(report.recommendations),
        tags.not_measured: notes(report.notes),
    }
    newest = reversed(report.measurements)
    reached = next((item for item in newest if item.metric == BREAK_EVEN), None)
    if reached is not None:
        said[tags.break_even] = break_even(reached)
    return said


def break_even(reached: Measurement) -> str:
    """When the steps came to their edge of stability, and what that means.

    Args:
        reached: the `break_even_step`.

    Returns:
        Markdown that is the same for each reading of the same step.
    """
    how = f": {_plain(reached.source)}" if reached.source else ""
    return "\n\n".join([f"**Break-even at step {reached.value:.0f}**{how}.", _MEANING, _CONJECTURE])


def recommendations(items: Sequence[Recommendation]) -> str:
    """The recommendations, one paragraph each: TensorBoard squeezes the columns of a table.

    Args:
        items: the most severe first.

    Returns:
        Markdown; a sentence if there are none.
    """
    return "\n\n---\n\n".join(map(_recommendation, items)) or "No recommendations."


def notes(items: Sequence[str]) -> str:
    """What could not be measured, as a list.

    Args:
        items: one sentence each.

    Returns:
        Markdown; a sentence if there are none.
    """
    return "\n".join(f"- {_on_one_line(item)}" for item in items) or "Nothing is missing."


def _recommendation(item: Recommendation) -> str:
    expected = f"Expected: {_plain(item.expected)}." if item.expected else ""
    source = f"*{_plain(item.source)}*" if item.source else ""
    heading = f"**{item.severity}: {item.knob}** of {_plain(item.scope)}: **{item.change}**"
    return "\n\n".join(filter(None, [heading, _plain(item.reason), expected, source]))


def _plain(text: str) -> str:
    """On one line, with nothing that Markdown would take for a sign of its own."""
    return _MARKDOWN.sub(r"\\\g<0>", _on_one_line(text)).replace("<", "&lt;")


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
