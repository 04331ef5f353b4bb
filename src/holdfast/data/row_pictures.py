"""The pictures of a row: its columns, the parts of its messages, and the marks in its text, in every usual form."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from holdfast.api.task import PICTURE, Turn
from holdfast.data.conversation import BadRowError
from holdfast.data.files import type_name
from holdfast.data.spill import file_of, unnamed
from holdfast.models.pictures import BadPictureError, Picture, UnreadablePictureError, look_at

COLUMNS = ("image", "images")
MARK = "<image>"
"""Where a picture of the row's columns stands in its text."""
PARTS = ("image", "image_url", "input_image")
"""Types of a message's parts that are pictures."""
KEPT = "pictures"
"""A run's own folder of pictures."""
FROM_ROWS = f"../../{KEPT}"
"""The way to it from a task's rows, which lie in data/TASK."""
_KEPT = re.compile(r"[0-9a-f]{15}(?:\.\w+)?")
_FIRST = ("system", "system_prompt", "history")  # what stands before a row's other turns
_ENCODED = ("bytes", "base64", "data")  # of a part; a text there is base64
_OWN = ("path", "image", "image_url", "url", *_ENCODED)
_DATA_URL = re.compile(r"data:image(/[\w.+-]+)?;base64,", re.IGNORECASE)  # Qwen's examples leave the format out
_LONGEST_PATH = 1000  # characters


def take_pictures(row: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Picture]]:
    """Read the pictures of a row.

    A picture is a path, the bytes of a file, ``{path | bytes}`` as Hugging Face's ``Image`` feature has it, or a data
    URL. Pictures in ``image`` or ``images`` stand where the text says ``<image>``, or where a message has a part
    ``{type: image}`` without a picture of its own.

    Args:
        folder: what paths are relative to.

    Returns:
        the row without these columns, in which :data:`~holdfast.api.task.PICTURE` stands for each picture, and the
        pictures in order; the row itself where it has none.

    Raises:
        BadRowError: a picture cannot be used, or their number is not that of the places for them.
    """
    has_parts = any(_has_parts(value) for value in row.values() if isinstance(value, list))
    if row.keys().isdisjoint(COLUMNS) and not has_parts:
        return row, []
    waiting = [
        (f"{column}{f', picture {n}' * many}", source)
        for column in COLUMNS
        for n, source, many in _sources(row.get(column))
    ]
    if not waiting and not has_parts:
        return row, []
    shown: list[Picture] = []
    columns = iter([_picture(source, folder, name) for name, source in waiting])

    def taken(value: Any, within: str) -> Any:
        """A value of the row with marks in the places of its pictures, which are noted in reading order."""
        if isinstance(value, str):
            if not waiting:
                return value
            for _ in range(value.count(MARK)):
                shown.append(_next(columns, within, len(waiting)))
            return value.replace(MARK, PICTURE)
        if isinstance(value, list):
            return [taken(one, f"{within}, part {n}") for n, one in enumerate(value, 1)]
        if isinstance(value, dict) and value.get("type") in PARTS:
            own = _own_picture(value)
            shown.append(_next(columns, within, len(waiting)) if own is None else _picture(own, folder, within))
            return {"type": "text", "text": PICTURE}
        if isinstance(value, dict):
            return {key: taken(one, f"{within}: {key}") for key, one in value.items()}
        return value

    order = sorted((key for key in row if key not in COLUMNS), key=lambda key: key not in _FIRST)
    text = {key: taken(row[key], key) for key in order}
    left = list(columns)
    if left and shown:
        raise BadRowError(f"{MARK}: stands in {len(shown)} places, and the row has {len(waiting)} pictures")
    return text, [*shown, *left]


def with_pictures(turns: Sequence[Turn], pictures: Sequence[Picture]) -> tuple[Turn, ...]:
    """The turns with the pictures that their marks stand for; where no mark stands, the first question shows them all.

    Raises:
        BadRowError: an answer has a mark, or what is left of the row has fewer marks than pictures.
    """
    turns = list(turns)
    if pictures and not any(PICTURE in turn.content for turn in turns):
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        cut = turns[first].cut
        shifted = None if cut is None else (cut[0] + len(pictures), cut[1] + len(pictures))
        turns[first] = replace(turns[first], content=PICTURE * len(pictures) + turns[first].content, cut=shifted)
    left = list(pictures)
    for number, turn in enumerate(turns):
        count = turn.content.count(PICTURE)
        if count and turn.role == "assistant":
            raise BadRowError(f"turn {number + 1}: an answer shows no picture, and this one has {MARK} in it")
        if count:
            turns[number] = replace(turn, pictures=tuple(left[:count]))
            del left[:count]
    return tuple(turns)


def with_kept_pictures(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The row with the paths of its pictures in a run's own folder (:func:`kept_name`) in their places.

    Args:
        folder: what the paths in the row are relative to.

    Raises:
        BadRowError: a picture cannot be used.
    """

    def kept(source: Any) -> str:
        return f"{FROM_ROWS}/{kept_name(_picture(source, folder, 'picture'))}"

    def below(value: Any) -> Any:
        if isinstance(value, list):
            return [below(one) for one in value]
        if isinstance(value, dict) and value.get("type") in PARTS:
            own = _own_picture(value)
            return value if own is None else {"type": "image", "path": kept(own)}
        return {key: below(one) for key, one in value.items()} if isinstance(value, dict) else value

    found = {key: below(value) for key, value in row.items() if key not in COLUMNS}
    for column in COLUMNS:
        if shown := [kept(source) for _, source, _ in _sources(row.get(column))]:
            found[column] = shown if isinstance(row[column], list) else shown[0]
    return found


def kept_name(picture: Picture) -> str:
    """What a picture's file is called in a run's own folder: its number, and an ending that viewers know."""
    ending = picture.source.suffix.lower() if isinstance(picture.source, Path) else ""
    return f"{picture.number:015x}{ending}"


def kept_names(rows: str) -> set[str]:
    """The files in a run's own folder that rows show, which are given as text."""
    return set(re.findall(rf"{re.escape(FROM_ROWS)}/({_KEPT.pattern})", rows))


def shows_pictures(row: dict[str, Any]) -> str | None:
    """The column of a row that has pictures; None where none has."""
    columns = (key for key, value in row.items() if (key in COLUMNS and value) or _has_parts([value]))
    return next(columns, None)


def _own_picture(part: dict[str, Any]) -> Any:
    """The picture that a part of a message brings itself; None: one of the row's columns."""
    key = next((key for key in _OWN if part.get(key) is not None), "")
    own = part.get(key)
    if isinstance(own, dict) and "url" in own:
        own = own["url"]
    return _as_data_url(own) if key in _ENCODED else own


def _sources(value: Any) -> Iterator[tuple[int, Any, bool]]:
    """Each picture of a column: its number, what it is, and whether there are several."""
    values = value if isinstance(value, list) else [] if value is None or value == "" else [value]
    yield from ((n, one, len(values) > 1) for n, one in enumerate(values, 1))


def _has_parts(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("type") in PARTS or any(map(_has_parts, value.values()))
    return isinstance(value, list) and any(map(_has_parts, value))


def _as_data_url(content: Any) -> Any:
    """Text in a place of bytes is base64."""
    bare = isinstance(content, str) and not _DATA_URL.match(content)
    return f"data:image;base64,{content}" if bare else content


def _next(columns: Iterator[Picture], within: str, count: int) -> Picture:
    picture = next(columns, None)
    if picture is None and not count:
        raise BadRowError(
            f"{within}: has no picture, neither of its own ({', '.join(_OWN)}) nor of the row ({' or '.join(COLUMNS)})"
        )
    if picture is None:
        raise BadRowError(f"{within}: shows one picture more than the {count} of the row ({' or '.join(COLUMNS)})")
    return picture


def _picture(source: Any, folder: Path, within: str) -> Picture:
    name = ""
    if isinstance(source, dict):  # as Hugging Face's Image feature
        name = source.get("name") or ""
        content = source.get("bytes")
        source = source.get("path") if content is None else _as_data_url(content)
    if isinstance(source, str) and _DATA_URL.match(source):
        try:
            source = base64.b64decode(source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadRowError(f"{within}: its content is no base64: {error}") from None
    if isinstance(source, str):
        if re.match(r"https?://", source):
            raise BadRowError(f"{within}: {source!r:.80} is an address of the web; give a file")
        if len(source) > _LONGEST_PATH:
            raise BadRowError(
                f"{within}: {source[:20]!r}... has {len(source)} characters and is no path; write a picture in base64 "
                "as data:image/png;base64,..."
            )
        name, source = name or source, folder / source.removeprefix("file://")
    elif isinstance(source, bytes):
        name, source = unnamed(source), file_of(source)
    if not isinstance(source, Path):
        raise BadRowError(f"{within}: must be a path or the bytes of a picture, not {type_name(source)}")
    try:
        picture = look_at(source, name)
    except UnreadablePictureError as error:
        raise BadRowError(f"{within}: {error} (looked for in {folder})") from None
    except BadPictureError as error:
        raise BadRowError(f"{within}: {error}") from None
    if name.startswith(FROM_ROWS) and _KEPT.fullmatch(source.name) and int(source.name[:15], 16) != picture.number:
        raise BadRowError(
            f"{within}: {name!r} is another picture than the one that was kept (looked for in {folder}); restore it"
        )
    return picture
