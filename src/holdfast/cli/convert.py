"""`holdfast convert`: turn an InternLM2 or Baichuan checkpoint into a plain Llama one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.terminal import say

Source = Annotated[Path, typer.Argument(help="Folder of an InternLM2, InternLM2.5, Baichuan2-7B or Baichuan-7B.")]
Target = Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")]


def convert(source: Source, target: Target) -> None:
    """Turn an InternLM2 or Baichuan checkpoint into a plain Llama one, once, without running the code it brings."""
    from holdfast.models.convert.checkpoint import convert as convert_checkpoint
    from holdfast.system.progress import Progress
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    say(convert_checkpoint(source, target, Progress()))
