"""`holdfast convert`: turn a GGUF file, an InternLM2 or a Baichuan checkpoint into a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.system.terminal import say

Source = Annotated[
    Path, typer.Argument(help="A .gguf file, or a folder of an InternLM2, InternLM2.5, Baichuan2-7B or Baichuan-7B.")
]
Target = Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")]


def convert(source: Source, target: Target) -> None:
    """Turn a GGUF file, an InternLM2 or a Baichuan checkpoint into a folder that transformers loads, once, without
    running the code it brings."""
    from holdfast.models.convert.checkpoint import convert as convert_checkpoint
    from holdfast.models.convert.gguf import convert_gguf
    from holdfast.system.progress import Progress
    from holdfast.system.quiet import silence_libraries

    silence_libraries()
    say(convert_gguf(source, target) if source.is_file() else convert_checkpoint(source, target, Progress()))
