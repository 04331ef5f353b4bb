"""What a scorer is: how a test row is scored, and how a task's score comes from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from holdfast.api.task import Example
from holdfast.models.answers import AnswerCache

Record = Mapping[str, Any]
"""One test row that was answered: ``response``, ``answer`` and, where there are several right ones, ``answers``;
``prompt``, and ``input``, what the prompt is about, where that is not all of it. Scored, it has ``score`` too."""


class Scorer:
    """A metric by name.

    A task's score is a function of a sum over its rows, mean or not: so a bootstrap can draw rows and sum them again.

    Args:
        name: as it is called in a configuration.
        row: the score of one row, from its response and one right answer; of several right answers the best counts.
        about: what it accepts, in a line.
        version: raised with every change of what it accepts: a stream's version depends on it.
    """

    reads: Literal["response", "loss", "choices"] = "response"
    """What it needs of the model: a generated response, the loss of the answer, or the loss of each choice."""
    needs: str = ""
    """What must be installed or configured, beyond holdfast's own dependencies."""
    floor = False
    """Whether unrelated texts score well above 0, so that scores mean little without those before training."""

    def __init__(self, name: str, row: Callable[[str, str], float] | None = None, about: str = "", version: int = 1):
        self.name, self.about, self.version = name, about, version
        self._row = row

    @property
    def identity(self) -> str:
        """What tells it from another that scores differently; a stream's version depends on it."""
        return f"{self.name}/{self.version}"

    def row(self, record: Record) -> float:
        """The score of one row."""
        assert self._row is not None
        return max(self._row(record["response"], answer) for answer in answers(record))

    def rows(self, records: Sequence[Record], kept: AnswerCache | None = None) -> list[float]:
        """The scores of rows, in order.

        Args:
            kept: where a scorer that asks a model keeps its answers, so that they are not asked for again.
        """
        return [self.row(record) for record in records]

    def statistics(self, records: Sequence[Record]) -> NDArray[np.float64]:
        """What :meth:`total` needs of each scored row, to be summed over rows: ``[rows, k]``."""
        return np.array([[record["score"], 1.0] for record in records]).reshape(-1, 2)

    def total(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The score of all rows from the sums ``[..., k]`` of their statistics: ``[...]``."""
        return sums[..., 0] / sums[..., 1]

    def corpus(self, records: Sequence[Record]) -> float:
        """The score of a task from its scored rows."""
        return float(self.total(self.statistics(records).sum(axis=0)))

    def refusal(self, example: Example, labels: Sequence[str] | None) -> str | None:
        """Why a test example cannot be scored so, where that is known before it is answered."""
        return None


def answers(record: Record) -> Sequence[str]:
    """All right answers of a row."""
    return record.get("answers") or [record["answer"]]
