"""`holdfast demo`: the phenomenon and its cure in a few minutes, without any download; or on a published model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.terminal import open_console

Seed = Annotated[int, typer.Option(help="Seed of the world, the model and the runs.")]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Where the model, the runs and the page go.",
        show_default="runs/demo, or runs/demo-real",
    ),
]
Real = Annotated[
    bool,
    typer.Option(
        "--real", help="Teach SmolLM2-135M-Instruct, which is downloaded (92 MB), in about 25 minutes on two cores."
    ),
]
Model = Annotated[Path | None, typer.Option(help="With --real: folder of an instruct model to take instead.")]


def demo(output: Output = None, seed: Seed = 0, real: Real = False, model: Model = None) -> None:
    """Pretrain a small model on a generated world, then teach it four years with five methods and compare them.

    With --real, teach a published instruct model two years of made-up facts and a skill, with and without protection,
    and watch what it knew: an everyday quiz, and its loss on its own samples.
    """
    from holdfast.errors import ConfigError
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    if not real:
        if model is not None:
            raise ConfigError("--model: is for --real; the plain demo makes its model itself")
        from holdfast.lab.demo import run_demo

        run_demo(output or Path("runs/demo"), seed, open_console())
        return
    from holdfast.lab.real_demo import run_real_demo

    run_real_demo(output or Path("runs/demo-real"), seed, open_console(), model)
