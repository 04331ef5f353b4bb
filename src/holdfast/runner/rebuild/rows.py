"""Rows known again by what they say, in whatever format and file they stand."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.api.task import Example
from holdfast.config.stream import TaskOptions
from holdfast.data.files import read_rows
from holdfast.data.formats import KEYS, USED, detect, to_examples
from holdfast.data.row_pictures import shows_pictures
from holdfast.errors import DataError

Said = frozenset[str]
"""What a row says: its columns by the names of its format, and its conversation or its text."""


def said_in(file: Path, options: TaskOptions | None = None) -> list[Said]:
    """What each row of a file says.

    Args:
        options: how the rows are read; None: as they are detected.

    Raises:
        DataError: the file cannot be read, or its rows have no known format.
    """
    rows = read_rows(file)
    columns = options.columns if options else {}
    rows = [{columns.get(key) or key: value for key, value in row.items()} for row in rows] if columns else rows
    format, names = (options.format, {}) if options and options.format else detect(rows, file)
    rows = [{names.get(key, key): value for key, value in row.items()} for row in rows]
    return [_said(row, format, file) for row in rows]


def _said(row: Mapping[str, Any], format: str, file: Path) -> Said:
    used = {key: row[key] for key in sorted(USED[format] & row.keys()) if row[key] not in (None, "", [])}
    seen = shows_pictures(dict(row)) is not None  # then its words alone are not all that it says
    found = set() if seen else {json.dumps([format, used], sort_keys=True, default=str)}
    if seen or (format != "sentence_label" and set(KEYS[format]) <= row.keys()):
        try:
            examples = to_examples([dict(row)], format, file=file, bad=[])
        except DataError:
            examples = []
        found |= {said_by(example) for example in examples}
    return frozenset(found)


def said_by(example: Example) -> str:
    """The conversation of an example, or its text, whatever its format was."""
    turns = [[turn.role, turn.content.strip(), turn.calls, *turn.shown] for turn in example.turns]
    return json.dumps(turns or (example.text or "").strip(), default=str)


def matching(rows: Sequence[Said], wanted: Collection[str]) -> list[int]:
    """The places of the rows that say what is wanted."""
    return [place for place, said in enumerate(rows) if not said.isdisjoint(wanted)]


def all_said(rows: Iterable[Said]) -> set[str]:
    """What rows say, together."""
    return {key for said in rows for key in said}
