"""JSON as others read it, who do not know Python's NaN and Infinity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def strict_json(text: str) -> Any:
    """Parse JSON; ValueError for NaN, Infinity and -Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def json_below(folder: Path) -> dict[str, list[Any]]:
    """Every JSON and JSON-lines file below a folder, parsed strictly: {path: its values}."""
    found = {}
    for path in sorted(folder.rglob("*.json*")):
        text = path.read_text(encoding="utf-8")
        pieces = [line for line in text.split("\n") if line] if path.suffix == ".jsonl" else [text]
        try:
            found[path.relative_to(folder).as_posix()] = [strict_json(piece) for piece in pieces]
        except ValueError as error:
            raise AssertionError(f"{path}: {error}") from None
    return found
