"""Rewards: what a function of the user's gives the answers that a model writes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from holdfast.api.scorer import Record, Scorer
from holdfast.errors import ConfigError

if TYPE_CHECKING:
    from holdfast.models.answers import AnswerCache

PREFIX = "reward:"
"""A metric of this name and ``module:function`` is the function's reward."""


class Reward(Scorer):
    """The reward of a response, by a function that TRL's GRPOTrainer could call, too.

    It is called with ``prompts``, ``completions`` (texts, or lists of one message where the prompt is a list of
    messages), ``completion_ids`` (None: responses are texts here), and each column of the rows, all of them lists.
    """

    needs_columns = True

    def __init__(self, name: str):
        super().__init__(name, about="the mean of what a function gives")
        self.function = name.removeprefix(PREFIX)

    def rows(self, records: Sequence[Record], cache: AnswerCache | None = None) -> list[float]:
        given = rewards(
            reward_function(self.function),
            [record["columns"] for record in records],
            [record["response"] for record in records],
            completion_ids=[None] * len(records),
        )
        if len(given) != len(records) or not all(isinstance(value, int | float) for value in given):
            raise ConfigError(
                f"reward {self.function}: must return a number for each of the {len(records)} answers, not "
                f"{given!r:.80}"
            )
        return [float(value) for value in given]


def rewards(
    function: Callable[..., Any], rows: Sequence[Mapping[str, Any]], responses: Sequence[str], **more: Any
) -> Any:
    """What a function gives responses, called as TRL's GRPOTrainer calls it.

    Args:
        rows: all columns of each response's row.
        more: further arguments of the function.
    """
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "completion"))
    said = [
        [{"role": "assistant", "content": response}] if isinstance(row["prompt"], list) else response
        for response, row in zip(responses, rows, strict=True)
    ]
    columns = {name: [row.get(name) for row in rows] for name in names}
    return function(prompts=[row["prompt"] for row in rows], completions=said, **columns, **more)


def reward_function(name: str) -> Callable[..., Any]:
    """The function that ``module:function`` names; modules are also looked for in the current directory.

    Raises:
        ConfigError: there is none.
    """
    module, _, function = name.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ConfigError(f"reward: module {module!r} cannot be imported (looked in {here}, too): {error}") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"reward: module {module!r} has no function {function!r}")
    return found
