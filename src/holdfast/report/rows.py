"""Every test row before and after, of all runs, packed small for the page's list."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.records.changes import RIGHT, Changes, Pair, changes, general_changes
from holdfast.records.read import FinishedRun
from holdfast.records.thumbnails import thumbnails
from holdfast.report.packed import pack_text
from holdfast.report.text import shorten
from holdfast.system.files import json_text

LENGTH = 1200  # characters kept of a prompt, an answer or a response
EXAMPLES = 5  # pairs of answers shown of what a task lost


@dataclass(frozen=True)
class Brief:
    """What became of the test rows of a task, or of the questions of a general ability, with a few of them.

    Attributes:
        listed: what the list of test rows calls it.
        general: whether it is a general ability.
        since: when they were answered first.
        own: whether that was right after the task's own stage, or before training for a general ability; if not, the
            task was learned last.
        rows: how many there are.
        right: how many were right then.
        lost, gained: how many went from right to wrong, and from wrong to right.
        fall: what the score lost; negative where it rose.
        most_lost: the first (before, after) of those lost; empty where no texts were kept.
    """

    name: str
    listed: str
    general: bool
    since: str
    own: bool
    rows: int
    right: int
    lost: int
    gained: int
    fall: float
    most_lost: list[Pair]

    @classmethod
    def of(cls, found: Changes, listed: str, scores: Sequence[float | None], general: bool, own: bool) -> Brief:
        """That of all changes of a task or an ability.

        Args:
            scores: by the row of the score matrix.
        """
        before, after = scores[found.then], scores[found.last]
        assert before is not None and after is not None, "both were measured"
        return cls(
            name=found.name,
            listed=listed,
            general=general,
            since=found.since,
            own=own,
            rows=found.rows,
            right=sum(first["score"] >= RIGHT for first, _ in found.pairs),
            lost=len(found.lost),
            gained=len(found.gained),
            fall=before - after,
            most_lost=found.lost[:EXAMPLES] if found.has_texts else [],
        )


class RowList:
    """The page's list of test rows; those of a run and a task are added once, since their files take long to read."""

    def __init__(self) -> None:
        self._runs: list[str] = []
        self._thumbnails: dict[str, str] = {}
        self._chunks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(self, run: FinishedRun) -> list[Brief]:
        """Add a run's test rows and the questions of its general abilities; what a page says of them in the run's own
        section."""
        place, told = len(self._runs), []
        self._runs.append(run.label)
        self._thumbnails = thumbnails(run.path) | self._thumbnails
        for j, task in enumerate(run.tasks):
            if (found := changes(run, j)) is not None:
                self._add(found, task, run.info["tasks"][task]["fingerprint"], place)
                scores = run.matrix["beside"][task][found.beside] if found.beside else [row[j] for row in run.scores]
                told.append(Brief.of(found, task, scores, False, found.then == run.own_stage(j)))
        for name, values in run.matrix["general"].items():
            if (found := general_changes(run, name)) is not None:
                listed = f"{name} (general)"
                self._add(found, listed, _digest(found) if found.has_texts else "", place)
                told.append(Brief.of(found, listed, values, True, True))
        return told

    def _add(self, found: Changes, listed: str, fingerprint: str, place: int) -> None:
        """Add the rows of a task or an ability, unless their texts were not kept."""
        if not found.has_texts:
            return
        numbers = tuple(row_number(after) for _, after in found.pairs)
        key = (listed, fingerprint, numbers)
        if key not in self._chunks:
            self._chunks[key] = {"task": listed, "runs": [], "rows": _texts(found, list(numbers))}
        chunk = self._chunks[key]
        chunk["runs"].append({"run": place, "since": found.since, "lost": len(found.lost), "gained": len(found.gained)})
        chunk["rows"]["runs"].append(_responses(found))

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


def _digest(found: Changes) -> str:
    """What tells the questions of an ability from others of its name."""
    asked = json_text([[after["prompt"], after["answer"]] for _, after in found.pairs])
    return hashlib.sha256(asked.encode()).hexdigest()


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
