"""A file of ``data.cache``: written whole or not at all; it ends with the digest of its rest, which readers check."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from holdfast.api import task
from holdfast.errors import DataError
from holdfast.system.files import PARTIAL
from holdfast.version import __version__

DIGEST = hashlib.sha256
"""Of all that a file holds; it stands at the end of the file, and is checked whenever the file is found again."""

READ = 2**20
"""Bytes that are read at a time to check a file."""


@cache
def code() -> str:
    """The version of holdfast and the SHA-256 of its code that makes examples and rows."""
    digest = DIGEST(__version__.encode())
    for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(task.__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


@contextmanager
def partial_file(place: Path) -> Iterator[Path]:
    """A new file beside ``place``, to write to; it goes afterwards unless it was moved to ``place``.

    Raises:
        DataError: the folder cannot be written to, or its disk is full.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f"{place.stem[:16]}-{secrets.token_hex(8)}{PARTIAL}")
        partial.open("xb").close()
    except OSError as error:
        raise _unwritable(place, error) from None
    try:
        yield partial
    except OSError as error:
        raise _unwritable(place, error) from None
    finally:
        partial.unlink(missing_ok=True)


def _unwritable(place: Path, error: OSError) -> DataError:
    return DataError(
        f"data.cache: {place.parent}: tokenised rows cannot be written: {error.strerror or error}; free some "
        "space, name another folder, or leave the key out"
    )


def complete(path: Path) -> None:
    """Put the digest at the end of a file, and the file on disk."""
    with path.open("r+b") as file:
        file.write(hashlib.file_digest(file, DIGEST).digest())
        file.flush()
        os.fsync(file.fileno())


def is_whole(path: Path) -> bool:
    """Whether a file ends with the digest of what stands before; it is read, not mapped, so that no memory is taken."""
    digest = DIGEST()
    with path.open("rb") as file:
        left = path.stat().st_size - digest.digest_size
        while left > 0 and (part := file.read(min(left, READ))):
            digest.update(part)
            left -= len(part)
        return file.read() == digest.digest()
