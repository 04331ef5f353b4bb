"""The table of summary figures that the terminal shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(runs: list[Path], console: Console) -> None:
    """One row a run: the figures of matrix.json's summary and the time; an arrow says which direction is good."""
    from holdfast.report import FIGURES, compare_table

    table = Table()
    table.add_column("run")
    for figure in FIGURES:
        table.add_column(f"{figure.label} {'↑' if figure.better == 'high' else '↓'}", justify="right")
    table.add_column("minutes", justify="right")
    for row in compare_table(runs):
        cells = [_cell(row[figure.key], row["intervals"].get(figure.key), figure.signed) for figure in FIGURES]
        minutes = "–" if row["minutes"] is None else f"{row['minutes']:.1f}"
        table.add_row(row["run"], *cells, minutes)
    console.print(table)


def _cell(value: float | None, interval: Any, signed: bool) -> str:
    if value is None:
        return "–"
    shown = f"{value:+.3f}" if signed else f"{value:.3f}"
    return f"{shown}\n[{interval[0]:.2f}, {interval[1]:.2f}]" if interval else shown
