"""On which side a row falls, to be learned or to be tested: by what it asks, and the same every month."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.data.given import Given, GivenRow
from holdfast.errors import DataError

Side = Literal["train", "test"]

LEAST, MOST = 20, 500
"""Rows that are held out of a task at least, as far as half of its rows stay to be learned, and at most."""


@dataclass
class Divided:
    """New rows, each on its side.

    Attributes:
        known: how many rows were given before, and are left out.
        notes: what was done.
    """

    train: list[GivenRow]
    test: list[GivenRow]
    known: int = 0
    notes: list[str] = field(default_factory=list)


def divide(given: Given, sides: Mapping[str, Side], learned: Collection[str], share: float) -> Divided:
    """Leave out what was learned before, and put the rest on its sides.

    A prompt that an earlier task has tested or trained stays on its side. Of the others, those whose hashes are the
    smallest numbers are held out: ``share`` of all rows, but between :data:`LEAST` and :data:`MOST`, and no more than
    half. So a prompt falls on the same side however often it is asked. Where the data bring a test split, it is the
    test side, without what was trained before.

    Args:
        sides: of the prompts so far, by hash.
        learned: the hashes of the rows so far.
        share: of the rows to be held out.

    Returns:
        the new rows; both sides are empty where there is none.

    Raises:
        DataError: the rows are too few to be divided, or all of them must be held out.
    """
    rows, notes = dict(given.rows), list[str]()
    if "eval" in rows:
        validation = rows.pop("eval")
        if "test" in rows:
            notes.append(f"its {len(validation)} validation rows are not used")
        else:
            rows["test"] = validation
            notes.append("its validation split is the test split")
    given_rows = [row for split in rows.values() for row in split]
    notes += _repeated(given_rows)
    new = {split: [row for row in part if row.id not in learned] for split, part in rows.items()}
    divided = Divided([], [], len(given_rows) - sum(map(len, new.values())), notes)
    if not any(new.values()):
        return divided
    pool = [*new.get("train", []), *new.get("all", [])]
    tested = [row for row in new.get("test", []) if sides.get(row.prompt) != "train"]
    if left_out := len(new.get("test", [])) - len(tested):
        notes.append(f"{_rows(left_out)} of its test split ask what was learned before, and are left out")
    if tested:
        mine = {row.prompt for row in rows["test"]}
        divided.test = tested
        divided.train = [row for row in pool if row.prompt not in mine and sides.get(row.prompt) != "test"]
        for count, where in (
            (sum(row.prompt in mine for row in pool), "in its test split"),
            (sum(row.prompt not in mine and sides.get(row.prompt) == "test" for row in pool), "in an earlier test"),
        ):
            notes += [f"{_rows(count)} to learn ask what stands {where}, and are left out"] if count else []
        notes.append(f"its own test split of {_rows(len(tested))} is held out")
    else:
        _hold_out(divided, pool, sides, share)
        if not divided.test:  # the few new rows of an old file are tested with those that were held out of it
            divided.test = [row for row in given_rows if sides.get(row.prompt) == "test"]
    if not divided.train:
        raise DataError(
            f"{given.name}: nothing is left to learn: "
            + ("; ".join(notes) or f"all {_rows(len(pool))} ask what earlier tests ask")
        )
    if not divided.test:
        prompts = {row.prompt for row in pool}
        raise DataError(
            f"{given.name}: {_rows(len(pool))} with {len(prompts)} different prompts, of which "
            f"{len(prompts - sides.keys())} are new, are too few to hold a test out of; a prompt stays on its side, so "
            "two new ones at least, or a test split that asks something new, are needed"
        )
    return divided


def _hold_out(divided: Divided, pool: Sequence[GivenRow], sides: Mapping[str, Side], share: float) -> None:
    """Put the rows of data without a test split on their sides."""
    before = [row for row in pool if sides.get(row.prompt) == "test"]
    fresh = sorted((row for row in pool if row.prompt not in sides), key=lambda row: (row.number, row.prompt))
    most = min(max(round(share * len(pool)), LEAST), MOST, len(pool) // 2)
    held, count = {row.prompt for row in before}, len(before)
    for prompt, group in itertools.groupby(fresh, key=lambda row: row.prompt):
        size = len(list(group))
        if count + size > most:
            continue
        held.add(prompt)
        count += size
        if count == most:
            break
    divided.test = [row for row in pool if row.prompt in held]
    divided.train = [row for row in pool if row.prompt not in held]
    note = f"{len(divided.test)} of {_rows(len(pool))} are held out as the test, by a hash of what they ask"
    if before:
        note += f" ({len(before)} of them as in earlier tests)"
    if share * len(pool) < len(divided.test) and not before:
        note += f" ({LEAST} at least, but no more than half; a test file of your own, in a folder, lets all be learned)"
    divided.notes.append(note)


def _repeated(rows: Sequence[GivenRow]) -> list[str]:
    """A line about rows that say or ask what an earlier one does, if there are any."""
    told = len({(row.prompt, row.example.answer) for row in rows})
    duplicates, contradicting = len(rows) - told, told - len({row.prompt for row in rows})
    if not duplicates and not contradicting:
        return []
    return [f"duplicate rows: {duplicates}; rows that ask again with another answer: {contradicting}"]


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count != 1)}"
