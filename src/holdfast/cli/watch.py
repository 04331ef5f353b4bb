"""`holdfast watch`: a page in the browser that shows a run while it trains."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.collection import no_collection

RunPath = Annotated[Path, typer.Argument(help="A run's directory.", show_default=False, metavar="RUN")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of the page on this machine; 0: any free one.")]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Print the page's address and open nothing.")]
OfRun = Annotated[bool, typer.Option("--of-run", hidden=True, help="The run started this, and ends it.")]


def watch(run: RunPath, port: Port = 0, no_browser: NoBrowser = False, of_run: OfRun = False) -> None:
    """Show a run in the browser while it trains: figures, curves and time left, as its files grow. Ctrl-C ends it.

    It only reads the run's files, so it may begin and end at any time.
    """
    with no_collection():
        from holdfast.deploy.watch import watch as watch_run

    if of_run:
        os.nice(10)
    watch_run(run, port=port, browser=not no_browser, of_run=of_run)


@contextlib.contextmanager
def beside(output: str, port: int, no_browser: bool) -> Iterator[None]:
    """Show a run in the browser from a process of its own, which ends soon after the run.

    Args:
        output: the run's directory, which need not be there yet.
    """
    command = [sys.executable, "-m", "holdfast", "watch", output, "--of-run", "--port", str(port)]
    launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "HOLDFAST_ERROR_FILE")
    process = subprocess.Popen(
        command + ["--no-browser"] * no_browser,
        env={name: value for name, value in os.environ.items() if name not in launchers},
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run, whose end is shown
    )
    try:
        yield
    finally:
        process.terminate()
