"""The matrix of training modes and measured quantities.

A test fills a cell through the `cell` fixture: either the measured value equals an independent
reference, or it is absent and the report says why. With `--modes PATH` the session writes the
whole matrix as Markdown to PATH.
"""

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import pytest

import gradwatch

QUANTITIES = (
    "gradient_norm_used",
    "gradient_norm",
    "update_norm",
    "activation_norm",
    "loss",
    "batch_size",
    "lr",
    "gradient_square",
    "gradient_variance",
    "smoothness_secant",
)
PACKAGES = ("torch", "lightning", "pytorch-lightning", "transformers", "accelerate", "peft", "trl")
WRONG = "**wrong**"
Entry = tuple[str, str, str, str]  # family, mode, quantity, the report's reason ("" for exact)


class Cell:
    """Fills cells of the matrix.

    The module's FAMILY is the title of the table.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._family = str(request.module.FAMILY)
        self._node = request.node

    def equal(
        self, mode: str, quantity: str, measured: Any, expected: Any, rel: float = 1e-5
    ) -> None:
        """The value is there and equals the reference; a mapping is compared item by item."""
        self._fill(mode, quantity, "")
        assert measured is not None, f"{mode}: no {quantity}"
        assert measured == pytest.approx(expected, rel=rel, abs=1e-12, nan_ok=True), (
            f"{mode}: {quantity}"
        )

    def unavailable(
        self, mode: str, quantity: str, report: gradwatch.Report, statement: str
    ) -> None:
        """The value is absent, and a note of the report contains the statement."""
        said = [note for note in report.notes if statement in note]
        self._fill(mode, quantity, said[0] if said else WRONG)
        info = report.info
        given: dict[str, Any] = {"lr": info.lr, "loss": info.loss, "batch_size": info.batch_size}
        value = given.get(quantity, report.value(quantity))
        scoped = [item for item in report.measurements if item.metric == quantity]
        assert value is None, f"{mode}: {quantity} is {value}, not unavailable"
        assert not scoped, f"{mode}: {quantity} is there for {len(scoped)} scopes"
        assert said, f"{mode}: no note says {statement!r}, only {report.notes}"

    def _fill(self, mode: str, quantity: str, content: str) -> None:
        assert quantity in QUANTITIES
        entry: Entry = (self._family, mode, quantity, content)
        self._node.user_properties.append(("mode", entry))


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Cell:
    """Fill cells of the matrix: `cell.equal(...)`, `cell.unavailable(...)`."""
    return Cell(request)


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--modes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ModeTable(path), "mode-table")


class ModeTable:
    """Collects the cells of all tests, whichever process ran them, and writes them at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, dict[str, dict[str, str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for name, entry in report.user_properties:
            if name == "mode":
                family, mode, quantity, content = cast(Entry, entry)
                row = self.cells.setdefault(family, {}).setdefault(mode, {})
                if report.failed or row.get(quantity) == WRONG:
                    content = WRONG
                row[quantity] = content or row.get(quantity, "")

    def pytest_sessionfinish(self) -> None:
        self.path.write_text("\n".join(self.lines()) + "\n", encoding="utf-8")

    def lines(self) -> Iterator[str]:
        yield "# What is measured in which mode"
        yield ""
        yield "Each cell is a test in `tests/modes/`; `make modes` writes this page."
        yield "*exact*: equal to an independent reference. A number: not available, for the reason"
        yield "below the table, which the report states. Empty: not asked of this mode."
        yield ""
        yield "In plain PyTorch `track_loss` and `track_clipping` are on unless the mode says"
        yield "otherwise."
        yield ""
        yield f"Python {platform.python_version()}, {', '.join(installed(PACKAGES))}."
        for family, rows in sorted(self.cells.items()):
            yield from ("", f"## {family}", "")
            yield from table(rows)


def table(rows: dict[str, dict[str, str]]) -> Iterator[str]:
    reasons: dict[str, int] = {}
    asked = [name for name in QUANTITIES if any(name in row for row in rows.values())]
    yield f"| mode | {' | '.join(asked)} |"
    yield "|---" * (len(asked) + 1) + "|"
    for mode, row in sorted(rows.items()):
        yield f"| {mode} | {' | '.join(shown(row.get(name), reasons) for name in asked)} |"
    if reasons:
        yield ""
    for reason, number in reasons.items():
        yield f"{number}. {reason}"


def shown(content: str | None, reasons: dict[str, int]) -> str:
    match content:
        case None:
            return ""
        case "":
            return "exact"
        case "**wrong**":  # WRONG, which a pattern cannot name
            return content
    return str(reasons.setdefault(content, len(reasons) + 1))


def installed(packages: Sequence[str]) -> Iterator[str]:
    for package in packages:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue
