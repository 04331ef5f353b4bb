"""Every test row before and after, of all runs, packed small for the page's list."""

from __future__ import annotations

from typing import Any

from holdfast.records.read import Changes, FinishedRun, changes
from holdfast.report.packed import pack_text
from holdfast.report.text import shorten
from holdfast.system.files import json_text

LENGTH = 1200  # characters kept of a prompt, an answer or a response


def pack(runs: list[FinishedRun]) -> dict[str, Any]:
    """What the page's list of test rows shows.

    Returns:
        ``runs`` (labels), ``length`` (to which longer texts are shortened) and ``chunks``, one a task and set of test
        rows, with ``task``, ``runs`` (for each run its place in ``runs``, ``since``, and how many rows were
        ``lost`` and ``gained``) and ``rows``: packed JSON with ``numbers``, ``prompts`` and ``answers`` of the rows,
        and by run ``before`` and ``after`` (responses), ``was`` and ``is`` (scores).
    """
    chunks: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for j, task in enumerate(run.tasks):
            found = changes(run, j)
            if found is None:
                continue
            numbers = tuple(map(row_number, (after for _, after in found.pairs)))
            key = (task, run.info["tasks"][task]["fingerprint"], numbers)
            if key not in chunks:
                chunks[key] = {"task": task, "runs": [], "rows": _texts(found, list(numbers))}
            chunk = chunks[key]
            chunk["runs"].append(
                {"run": place, "since": found.since, "lost": len(found.lost), "gained": len(found.gained)}
            )
            chunk["rows"]["runs"].append(_responses(found))
    for chunk in chunks.values():
        chunk["rows"] = pack_text(json_text(chunk["rows"], separators=(",", ":")))
    return {"runs": [run.label for run in runs], "length": LENGTH, "chunks": list(chunks.values())}


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
    }


def _responses(found: Changes) -> dict[str, Any]:
    before, after = zip(*found.pairs, strict=True)
    return {
        "before": [shorten(row["response"], LENGTH) for row in before],
        "after": [shorten(row["response"], LENGTH) for row in after],
        "was": [round(row["score"], 3) for row in before],
        "is": [round(row["score"], 3) for row in after],
    }
