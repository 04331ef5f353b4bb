"""In-context learning: no training; demonstrations from a task's train split precede each test prompt."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from holdfast.api.method import Method
from holdfast.api.task import Example, Task
from holdfast.config.section import Section

if TYPE_CHECKING:
    from holdfast.api.at_test import Evaluation


class InContext(Method):
    """In-context learning, no training (Brown et al., 2020, arXiv 2005.14165; TRACE's reference, arXiv 2310.06762).

    y ~ p_model(. | x_1, y_1, ..., x_k, y_k, x) for a test row x, with k train rows (x_i, y_i) of the same task, drawn
    for each test row. So the method knows the task of a test row.
    """

    name = "icl"
    schedule = "none"

    class Options(Section):
        shots: int = Field(6, ge=0, description="train rows to show before each test prompt; 0: as `frozen`")

    options: Options

    @property
    def lacks(self) -> str:
        shows = "puts demonstrations from a task's train split before each prompt: here are none"
        return shows if self.options.shots else ""

    def ask(self, evaluation: Evaluation, task: Task, example: Example, fits: Callable[[Example], bool]) -> Example:
        """The test row after its demonstrations, as further turns of its conversation; system turns stay first.

        ``shots`` train rows are drawn, no prompt twice and never the test row's. They are added one after another, each
        only if the whole still fits uncut.
        """
        chance = random.Random(f"{evaluation.seed}/{self.name}/{task.name}/{example.row}")
        shown: list[Example] = []
        for drawn in _drawn(task.train, example, self.options.shots, chance):
            if fits(_after([*shown, drawn], example)):
                shown.append(drawn)
        return _after(shown, example)


def _drawn(rows: Sequence[Example], example: Example, count: int, chance: random.Random) -> Iterator[Example]:
    """Up to ``count`` rows at random, with prompts that differ from one another and from the example's."""
    prompts = {_prompt(example)}
    moved: dict[int, int] = {}  # a shuffle that stops as soon as the caller does (Fisher and Yates)
    for first in range(len(rows)):
        if len(prompts) > count:
            return
        place = chance.randrange(first, len(rows))
        row = rows[moved.get(place, place)]
        moved[place] = moved.get(first, first)
        if _prompt(row) not in prompts:
            prompts.add(_prompt(row))
            yield row


def _prompt(example: Example) -> tuple[tuple[str | int, ...], ...]:
    return tuple((turn.role, turn.content, *turn.shown) for turn in example.turns[:-1])


def _after(shown: Sequence[Example], example: Example) -> Example:
    system = [turn for turn in example.turns if turn.role == "system"]
    turns = [turn for one in [*shown, example] for turn in one.turns if turn.role != "system"]
    return replace(example, turns=(*system, *turns))
