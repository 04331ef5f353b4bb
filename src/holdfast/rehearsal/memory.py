"""Episodic memory: a bounded random choice of train rows of the tasks so far."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch

from holdfast.api.rows import TokenRow


class Memory:
    """At most ``capacity`` rows.

    Args:
        policy: quota: every task so far keeps the same number of rows, chosen at random (the ring buffer of Chaudhry et
            al., 2019, with a random choice); reservoir: every row so far is kept with the same probability (Vitter,
            1985), so that a task holds rows in proportion to its size.

    Attributes:
        rows: ``input_ids`` and ``labels``.
        tasks: the stage that each row came from.
        places: the place of each row among the train rows of its stage.
        seen: rows that were offered so far.
    """

    def __init__(self, capacity: int, policy: Literal["quota", "reservoir"]):
        self.capacity = capacity
        self.policy = policy
        self.rows: list[TokenRow] = []
        self.tasks: list[int] = []
        self.places: list[int] = []
        self.seen = 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, stage: int, rows: Sequence[TokenRow], chance: random.Random) -> None:
        """Offer all train rows of a stage to the memory."""
        if self.policy == "quota":
            self._add_by_quota(stage, rows, chance)
        else:
            self._add_by_reservoir(stage, rows, chance)

    def sample(self, count: int, chance: random.Random) -> list[TokenRow]:
        """``count`` rows at random; none comes twice unless the memory holds fewer."""
        rounds, rest = divmod(count, len(self.rows))
        return self.rows * rounds + chance.sample(self.rows, rest)

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that :meth:`load_state` takes back."""
        return {
            "input_ids": _flat(self.rows, "input_ids"),
            "labels": _flat(self.rows, "labels"),
            "lengths": torch.tensor([len(row["input_ids"]) for row in self.rows], dtype=torch.int64),
            "tasks": self.tasks,
            "places": self.places,
            "seen": self.seen,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        lengths = state["lengths"].tolist()
        ids, labels = (torch.split(state[key], lengths) for key in ("input_ids", "labels"))
        self.rows = [{"input_ids": i.tolist(), "labels": y.tolist()} for i, y in zip(ids, labels, strict=True)]
        self.tasks, self.places, self.seen = list(state["tasks"]), list(state["places"]), state["seen"]

    def _add_by_quota(self, stage: int, rows: Sequence[TokenRow], chance: random.Random) -> None:
        stages = list(dict.fromkeys([*self.tasks, stage]))
        share, rest = divmod(self.capacity, len(stages))
        quota = {s: share + (position < rest) for position, s in enumerate(stages)}
        # A task's rows are in random order, so its first ones are a random choice, too.
        places = chance.sample(range(len(rows)), min(quota[stage], len(rows)))
        offered = [(stage, place, rows[place]) for place in places]
        chosen, count = [], dict.fromkeys(stages, 0)
        for entry in [*zip(self.tasks, self.places, self.rows, strict=True), *offered]:
            if count[entry[0]] < quota[entry[0]]:
                count[entry[0]] += 1
                chosen.append(entry)
        self.tasks, self.places = [stage for stage, _, _ in chosen], [place for _, place, _ in chosen]
        self.rows = [_bare(row) for _, _, row in chosen]
        self.seen += len(rows)

    def _add_by_reservoir(self, stage: int, rows: Sequence[TokenRow], chance: random.Random) -> None:
        for place, row in enumerate(rows):
            self.seen += 1
            if len(self.rows) < self.capacity:
                self.rows.append(_bare(row))
                self.tasks.append(stage)
                self.places.append(place)
            elif (slot := chance.randrange(self.seen)) < self.capacity:
                self.rows[slot], self.tasks[slot], self.places[slot] = _bare(row), stage, place


class Without(Sequence[TokenRow]):
    """Rows without those in some places; nothing is read before it is asked for."""

    def __init__(self, rows: Sequence[TokenRow], places: Collection[int]):
        left_out = frozenset(places)
        self._rows = rows
        self._places = [place for place in range(len(rows)) if place not in left_out] if left_out else range(len(rows))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        return self._rows[self._places[number]]


def _bare(row: TokenRow) -> TokenRow:
    """The row without further columns."""
    return {key: list(row[key]) for key in ("input_ids", "labels")}


def _flat(rows: list[TokenRow], key: str) -> torch.Tensor:
    """A column of all rows, one after another, int32 [tokens]."""
    return torch.tensor([token for row in rows for token in row[key]], dtype=torch.int32)
