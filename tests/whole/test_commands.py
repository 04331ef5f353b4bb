"""The commands of the pages and the examples can be read: each command, option and argument exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest

from support.command import parse
from support.notebooks import SHELL
from support.paths import DOCS, ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted(path for path in (ROOT / "examples").rglob("*.*") if path.suffix != ".jsonl"),
    *sorted((ROOT / "experiments").rglob("README.md")),
]
COMMAND = re.compile(r"\s*(?:#\s{2,}|\$ |- run: |srun )?holdfast (\w.*)")


def code(page: Path) -> Iterator[str]:
    """The lines of a page's blocks but those of what was printed; all lines of another file."""
    fence = ""
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if mark := re.match(r"\s*```(\w*)", line):
            fence = "" if fence else mark[1] or "text"
        elif fence not in ("", "text") or line.startswith("    ") or page.suffix != ".md":
            yield line


def commands(page: Path) -> list[str]:
    """What follows `holdfast` in its lines of code."""
    return [found[1] for line in code(page) if (found := COMMAND.match(line))]


def spans(page: Path) -> list[str]:
    """What stands in the text in place of a command, often without its arguments."""
    return re.findall(r"`holdfast\s+(\w[^`]*)`", page.read_text(encoding="utf-8"))


def words(command: str) -> list[str]:
    return list(takewhile(lambda word: word not in SHELL, shlex.split(command, comments=True)))


def missing(command: str) -> str | None:
    """What a command names that does not exist; a text may leave out arguments, or write N for a number."""
    try:
        parse(words(command))
    except Exception as error:
        return str(error) if re.search(r"No such|unexpected extra", str(error)) else None
    return None


def test_every_command_of_a_block_can_be_run():
    for page in PAGES:
        for command in commands(page):
            try:
                parse(words(command))
            except Exception as error:
                pytest.fail(f"{page.relative_to(ROOT)}: holdfast {command}: {error}")


def test_every_command_of_a_text_exists():
    wrong = [
        f"{page.relative_to(ROOT)}: {span}: {why}" for page in PAGES for span in spans(page) if (why := missing(span))
    ]
    assert not wrong


def test_what_is_read_is_what_stands_there():
    """What the two tests above rest on."""
    read = {str(page.relative_to(ROOT)): commands(page) for page in PAGES}
    assert len(read["README.md"]) > 20 and len(read["docs/footguns.md"]) > 15 and len(read["docs/ci.md"]) == 4
    assert "gate runs/gated --junit gate.xml --markdown gate.md" in read["examples/gate-in-ci.yaml"]
    assert "check CONFIG" in spans(DOCS / "data.md") and missing("check") is None
    for wrong in ("gate runs/july --max-forgeting 0.05", "gates runs/july", "status runs/july runs/august"):
        assert missing(wrong)
