"""A probe's grid as a table: ranks down, lengths across."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from memlaw.cli.terminal import plain_table

Row = dict[str, Any]


def grid_table(
    rows: Sequence[Row],
    ranks: Sequence[int],
    lengths: Sequence[int],
    show: Callable[[list[Row]], str],
) -> Table:
    """The table; `show` says what stands where, given the rows (a seed each) of rank and length."""
    table = plain_table("rank \\ length", *map(str, lengths))
    for rank in ranks:
        cells = [
            [row for row in rows if (row["rank"], row["length"]) == (rank, length)]
            for length in lengths
        ]
        table.add_row(str(rank), *(show(cell) if cell else "·" for cell in cells))
    return table


def delta_nll(cell: list[Row]) -> str:
    """By how much the loss fell, mean of the seeds; `*` if it is saturated for one of them."""
    if any(row["status"] != "success" for row in cell):
        return "failed"
    mean = sum(row["delta_nll"] for row in cell) / len(cell)
    return f"{mean:.2f}{'*' if any(row['saturated'] for row in cell) else ''}"


def share_over(cell: list[Row]) -> str:
    """The share of tokens at p 0.55 or more; `✓` if it is all of every seed's."""
    if all(row["certified"] for row in cell):
        return "✓"
    # Never rounded up to a whole: 100 % would be a claim.
    share = 1 - sum(row["share_under"] for row in cell) / len(cell)
    return f"{int(share * 1000) / 10:.1f}%"
