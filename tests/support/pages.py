"""The defaults that a page's table states."""

from __future__ import annotations

import json
import re


def titles(page: str) -> list[str]:
    return re.findall(r"`(\w+)`", page.splitlines()[0])


def defaults(page: str) -> dict[str, dict[str, object]]:
    """Per method, the defaults of its table; a table of one method calls its column ``default``."""
    section = page.partition("## Defaults")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if line.startswith("|")
    ]
    head, body = rows[0], rows[2:]
    assert head[0] == "option" and head[-1] == "where it comes from", head
    names = titles(page) if head[1:-1] == ["default"] else [name.strip("`") for name in head[1:-1]]
    found: dict[str, dict[str, object]] = {name: {} for name in names}
    for row in body:
        for name, cell in zip(names, row[1:], strict=False):
            found[name][row[0].strip("`")] = json.loads(cell.strip("`"))
    return found
