"""Episodic memory: a bounded choice of train rows of the tasks so far."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn

from holdfast.api.rows import IGNORED, TokenRow, bare
from holdfast.engines.saved import saved_tensor
from holdfast.errors import DataError
from holdfast.models.pictures import HIGHEST_PLACE, pictures_in
from holdfast.system.shapes import Count, of_shape

Policy = Literal["quota", "reservoir", "surprise", "loss", "diversity"]


class Memory:
    """At most ``capacity`` rows, whose pictures have at most so many bytes.

    Args:
        policy: quota: every task so far keeps the same number of rows, chosen at random (the ring buffer of Chaudhry et
            al., 2019, with a random choice); reservoir: every row so far is kept with the same probability (Vitter,
            1985), so that a task holds rows in proportion to its size; any other: as quota, but the rows that
            :meth:`add` is told to prefer.
        pictures: bytes of the files of all pictures that the rows show, at most; None: any number. Rows that are too
            many leave the memory: of the task whose pictures have most bytes, the one that its policy likes least, or
            with reservoir any one.

    Attributes:
        rows: ``input_ids`` and ``labels``, and ``encoder_ids`` of a sequence-to-sequence model.
        tasks: the stage that each row came from.
        places: the place of each row among the train rows of its stage.
        seen: rows that were offered so far.
    """

    def __init__(self, capacity: int, policy: Policy, pictures: int | None = None):
        self.capacity = capacity
        self.policy = policy
        self.pictures = pictures
        self.rows: list[TokenRow] = []
        self.tasks: list[int] = []
        self.places: list[int] = []
        self.seen = 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(
        self, stage: int, rows: Sequence[TokenRow], chance: random.Random, preferred: Sequence[int] | None = None
    ) -> None:
        """Offer all train rows of a stage to the memory.

        Args:
            preferred: places of rows, the best first, as many as the memory may hold or all; absent: random ones.
        """
        if self.policy == "reservoir":
            self._add_by_reservoir(stage, rows, chance)
        else:
            self._add_by_quota(stage, rows, chance, preferred)
        if self.pictures is not None:
            self._fit(self.pictures, chance)

    def sample(self, count: int, chance: random.Random) -> list[TokenRow]:
        """``count`` rows at random; none comes twice unless the memory holds fewer."""
        rounds, rest = divmod(count, len(self.rows))
        return self.rows * rounds + chance.sample(self.rows, rest)

    def check_pictures(self) -> None:
        """Look for the pictures that the rows show, which are kept in the data alone.

        Raises:
            DataError: the data of this process do not hold one of them.
        """
        for task, place, row in zip(self.tasks, self.places, self.rows, strict=True):
            try:
                pictures_in(row["input_ids"])
            except DataError as error:
                raise DataError(f"the memory's row {place + 1} of stage {task}: {error}") from None

    def state(self) -> dict[str, Any]:
        """Tensors and plain values that :meth:`load_state` takes back."""
        state = {
            "input_ids": _flat(self.rows, "input_ids"),
            "labels": _flat(self.rows, "labels"),
            "lengths": _lengths(self.rows, "input_ids"),
            "tasks": self.tasks,
            "places": self.places,
            "seen": self.seen,
        }
        if any("encoder_ids" in row for row in self.rows):
            state |= {
                "encoder_ids": _flat(self.rows, "encoder_ids"),
                "encoder_lengths": _lengths(self.rows, "encoder_ids"),
            }
        return state

    def load_state(self, state: dict[str, Any], model: nn.Module) -> None:
        """Restore what :meth:`state` returned.

        Args:
            model: the one that is to learn the rows.

        Raises:
            ValueError: it is no state of a memory, or its rows are not of this model's tokens.
        """
        lengths = saved_tensor(state, "lengths", None, kind="counts").tolist()
        tokens = saved_tensor(state, "input_ids", sum(lengths), kind="integers")
        if bool(((tokens < 0) & (tokens > HIGHEST_PLACE)).any()):
            raise ValueError("input_ids: must be tokens of the model, or places of its pictures")
        labels = state["labels"]
        if labels.shape != tokens.shape or not bool(((labels == tokens) | (labels == IGNORED)).all()):
            raise ValueError(f"labels: must be those of input_ids, or {IGNORED}")
        columns = {"input_ids": torch.split(tokens, lengths), "labels": torch.split(labels, lengths)}
        if "encoder_ids" in state:
            of_prompts = saved_tensor(state, "encoder_lengths", len(lengths), kind="counts").tolist()
            prompts = saved_tensor(state, "encoder_ids", sum(of_prompts), kind="counts")
            columns["encoder_ids"] = torch.split(prompts, of_prompts)
            tokens = torch.cat([tokens, prompts])
        embeddings = cast(Any, model).get_input_embeddings()
        size = getattr(embeddings, "num_embeddings", None) if len(tokens) else None
        if size is not None and int(tokens.max()) >= size:
            raise ValueError(f"input_ids: the model has {size} tokens, and {int(tokens.max())} is none of them")
        self.rows = [
            {key: part.tolist() for key, part in zip(columns, parts, strict=True)}
            for parts in zip(*columns.values(), strict=True)
        ]
        self.tasks, self.places = (list(of_shape(list[Count], state[key], key)) for key in ("tasks", "places"))
        self.seen = of_shape(Count, state["seen"], "seen")
        if not len(self.rows) == len(self.tasks) == len(self.places):
            raise ValueError("tasks and places: must have an entry for each row")

    def _add_by_quota(
        self, stage: int, rows: Sequence[TokenRow], chance: random.Random, preferred: Sequence[int] | None
    ) -> None:
        stages = list(dict.fromkeys([*self.tasks, stage]))
        share, rest = divmod(self.capacity, len(stages))
        quota = {s: share + (position < rest) for position, s in enumerate(stages)}
        # A task's rows are in random order, or the best first: its first ones are a random choice, or the best, too.
        if preferred is None:
            preferred = chance.sample(range(len(rows)), min(quota[stage], len(rows)))
        places = preferred[: quota[stage]]
        offered = [(stage, place, rows[place]) for place in places]
        chosen, count = [], dict.fromkeys(stages, 0)
        for entry in [*zip(self.tasks, self.places, self.rows, strict=True), *offered]:
            if count[entry[0]] < quota[entry[0]]:
                count[entry[0]] += 1
                chosen.append(entry)
        self.tasks, self.places = [stage for stage, _, _ in chosen], [place for _, place, _ in chosen]
        self.rows = [bare(row) for _, _, row in chosen]
        self.seen += len(rows)

    def _add_by_reservoir(self, stage: int, rows: Sequence[TokenRow], chance: random.Random) -> None:
        # After rows had to leave for their pictures' bytes, every row so far is as likely in a smaller memory.
        capacity = self.capacity if len(self.rows) == min(self.seen, self.capacity) else len(self.rows)
        for place, row in enumerate(rows):
            self.seen += 1
            if len(self.rows) < capacity:
                self.rows.append(bare(row))
                self.tasks.append(stage)
                self.places.append(place)
            elif (slot := chance.randrange(self.seen)) < capacity:
                self.rows[slot], self.tasks[slot], self.places[slot] = bare(row), stage, place

    def _fit(self, most: int, chance: random.Random) -> None:
        """Let rows go until the pictures of those that stay have at most so many bytes."""
        shown = [
            {picture.number: picture.size_of_file for picture in pictures_in(row["input_ids"])} for row in self.rows
        ]
        uses = Counter(number for row in shown for number in row)
        total = sum({number: size for row in shown for number, size in row.items()}.values())
        having = [slot for slot, row in enumerate(shown) if row]
        leaving: dict[int, list[int]] = {}  # of each task, or of all, the slots in the order in which rows stay
        for slot in chance.sample(having, len(having)) if self.policy == "reservoir" else having:
            leaving.setdefault(0 if self.policy == "reservoir" else self.tasks[slot], []).append(slot)
        of = {task: sum(sum(shown[slot].values()) for slot in slots) for task, slots in leaving.items()}
        gone = set[int]()
        while total > most:
            largest = max(of, key=lambda task: of[task])
            slot = leaving[largest].pop()
            gone.add(slot)
            of[largest] -= sum(shown[slot].values())
            uses.subtract(shown[slot].keys())
            total -= sum(size for number, size in shown[slot].items() if not uses[number])
        stay = [slot for slot in range(len(self.rows)) if slot not in gone]
        self.rows = [self.rows[slot] for slot in stay]
        self.tasks, self.places = [self.tasks[slot] for slot in stay], [self.places[slot] for slot in stay]


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


def _flat(rows: list[TokenRow], key: str) -> torch.Tensor:
    """A column of all rows, one after another, int32 [tokens], or int64 where places of pictures are among them."""
    tokens = torch.tensor([token for row in rows for token in row[key]], dtype=torch.int64)
    return tokens if bool((tokens <= HIGHEST_PLACE).any()) else tokens.to(torch.int32)


def _lengths(rows: list[TokenRow], key: str) -> torch.Tensor:
    """The tokens of a column in each row, int64 [rows]."""
    return torch.tensor([len(row[key]) for row in rows], dtype=torch.int64)
