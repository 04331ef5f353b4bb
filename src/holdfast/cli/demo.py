"""`holdfast demo`: the phenomenon and its cure in a few minutes, without any download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.terminal import open_console

Seed = Annotated[int, typer.Option(help="Seed of the world, the model and the runs.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where the model, the runs and the page go.")]


def demo(output: Output = Path("runs/demo"), seed: Seed = 0) -> None:
    """Pretrain a small model on a generated world, then teach it four years with four methods and compare them."""

    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    from holdfast.lab.demo import run_demo

    run_demo(output, seed, open_console())
