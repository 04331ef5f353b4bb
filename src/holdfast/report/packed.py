"""Texts packed small for a page: gzip in base 85, which unpack.js undoes in the browser."""

from __future__ import annotations

import base64
import gzip
from functools import cache

LEVEL = 6  # of gzip: a level more takes a third longer and saves 2 in 1,000

# Python's base 85 without the three signs that mean something in HTML.
_SAFE = str.maketrans("&<>", ",.:")


def pack_text(text: str) -> str:
    """``text`` as ASCII signs that can stand in HTML, in JSON and in JavaScript's strings as they are."""
    return base64.b85encode(gzip.compress(text.encode(), LEVEL, mtime=0)).decode().translate(_SAFE)


@cache
def packed_plotly() -> str:
    """plotly.js, the library that draws a page's plots, packed: 1.8 MB in place of 4.8."""
    from plotly.offline import get_plotlyjs

    return pack_text(get_plotlyjs())
