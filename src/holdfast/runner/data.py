"""The data of a run: its stream, scorers and general abilities, loaded without importing torch."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.api.scorer import Scorer
from holdfast.api.task import General, Stream
from holdfast.config.run import RunConfig
from holdfast.data.load import load_scorers, load_stream
from holdfast.evaluation.abilities import load_general


@dataclass(frozen=True)
class RunData:
    """The rows of a run as text, and their scorers.

    Attributes:
        scorers: of the tasks' metrics, by name.
    """

    stream: Stream
    scorers: dict[str, Scorer]
    general: list[General]


def load_data(config: RunConfig) -> RunData:
    """Load the rows of every task and every measure of general ability.

    Raises:
        UserError: a name, a file, a row or an option of the stream or of the evaluation cannot be used.
    """
    stream = load_stream(config.stream, config.data, config.evaluation)
    scorers = load_scorers(stream, config.evaluation)
    return RunData(stream, scorers, load_general(config.evaluation.general, stream))
