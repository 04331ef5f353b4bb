"""The contract of a scorer: how a test row is scored, and how a task's score follows from its rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from holdfast.api.task import Example
    from holdfast.config.evaluation import EvaluationConfig
    from holdfast.models.answers import AnswerCache

Record = Mapping[str, Any]
"""One test row that was answered: ``response``, ``answer`` and, where there are several right ones, ``answers``;
``prompt`` and, for a scorer that needs it, ``input``, the part of the prompt that it is about. Scored, it has ``score``
too."""


class Scorer:
    """A metric by name.

    A task's score is a function of a sum over its rows, whether or not it is their mean. So a bootstrap can draw rows
    and sum them again.

    Args:
        name: as it is called in a configuration.
        row: the score of one row, from its response and one right answer; of several right answers the best counts.
        about: what it accepts, in a line.
        version: raised with every change of what it accepts: a stream's version depends on it.
    """

    reads: Literal["response", "loss", "choices"] = "response"
    """What it needs of the model: a generated response, the loss of the answer, or the loss of each choice."""
    lower_is_better = False
    """Whether a lower score is better, as of a loss; then figures such as forgetting take differences the other way."""
    needs_input = False
    """Whether it compares with what a prompt is about, so that records must have ``input``."""
    needs_pictures = False
    """Whether it reads what a prompt's pictures are called, so that records must have ``pictures``, their names."""
    needs_columns = False
    """Whether it reads all columns of a row, so that records must have ``columns``."""
    needs = ""
    """What must be installed or configured, beyond holdfast's own dependencies."""
    totals_texts = False
    """Whether a task's score follows from the texts of its rows, not from their scores alone."""
    counts_end = True
    """Of choices, whether their likelihood includes the tokens that end an answer."""
    floor = False
    """Whether unrelated texts score well above 0, so that scores mean little without those before training."""

    def __init__(self, name: str, row: Callable[[str, str], float] | None = None, about: str = "", version: int = 1):
        self.name, self.about, self.version = name, about, version
        self._row = row

    @property
    def identity(self) -> str:
        """Differs between scorers that score differently; a stream's version depends on it."""
        return f"{self.name}/{self.version}"

    def configured(self, config: EvaluationConfig) -> Scorer:
        """The scorer with what the configuration says of it.

        Raises:
            ConfigError: the configuration lacks what it needs, or a library is not installed.
        """
        return self

    def row(self, record: Record) -> float:
        """The score of one row."""
        assert self._row is not None
        return max(self._row(record["response"], answer) for answer in answers(record))

    def rows(self, records: Sequence[Record], cache: AnswerCache | None = None) -> list[float]:
        """The scores of rows, in order.

        Args:
            cache: where a scorer that asks a model keeps its answers, so that they are not asked for again.
        """
        return [self.row(record) for record in records]

    def choose(self, record: Record) -> int:
        """The number of the choice that a model has made, where the scorer reads choices: the likeliest.

        Args:
            record: its ``choice_nats`` and ``choice_tokens`` are the negative log-likelihood of each of its
                ``choices``, in nats, and over how many tokens it was summed; where the scorer does not count the end,
                it has ``bare_choice_nats`` instead.
        """
        nats = record["choice_nats" if self.counts_end else "bare_choice_nats"]
        return nats.index(min(nats))

    def statistics(self, records: Sequence[Record]) -> NDArray[np.float64]:
        """What :meth:`total` needs of each scored row, to be summed over rows: ``[rows, k]``."""
        return np.array([[record["score"], 1.0] for record in records], dtype=float).reshape(-1, 2)

    def total(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The score of all rows from the sums ``[..., k]`` of their statistics: ``[...]``."""
        return sums[..., 0] / sums[..., 1]

    def corpus(self, records: Sequence[Record]) -> float:
        """The score of a task from its scored rows."""
        return float(self.total(self.statistics(records).sum(axis=0)))

    def refusal(self, example: Example, labels: Sequence[str] | None) -> str | None:
        """Why a test example cannot be scored, as far as that is known before it is answered."""
        return None


def answers(record: Record) -> Sequence[str]:
    """All right answers of a row."""
    return record.get("answers") or [record["answer"]]
