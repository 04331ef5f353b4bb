"""`holdfast report`: write the page of one run, or of several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.collection import no_collection
from holdfast.system.terminal import say

Runs = Annotated[list[Path], typer.Argument(help="Directories of runs.", show_default=False)]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the page.")]


def report(runs: Runs, output: Output = None) -> None:
    """Write report.html: for one run into its directory, for several runs into this folder, or to --output."""
    with no_collection():
        from holdfast.records.directory import require_runs
        from holdfast.report import write_report

        require_runs(runs)
        if output is None:
            output = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
        say(write_report(runs, output))
