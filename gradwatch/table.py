"""Plain-text tables, for `print(report)` and the console."""

from collections.abc import Sequence
from textwrap import wrap


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], max_width: int = 60) -> str:
    """Lines up columns; a cell longer than `max_width` continues on the next line.

    Args:
        header: one title a column.
        rows: the cells, each row as long as the header.
        max_width: the widest a column may get [characters].

    Returns:
        The table, without a newline at its end.

    Example:
        >>> print(text_table(["metric", "value"], [["loss", "0.5"]]))
        metric  value
        ------  -----
        loss    0.5
    """
    broken = [[wrap(cell, max_width) or [""] for cell in row] for row in rows]
    widths = [
        max([len(title), *(len(line) for row in broken for line in row[column])])
        for column, title in enumerate(header)
    ]
    lines = [_line(header, widths), _line(["-" * width for width in widths], widths)]
    for row in broken:
        for depth in range(max(len(cell) for cell in row)):
            cells = [cell[depth] if depth < len(cell) else "" for cell in row]
            lines.append(_line(cells, widths))
    return "\n".join(lines)


def number(value: float) -> str:
    """A number as people read it: four significant digits.

    Example:
        >>> number(0.00012346), number(1234567.0), number(3.0)
        ('0.0001235', '1.235e+06', '3')
    """
    return f"{value:.4g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
