"""`holdfast compare`: several runs in one table, and in one page."""

from __future__ import annotations

from holdfast.cli.report import Output, Runs


def compare(runs: Runs, output: Output = None) -> None:
    """Print the summary figures of several runs, and with --output also write a page that compares them."""
    from rich.console import Console

    from holdfast.cli.table import print_table
    from holdfast.directory import require_runs
    from holdfast.report import write_report

    require_runs(runs)
    print_table(runs, Console())
    if output is not None:
        print(write_report(runs, output))
