"""Recommendations and notes as Markdown, for the text page of TensorBoard."""

from collections.abc import Sequence

from gradwatch.records import Recommendation


def recommendations(items: Sequence[Recommendation]) -> str:
    """The recommendations as a table.

    Args:
        items: the most severe first.

    Returns:
        Markdown; a sentence if there are none.
    """
    if not items:
        return "No recommendations."
    rows = [
        (item.severity, item.knob, item.scope, item.change, item.reason, item.source)
        for item in items
    ]
    header = ("severity", "knob", "scope", "change", "why", "source")
    return "\n".join(map(_row, [header, ("---",) * len(header), *rows]))


def notes(items: Sequence[str]) -> str:
    """What could not be measured, as a list.

    Args:
        items: one sentence each.

    Returns:
        Markdown; a sentence if there are none.
    """
    return "\n".join(f"- {_on_one_line(item)}" for item in items) or "Nothing is missing."


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_on_one_line(cell).replace("|", r"\|") for cell in cells) + " |"


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
