"""Sizes of files as people write them: 2GB, 500 MiB."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_UNITS = ("B", "KB", "MB", "GB", "TB")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*")


def byte_size(size: str | int) -> int:
    """Bytes of a size: a number of bytes, or a number with B, KB, MB, GB, TB (1000 each) or KiB to TiB (1024 each).

    Raises:
        ValueError: it is none.
    """
    found = _SIZE.fullmatch(str(size).upper())
    if found is None:
        raise ValueError(f"{size!r} is no size; a number of bytes is one, and so are 500MB and 2GB")
    unit = found[2] or "B"
    base = 1024 if "I" in unit else 1000
    return int(float(found[1]) * base ** _UNITS.index(unit.replace("I", "")))


def _is_size(size: str | int | None) -> str | int | None:
    if size is not None:
        byte_size(size)
    return size


Size = Annotated[str | int | None, AfterValidator(_is_size)]
"""A size in bytes, or None."""
