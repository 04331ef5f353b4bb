"""`holdfast export`: a finished stage as a folder that plain transformers or PEFT loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli.run import AcceptChanges, Trust
from holdfast.system.terminal import say

RunPath = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False, metavar="RUN")]
To = Annotated[Path, typer.Option("--to", help="Folder to write; an earlier export there is replaced.")]
Stage = Annotated[int | None, typer.Option("--stage", help="Which stage, from 1; the one the run holds if absent.")]
Merge = Annotated[bool, typer.Option("--merge", help="Merge the adapter into its model.")]
PushTo = Annotated[str | None, typer.Option("--push-to", help="Upload the folder to the hub under this name.")]


def export(
    run: RunPath,
    to: To,
    stage: Stage = None,
    merge: Merge = False,
    push_to: PushTo = None,
    accept_changes: AcceptChanges = False,
    trust: Trust = False,
) -> None:
    """Write a finished stage's model or adapter, with tokenizer and model card, for use without holdfast."""
    from holdfast.deploy.exported_stage import find_exported_stage
    from holdfast.records.read import read_run
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    find_exported_stage(read_run(run), stage)  # before the libraries are imported
    from holdfast.deploy.export import export as export_stage

    exported = export_stage(
        run, to, stage=stage, merge=merge, push_to=push_to, accept_changes=accept_changes, trust=trust
    )
    for line in exported.lacks:
        say(f"warning: {line}", file=sys.stderr)
    say(to)
