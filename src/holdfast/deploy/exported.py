"""What an exported folder says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig
from holdfast.records.read import FinishedRun


@dataclass(frozen=True)
class Exported:
    """What a folder holds.

    Attributes:
        run: the run that it comes from.
        config: that run's configuration.
        stage: from 1.
        task: the stage's name.
        row: of the score matrix, measured after the stage.
        base: the pretrained model: a hub name, or the absolute path of a folder.
        tuner: the run's.
        kind: ``model``: a whole model; ``merged``: a model into which an adapter was merged; ``adapter``.
        chat: whether prompts are made by the tokenizer's chat template.
        seq2seq: whether it is a sequence-to-sequence model.
        sees: whether it reads pictures.
        dtype: the data type of a merged model's weights; None where nothing was merged.
        lacks: what of the run this folder cannot do, or not everywhere, a line each.
    """

    run: FinishedRun
    config: RunConfig
    stage: int
    task: str
    row: int
    base: str
    tuner: Tuner
    kind: str
    chat: bool
    seq2seq: bool
    sees: bool
    dtype: str | None
    lacks: list[str]

    @property
    def local_base(self) -> bool:
        return Path(self.base).is_absolute()

    @property
    def served_by_vllm(self) -> bool:
        """Whether vLLM serves its adapter beside the base model; of one that sees, those of the language model."""
        adapts = getattr(self.tuner.options, "target", "all")
        return self.tuner.served_by_vllm and (not self.sees or adapts == "language")
