"""What a run's numbers depend on: fingerprints recorded when it begins and compared at every start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Inputs = dict[str, dict[str, str]]
"""Fingerprints by what they are of (``model``, ``tokenizer``, ``general ability wiki``) and by part, such as a file."""

ROWS = "number of rows"
"""The part that says how many texts or questions a measure of general ability has."""

LIBRARIES = ("holdfast", "torch", "transformers", "peft", "accelerate", "tokenizers")
"""The libraries that a run's numbers depend on most."""


def input_changes(recorded: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each part that differs.

    What only one side knows is left out: a run of an older version, or the commit of a model when the hub is far away.
    """
    lines = []
    for what in recorded:
        old, new = recorded[what], now.get(what)
        if not old or not new:
            continue
        for part in sorted(old.keys() | new.keys()):
            if old.get(part) != new.get(part):
                lines.append(f"{what}: {part}: {_short(old.get(part))} -> {_short(new.get(part))}")
    return lines


def data_changes(record: Mapping[str, Any], facts: Mapping[str, Any], data: str) -> list[str]:
    """A line for each difference of the stream and of its data, such as ``facts["tasks"]``."""
    lines = []
    if "stream" in record and record["stream"] != facts["stream"]:
        old, new = record["stream"]["version"], facts["stream"]["version"]
        lines.append(f"the prompts or metrics of its stream: version {old} -> {new}")
    for name in [*facts[data], *(name for name in record[data] if name not in facts[data])]:
        old, new = (side[data].get(name, {}).get("fingerprint") for side in (record, facts))
        if old != new:
            lines.append(f"the data of {data.removesuffix('s')} {name!r}: {_short(old)} -> {_short(new)}")
    return lines


def other_measures(
    record: Mapping[str, Any], facts: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]], data: str
) -> list[str]:
    """A line for each change after which one run's results do not fit together: other tasks, other numbers of rows."""
    old, new = record[data], facts[data]
    lines = [
        f"{data.removesuffix('s')} {name!r} is {'new' if name in new else 'gone'}" for name in old.keys() ^ new.keys()
    ]
    for name in old.keys() & new.keys():
        before, now = old[name].get("test"), new[name].get("test")
        if before != now:
            lines.append(f"task {name!r} has {now} test rows, not {before}")
    for what, parts in inputs.items():
        before, now = record.get("inputs", {}).get(what, {}).get(ROWS), parts.get(ROWS)
        if before != now and before is not None:
            lines.append(f"{what} has {now} rows, not {before}")
    return sorted(lines)


def version_changes(recorded: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """``torch 2.9.0 -> 2.10.0`` for each library of another version."""
    pairs = [(name, recorded.get(name), now.get(name)) for name in LIBRARIES]
    return [f"{name} {old} -> {new}" for name, old, new in pairs if old is not None and old != new]


def listed(lines: list[str]) -> str:
    """Lines of a message, below its first."""
    return "".join(f"\n  {line}" for line in lines)


def _short(fingerprint: str | None) -> str:
    return "(absent)" if fingerprint is None else fingerprint[:12]
