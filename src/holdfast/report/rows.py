"""Every test row before and after, of all runs, packed small for the page's list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.records.read import Changes, FinishedRun, changes
from holdfast.records.thumbnails import thumbnails
from holdfast.report.packed import pack_text
from holdfast.report.text import shorten
from holdfast.system.files import json_text

LENGTH = 1200  # characters kept of a prompt, an answer or a response
EXAMPLES = 3  # pairs of responses kept of a task in brief, of those lost and of those gained

Pair = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Brief:
    """What became of a task's test rows, with a few of them.

    Attributes:
        since: when they were answered first.
        rows: how many there are.
        lost, gained: how many went from right to wrong, and from wrong to right.
        most_lost, most_gained: the first (before, after) of these.
    """

    task: str
    since: str
    rows: int
    lost: int
    gained: int
    most_lost: list[Pair]
    most_gained: list[Pair]

    @classmethod
    def of(cls, found: Changes) -> Brief:
        """That of all changes of a task."""
        most = found.lost[:EXAMPLES], found.gained[:EXAMPLES]
        return cls(found.task, found.since, found.rows, len(found.lost), len(found.gained), *most)


class RowList:
    """The page's list of test rows; those of a run and a task are added once, since their files take long to read."""

    def __init__(self) -> None:
        self._runs: list[str] = []
        self._thumbnails: dict[str, str] = {}
        self._chunks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(self, run: FinishedRun) -> list[Brief]:
        """Add a run's test rows; what a page says of them in the run's own section."""
        place, told = len(self._runs), []
        self._runs.append(run.label)
        self._thumbnails = thumbnails(run.path) | self._thumbnails
        for j, task in enumerate(run.tasks):
            found = changes(run, j)
            if found is None:
                continue
            numbers = tuple(map(row_number, (after for _, after in found.pairs)))
            key = (task, run.info["tasks"][task]["fingerprint"], numbers)
            if key not in self._chunks:
                self._chunks[key] = {"task": task, "runs": [], "rows": _texts(found, list(numbers))}
            chunk = self._chunks[key]
            chunk["runs"].append(
                {"run": place, "since": found.since, "lost": len(found.lost), "gained": len(found.gained)}
            )
            chunk["rows"]["runs"].append(_responses(found))
            told.append(Brief.of(found))
        return told

    def packed(self) -> dict[str, Any]:
        """What the list shows.

        Returns:
            ``runs`` (labels), ``length`` (to which longer texts are shortened), ``chunks``, one a task and set of test
            rows, and ``thumbnails`` (data URLs by name) where rows show pictures.

            A chunk has ``task``, ``runs`` (of each run its place in ``runs``, ``since``, and how many rows were
            ``lost`` and ``gained``) and ``rows``: packed JSON with ``numbers``, ``prompts`` and ``answers``,
            ``pictures`` (names of what each row shows, where some show any), and by run ``before`` and ``after``
            (responses), ``was`` and ``is`` (scores).
        """
        chunks = [
            chunk | {"rows": pack_text(json_text(chunk["rows"], separators=(",", ":")))}
            for chunk in self._chunks.values()
        ]
        packed = {"runs": self._runs, "length": LENGTH, "chunks": chunks}
        return packed | ({"thumbnails": self._thumbnails} if self._thumbnails else {})


def row_number(row: dict[str, Any]) -> str:
    """What names a test row: its number, and where a conversation is asked several times which time."""
    return str(row["row"]) if row.get("number") is None else f"{row['row']}.{row['number']}"


def _texts(found: Changes, numbers: list[str]) -> dict[str, Any]:
    rows = [after for _, after in found.pairs]
    return {
        "numbers": numbers,
        "prompts": [shorten(row["prompt"], LENGTH) for row in rows],
        "answers": [shorten(row["answer"], LENGTH) for row in rows],
        "runs": [],
    } | ({"pictures": [row.get("shown", []) for row in rows]} if any(row.get("shown") for row in rows) else {})


def _responses(found: Changes) -> dict[str, Any]:
    before, after = zip(*found.pairs, strict=True)
    return {
        "before": [shorten(row["response"], LENGTH) for row in before],
        "after": [shorten(row["response"], LENGTH) for row in after],
        "was": [round(row["score"], 3) for row in before],
        "is": [round(row["score"], 3) for row in after],
    }
