"""`holdfast compare`: compare methods over seeds, in a table and on a page."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.report import Output, Runs
from holdfast.system.collection import no_collection
from holdfast.system.terminal import open_console, say


class Format(StrEnum):
    """Format of the table."""

    text = "text"
    markdown = "markdown"
    latex = "latex"
    csv = "csv"


Written = Annotated[Format, typer.Option("--format", help="How the table is written.")]
Baseline = Annotated[
    str | None,
    typer.Option(help="Label or directory of the runs that the others are paired with; the first ones if absent."),
]
Different = Annotated[
    bool, typer.Option("--allow-different", help="Compare what should not be compared; the table says so.")
]

Publication = Annotated[
    Path | None, typer.Option("--published", help="CSV file of published figures, to print beside ours.")
]


def compare(
    runs: Runs,
    output: Output = None,
    format: Written = Format.text,
    baseline: Baseline = None,
    allow_different: Different = False,
    published: Publication = None,
) -> None:
    """Compare runs, grouping those that differ only in their seed; with --output, also write a page.

    Runs whose streams, prompts, budgets or metrics differ are refused.
    """
    with no_collection():
        from holdfast.records.directory import require_runs
        from holdfast.records.read import read_runs
        from holdfast.report import write_report
        from holdfast.report.compare import compare as compare_runs
        from holdfast.report.compare import refuse_different
        from holdfast.report.published import beside_published, read_published
        from holdfast.report.tables import as_csv, as_latex, as_markdown
        from holdfast.report.terminal import print_comparison, print_published

        require_runs(runs)
        read = read_runs(runs)
        if not allow_different:
            refuse_different(read)
        comparison = compare_runs(read, baseline)
        if format is Format.text:
            print_comparison(comparison, open_console())
        else:
            write = {Format.markdown: as_markdown, Format.latex: as_latex, Format.csv: as_csv}[format]
            say(write(comparison), end="")
        if published is not None:
            print_published(
                beside_published(read, read_published(published)), open_console(stderr=format is not Format.text)
            )
        if output is not None:
            say(write_report(runs, output), file=sys.stderr if format is not Format.text else None)
