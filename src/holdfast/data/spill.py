"""Pictures whose bytes stand in the rows themselves, in files of this process, so that they do not stay in memory."""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any


def file_of(content: bytes) -> Path:
    """A file with a picture's bytes, which is removed when this process ends."""
    path = _folder() / hashlib.sha256(content).hexdigest()
    if not path.exists():
        path.write_bytes(content)
    return path


def unnamed(content: bytes) -> str:
    """What messages call a picture that has no name of its own."""
    return f"picture of {len(content)} bytes"


def without_bytes(value: Any) -> Any:
    """A value of a row in which a file stands for each picture that has its bytes, ``{bytes, path}``."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            content = value["bytes"]
            return value | {"bytes": None, "path": str(file_of(content)), "name": value.get("path") or unnamed(content)}
        return {key: without_bytes(one) for key, one in value.items()}
    return [without_bytes(one) for one in value] if isinstance(value, list) else value


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="holdfast-pictures-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
