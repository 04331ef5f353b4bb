"""The tables that the terminal shows; they fit into 80 columns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from holdfast.report.compare import Comparison

SHOWN = ("average", "new_task", "forgetting", "backward_transfer", "general_change")


def print_table(runs: list[Path], console: Console) -> None:
    """One row a run or a group of seeds: figures with 95 % intervals, and the minutes that it took."""
    from holdfast.records.read import read_runs
    from holdfast.report.compare import compare
    from holdfast.report.text import at_chance, lacking, learning

    found = read_runs(runs)
    print_quality(compare(found), console, minutes=True)
    for run in found:
        if (note := learning(run.learned, run.one_row)) is not None:
            console.print(f"{run.label}: {note}" if len(found) > 1 else note, markup=False, style="bold")
        for line in [*filter(None, [at_chance(run.matrix)]), *lacking(run)]:
            console.print(f"{run.label}: {line}" if len(found) > 1 else line, markup=False, style="dim")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """The table of figures, one of costs and differences, and what a reader of both must know."""
    from holdfast.report.tables import notes

    print_quality(comparison, console)
    print_costs(comparison, console)
    for note in notes(comparison):
        console.print(note, markup=False, style="bold" if note.startswith("NOT") else "dim")


def print_quality(comparison: Comparison, console: Console, minutes: bool = False) -> None:
    """The figures of matrix.json's summary that matter most; an arrow says which direction is good."""
    from holdfast.report import FIGURES
    from holdfast.report.tables import arrow, cost, label

    figures = [figure for figure in FIGURES if figure.key in SHOWN]

    def written(tall: bool) -> Table:
        table = narrow_table()
        for figure in figures:
            name = "\n".join([*figure.label.split(), arrow(figure, comparison)])
            table.add_column(name, justify="right", no_wrap=True)
        if minutes:
            table.add_column("min", justify="right", no_wrap=True)
        for row in comparison.rows:
            cells = [
                _cell(row[figure.key], row["intervals"].get(figure.key), figure.signed, tall) for figure in figures
            ]
            table.add_row(label(row), *cells, *([cost(row["minutes"], "minutes")] if minutes else []))
        return table

    _print_fitting(console, written)


def print_costs(comparison: Comparison, console: Console) -> None:
    """Rank and seeds, what each cost, and its difference to the baseline."""
    from holdfast.report.figures import COSTS
    from holdfast.report.tables import cost, label, p_value

    def written(tall: bool) -> Table:
        table = narrow_table()
        for name in ("rank", "seeds", *("\n".join(figure.label.split()) for figure in COSTS)):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column(f"average less\n{comparison.baseline}", justify="right")
        table.add_column("p\n(Holm)", justify="right", no_wrap=True)
        for row in comparison.rows:
            paired = row["difference"]
            cells = [str(row["rank"] or "–"), str(len(row["seeds"])), *(cost(row[f.key], f.key) for f in COSTS)]
            found = ["–", "–"]
            if paired:
                found = [_cell(paired["difference"], paired["interval"], True, tall), p_value(paired["p_holm"])]
            table.add_row(label(row), *cells, *found)
        return table

    _print_fitting(console, written)


def print_published(rows: list[dict[str, Any]], console: Console) -> None:
    """Ours beside published, in the paper's unit, and where that stands."""
    if not rows:
        console.print("no published figure is about any of these runs", style="dim")
        return
    table = narrow_table()
    table.add_column("figure")
    for name in ("ours", "published", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("source")
    for row in rows:
        ours = "–" if row["ours"] is None else f"{row['ours']:.2f}"
        less = "–" if row["difference"] is None else f"{row['difference']:+.2f}"
        figure = f"{row['figure']} {row['unit']}".rstrip()
        published = f"{row['published']:.2f}"
        table.add_row(row["run"], figure, ours, published, less, row["source"])
    console.print(table)


def _print_fitting(console: Console, written: Callable[[bool], Table]) -> None:
    """Print a table with intervals in one line, or, where that is too wide, in two; runs' names take what is left."""
    table = written(False)
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        table = written(True)
    console.print(table)


def narrow_table(first: str = "run") -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(first, overflow="fold")
    return table


def _cell(value: float | None, interval: Any, signed: bool, tall: bool) -> str:
    if value is None:
        return "–"
    shown = f"{value:+.3f}" if signed else f"{value:.3f}"
    between = "\n.." if tall else ".."
    return f"{shown}\n{interval[0]:.2f}{between}{interval[1]:.2f}" if interval else shown
