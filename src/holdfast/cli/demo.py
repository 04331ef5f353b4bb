"""`holdfast demo`: the phenomenon and its cure in a few minutes, without any download; with pictures; or on a published
model."""

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
        show_default="runs/demo, runs/demo-images or runs/demo-real",
    ),
]
Real = Annotated[
    bool,
    typer.Option(
        "--real", help="Teach SmolLM2-135M-Instruct, which is downloaded (92 MB), in about 25 minutes on two cores."
    ),
]
Images = Annotated[
    bool, typer.Option("--images", help="Train a small vision-language model, and teach it three rooms of pictures.")
]
Model = Annotated[Path | None, typer.Option(help="With --real: folder of an instruct model to take instead.")]


def demo(
    output: Output = None, seed: Seed = 0, images: Images = False, real: Real = False, model: Model = None
) -> None:
    """Pretrain a small model on a generated world, then teach it four years with five methods and compare them.

    With --images, the model sees: it learns what shapes, colours, places, numbers and charts are, then what three rooms
    of a gallery call them.

    With --real, teach a published instruct model two years of made-up facts and a skill, with and without protection,
    and watch what it knew: an everyday quiz, and its loss on its own samples.
    """
    from holdfast.errors import ConfigError
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    if images and real:
        raise ConfigError("--images: the demo with pictures makes its model itself; leave out --real, or --images")
    if not real and model is not None:
        raise ConfigError("--model: is for --real; the other demos make their model themselves")
    if images:
        from holdfast.lab.image_demo import run_image_demo

        run_image_demo(output or Path("runs/demo-images"), seed, open_console())
        return
    if not real:
        from holdfast.lab.demo import run_demo

        run_demo(output or Path("runs/demo"), seed, open_console())
        return
    from holdfast.lab.real_demo import run_real_demo

    run_real_demo(output or Path("runs/demo-real"), seed, open_console(), model)
