"""`holdfast rebuild`: make a run again without a task, or without some rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.run import Trust

RunPath = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False, metavar="RUN")]
Without = Annotated[
    list[str] | None, typer.Option("--without", help="A task that goes; may be given again.", metavar="TASK")
]
Rows = Annotated[Path | None, typer.Option("--without-rows", help="A data file of the rows that go.", metavar="FILE")]


def rebuild(run: RunPath, without: Without = None, without_rows: Rows = None, trust: Trust = False) -> None:
    """Make a run again as if a task, or some rows, had never been in it; the same command continues it.

    The stages before are kept. The old run stays in its place until the new one is complete. Exit code 3: a stage
    failed the configuration's gate.
    """
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    from holdfast.records.gate import raise_if_failed
    from holdfast.runner.rebuild.rebuild import rebuild as make_again

    make_again(run, without=without or None, without_rows=without_rows, trust=trust)
    raise_if_failed(run)
