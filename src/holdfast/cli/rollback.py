"""`holdfast rollback`: let a run hold another stage from now on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunPath = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False, metavar="RUN")]
To = Annotated[int, typer.Option("--to", min=0, help="The stage to hold; 0: the model before training.")]


def rollback(run: RunPath, to: To) -> None:
    """Go back to an earlier stage, or forward again to an undone one; no stage is deleted."""
    from holdfast.records.read import read_run
    from holdfast.records.stages import require_folders
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    require_folders(read_run(run))  # before the libraries are imported
    from holdfast.runner.rollback import rollback as hold

    hold(run, to=to)
