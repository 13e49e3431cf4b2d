"""Recommendations and notes as Markdown, for dashboards that show text."""

import re
from collections.abc import Sequence
from typing import Final

from gradwatch.records import Recommendation

_MARKDOWN: Final = re.compile(r"[\\`*_#]")


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
