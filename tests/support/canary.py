"""A text that no file may hold once what it stood in was taken out."""

from __future__ import annotations

from array import array
from pathlib import Path

from support.tiny import tiny_tokenizer

CANARY = "zqxjk"


def holding(directory: Path) -> list[str]:
    """The files that hold the canary, as text or as tokens."""
    ids = tiny_tokenizer()(CANARY, add_special_tokens=False)["input_ids"]
    patterns = [CANARY.encode(), *(array(kind, ids).tobytes() for kind in "iq")]
    return [
        str(file.relative_to(directory))
        for file in sorted(directory.rglob("*"))
        if file.is_file() and any(pattern in file.read_bytes() for pattern in patterns)
    ]
