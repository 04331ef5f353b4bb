"""Python's garbage collection, which takes a fifth of a command's start."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Let nothing be collected: for imports and for reading, after which nearly all that was made is still needed.

    Objects that refer to each other in a circle stay in memory until the end. All others go as ever. What is there
    after the first time, most of it libraries, is never looked at again: a collection of it takes half a second, and
    each stage of a run makes two.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()
        if enabled:
            gc.enable()
