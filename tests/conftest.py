"""Shared test set-up: deterministic property tests and the record of the verification experiments.

An experiment compares a measured number with theory through the `verify` fixture. With
`--verification PATH` the session writes what was compared as a Markdown table to PATH.
"""

import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import hypothesis
import numpy as np
import pytest
import torch

Row = tuple[str, str, str, str, str, str, bool]  # page, experiment, what, three numbers, holds
Tolerance = str | tuple[str, float]

hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, database=None, max_examples=50
)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--verification",
        metavar="PATH",
        type=Path,
        default=None,
        help="write the table of the verification experiments to PATH",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--verification")
    # A worker of a parallel run reports its rows to the main process, which writes the file.
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(VerificationTable(path), "verification-table")


def holds(expected: float, measured: float, tolerance: Tolerance) -> bool:
    """Whether measured agrees with expected.

    ("relative", r): within r times |expected|. ("absolute", a): within a. ("factor", f): both
    positive and neither above f times the other. "at_most": measured is not above expected.
    """
    match tolerance:
        case "at_most":
            return measured <= expected
        case ("relative", size):
            return abs(measured - expected) <= size * abs(expected)
        case ("absolute", size):
            return abs(measured - expected) <= size
        case ("factor", size):
            return 0 < measured <= size * expected and expected <= size * measured
    raise ValueError(
        "tolerance must be 'at_most' or (kind, float) with kind relative, absolute or factor, "
        f"got {tolerance!r}"
    )


def describe(tolerance: Tolerance) -> str:
    match tolerance:
        case ("relative", size):
            return f"{100 * size:.5g} %"
        case ("absolute", size):
            return f"± {size:.5g}"
        case ("factor", size):
            return f"factor {size:.5g}"
    return "at most"


@pytest.fixture
def verify(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Compare a measured number with theory, record the comparison, and fail if it does not hold.

    The title of the page comes from the test module's PAGE.
    """
    page = str(getattr(request.module, "PAGE", request.module.__name__))

    def compare(
        experiment: str, what: str, *, expected: float, measured: float, tolerance: Tolerance
    ) -> None:
        good = holds(float(expected), float(measured), tolerance)
        numbers = (f"{float(expected):.5g}", f"{float(measured):.5g}", describe(tolerance))
        row: Row = (page, experiment, what, *numbers, good)
        request.node.user_properties.append(("verification", row))
        assert good, (
            f"{experiment}, {what}: expected {numbers[0]} ({numbers[2]}), measured {numbers[1]}"
        )

    return compare


class VerificationTable:
    """Collects the rows of all tests, whichever process ran them, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[tuple[str, int, Row]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            rows = [row for name, row in report.user_properties if name == "verification"]
            self.rows += [(report.nodeid, i, cast(Row, row)) for i, row in enumerate(rows)]

    def pytest_sessionfinish(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join(self.lines()) + "\n", encoding="utf-8")

    def lines(self) -> Iterator[str]:
        yield "# Verification experiments"
        yield ""
        yield (
            f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"numpy {np.__version__}."
        )
        title = None
        for _, _, (page, *cells, good) in sorted(self.rows, key=table_order):
            if page != title:
                title = page
                yield from ("", f"## {page}", "")
                yield "| experiment | what | expected | measured | tolerance | holds |"
                yield "|---|---|---|---|---|---|"
            yield f"| {' | '.join([*map(escape, cells), 'yes' if good else '**no**'])} |"


def table_order(entry: tuple[str, int, Row]) -> tuple[Any, ...]:
    """Sort by page and experiment, then by test, then as the test wrote its rows."""
    test, index, row = entry
    return row[0], natural(row[1]), natural(test), index


def natural(text: str) -> list[tuple[int, str]]:
    """Key that puts N2 before N10."""
    pieces = re.findall(r"\d+|\D+", text)
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def escape(cell: str) -> str:
    return cell.replace("|", "\\|")
