"""Texts packed small for a page: gzip in base 85, which unpack.js undoes in the browser."""

from __future__ import annotations

import gzip
from functools import cache

import numpy as np

SIGNS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%,()*+-;.=:?@^_`{|}~"
"""Python's of base 85, with others for the three that mean something in HTML."""

LEVEL = 5  # of gzip: one more takes a fifth longer and saves 7 in 1,000


def pack_text(text: str) -> str:
    """``text`` as ASCII signs that can stand in HTML, in JSON and in JavaScript's strings as they are."""
    content = gzip.compress(text.encode(), LEVEL, mtime=0)
    missing = -len(content) % 4  # bytes of the last four, and as many signs
    words = np.frombuffer(content + bytes(missing), ">u4").astype(np.uint32)
    digits = words[:, None] // 85 ** np.arange(4, -1, -1, dtype=np.uint32) % 85
    return np.frombuffer(SIGNS, np.uint8)[digits].tobytes()[: digits.size - missing].decode()


@cache
def packed_plotly() -> str:
    """plotly.js, the library that draws a page's plots, packed: 1.9 MB in place of 4.8."""
    from plotly.offline import get_plotlyjs

    return pack_text(get_plotlyjs())
