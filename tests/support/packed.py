"""What a page's unpack.js does."""

from __future__ import annotations

import base64
import gzip


def unpack_text(packed: str) -> str:
    """The text that :func:`holdfast.report.packed.pack_text` packed."""
    return gzip.decompress(base64.b85decode(packed.translate(str.maketrans(",.:", "&<>")))).decode()
