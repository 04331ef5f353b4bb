"""What an exported folder says of itself, and which tuners cannot be merged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
        kind: ``model``: a whole model; ``merged``: a model into which an adapter was merged; ``adapter``.
        chat: whether prompts are made by the tokenizer's chat template.
        lacks: a line each on what of the run this folder cannot do, or not everywhere.
    """

    run: FinishedRun
    config: RunConfig
    stage: int
    task: str
    row: int
    base: str
    kind: str
    chat: bool
    lacks: list[str]

    @property
    def local_base(self) -> bool:
        return Path(self.base).is_absolute()


PROMPTS = "its trained prompts stand before the input and change no weight"
NOT_MERGED = {
    "adapter": "a non-linearity stands between its two matrices and the model's",
    "moe_lora": "its router weighs the experts anew for each token",
    "prompt": PROMPTS,
    "p_tuning": PROMPTS,
    "prefix": PROMPTS,
    "prompt_pool": PROMPTS,
    "dual_prefix": PROMPTS,
}
"""Tuners of which no one model of the same architecture can be made, with the reason."""
