"""Plain-text tables."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.table import number, text_table

words = st.text(alphabet="abcdefghij", min_size=1, max_size=12)
cells = st.lists(words, max_size=12).map(" ".join)


def test_columns_line_up() -> None:
    table = text_table(["metric", "value"], [["loss", "0.5"], ["gradient_norm", "12"]])
    assert table.splitlines() == [
        "metric         value",
        "-------------  -----",
        "loss           0.5",
        "gradient_norm  12",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert text_table(["a", "bc"], []) == "a  bc\n-  --"


def test_a_long_cell_goes_on_below_in_its_own_column() -> None:
    table = text_table(["a", "b"], [["one two three", "x"], ["four", "y"]], max_width=7)
    assert table.splitlines()[2:] == ["one two  x", "three", "four     y"]


def test_an_empty_cell_keeps_its_row() -> None:
    assert text_table(["a", "b"], [["", "x"], ["", ""]]).split("\n")[2:] == ["   x", ""]


@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=5),
    max_width=st.integers(min_value=12, max_value=40),
)
def test_no_word_is_lost_and_no_column_too_wide(
    rows: list[tuple[str, str]], max_width: int
) -> None:
    lines = text_table(["left", "right"], rows, max_width=max_width).splitlines()
    dashes = lines[1].split("  ")
    assert all(len(line) <= max_width for line in dashes)
    start = len(dashes[0]) + 2
    for column, part in enumerate((slice(None, start), slice(start, None))):
        shown = " ".join(line[part] for line in lines[2:]).split()
        assert shown == " ".join(row[column] for row in rows).split()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (3.0, "3"),
        (-0.125, "-0.125"),
        (0.00012345678, "0.0001235"),
        (1234567.0, "1.235e+06"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
    ],
)
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text
