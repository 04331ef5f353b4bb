"""`holdfast status`: a run's stages, what each learned and cost, the current one, and what can be done next."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.collection import no_collection

RunPath = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False, metavar="RUN")]


def status(run: RunPath) -> None:
    """Show a run's stages, what each learned and what it cost, the current one, and what can be done next."""
    with no_collection():
        from holdfast.report.status import show
        from holdfast.report.status import status as read_status

        show(read_status(run))
