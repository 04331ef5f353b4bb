"""The table of summary figures that the terminal shows; it fits into 80 columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

SHOWN = ("average", "new_task", "forgetting", "backward_transfer", "general_change")


def print_table(runs: list[Path], console: Console) -> None:
    """One row a run: figures of matrix.json's summary with 95 % intervals, and the minutes that it took.

    An arrow says which direction is good. The page has all figures and their definitions.
    """
    from holdfast.report import FIGURES, compare_table

    figures = [figure for figure in FIGURES if figure.key in SHOWN]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("run", overflow="fold")
    for figure in figures:
        arrow = "↑" if figure.better == "high" else "↓"
        table.add_column("\n".join([*figure.label.split(), arrow]), justify="right", min_width=10)
    table.add_column("min", justify="right", min_width=4)
    for row in compare_table(runs):
        cells = [_cell(row[figure.key], row["intervals"].get(figure.key), figure.signed) for figure in figures]
        minutes = "–" if row["minutes"] is None else f"{row['minutes']:.1f}"
        table.add_row(row["run"], *cells, minutes)
    console.print(table)


def _cell(value: float | None, interval: Any, signed: bool) -> str:
    if value is None:
        return "–"
    shown = f"{value:+.3f}" if signed else f"{value:.3f}"
    return f"{shown}\n{interval[0]:.2f}..{interval[1]:.2f}" if interval else shown
