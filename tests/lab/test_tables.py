"""Tables that are wider than the terminal."""

from __future__ import annotations

from io import StringIO

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lab.cli.output import table
from lab.tables import WideTable


def shown(made: WideTable, width: int) -> str:
    out = StringIO()
    Console(file=out, width=width, highlight=False).print(made)
    return out.getvalue()


@given(st.integers(1, 14), st.integers(0, 5), st.integers(30, 200))
def test_every_column_is_in_one_part_and_parts_fit(columns: int, rows: int, width: int):
    made = table(
        "T",
        [f"column_{index}" for index in range(columns)],
        [[f"row_{row}", *(row / 7 for _ in range(columns - 1))] for row in range(rows)],
    )
    parts = made.parts(width)
    assert [index for part in parts for index in part[1:]] == list(range(1, columns))
    assert all(part[0] == 0 for part in parts)
    assert all(len(line) <= width for line in shown(made, width).splitlines())


def test_no_figure_is_broken_in_a_narrow_terminal():
    figure = "0.123 [0.100, 0.200]"
    text = shown(table("Methods", ["method", *"abcdefgh"], [["npo", *[figure] * 8]]), 80)
    assert text.count(figure) == 8
    assert text.count("npo") > 1
    assert text.splitlines()[0].startswith("Methods")


def test_a_table_that_fits_is_one():
    made = table("T", ["prompt", "completion"], [["x" * 300, "y" * 300]])
    assert made.parts(80) == [(0, 1)]


def test_columns_that_tell_rows_apart_come_again():
    rows = [[reader, rule, *[0.5] * 12] for reader in ("direct", "con") for rule in ("greedy", "cad")]
    made = table("T", ["reader", "rule", *(f"metric_{index}" for index in range(12))], rows)
    parts = made.parts(60)
    assert len(parts) > 1 and all(part[:2] == (0, 1) for part in parts)
    # Rows that nothing tells apart are named by the first column alone.
    assert all(
        part[0] == 0 and part[1] != 1 for part in table("T", made.columns, [rows[0]] * 2).parts(60)[1:]
    )


def test_brackets_are_text():
    assert "[bold]" in shown(table("T", ["a"], [["[bold]"]]), 40)
