"""The data of a run: its stream, scorers and general abilities, loaded without importing torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from holdfast.api.scorer import Scorer
from holdfast.api.task import General, Stream
from holdfast.config.run import RunConfig, placed
from holdfast.data.load import load_scorers, load_stream
from holdfast.errors import ConfigError
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
    config = placed(config)
    return run_data(load_stream(config.stream, config.data, config.evaluation, config.output), config)


def run_data(stream: Stream, config: RunConfig) -> RunData:
    """The data of a run whose stream is loaded; raises as :func:`load_data`."""
    scorers = load_scorers(stream, config.evaluation)
    if config.evaluation.responses == "scores":
        refuse_texts(scorers)
    return RunData(stream, scorers, load_general(config.evaluation.general, stream))


def refuse_texts(scorers: Mapping[str, Scorer]) -> None:
    """Raise ConfigError for metrics that need the texts of all rows, where none are kept."""
    if needing := [name for name, scorer in scorers.items() if scorer.totals_texts]:
        raise ConfigError(
            f"metric {needing[0]}: is computed from the texts of all test rows, and evaluation.responses: scores keeps "
            "none; accuracy, rouge_l or loss would do"
        )
