"""Small copies of the pictures of test rows, beside a run's responses, for its page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from holdfast.api.task import Example
from holdfast.models.pictures import Picture
from holdfast.records.directory import RunDirectory
from holdfast.system.files import read_json

FILE = "thumbnails.json"
"""In a run's directory: data URLs by the pictures' numbers."""

SIDE, QUALITY = 96, 70  # pixels of the longer side at most; of JPEG
KIND = "data:image/jpeg;base64,"
MOST = 1000
"""Pictures of a run that have one, at most: about 3 MB."""


def name_of(picture: Picture) -> str:
    """What records call a picture."""
    return f"{picture.number:015x}"


def keep_thumbnails(directory: RunDirectory, examples: Iterable[Example]) -> None:
    """Add the pictures of examples to a run's thumbnails, as far as there is room; all ranks call this."""
    pictures = {name_of(picture): picture for example in examples for picture in example.pictures}
    if not pictures:
        return
    kept = thumbnails(directory.path)
    new = [name for name in pictures if name not in kept][: MOST - len(kept)]
    if new:
        directory.write_json(directory.path / FILE, kept | {name: _data_url(pictures[name]) for name in new})


def thumbnails(run: Path) -> dict[str, str]:
    """The thumbnails of a run, data URLs by the pictures' numbers."""
    path = run / FILE
    found: Any = read_json(path) if path.exists() else {}
    return {name: url for name, url in found.items() if str(url).startswith(KIND)}


def _data_url(picture: Picture) -> str:
    small, file = picture.pixels(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(file, "JPEG", quality=QUALITY)
    return f"{KIND}{base64.b64encode(file.getvalue()).decode()}"
