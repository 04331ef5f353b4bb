"""Trainers that write the answers they learn from: how often TRL gives them each row in an epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import has_length


@dataclass(frozen=True)
class Generations:
    """How a trainer's rows become its batches.

    Attributes:
        prompts: that answers are written to at once. Of the rows, what does not fill this number is left out.
        answers: to each of them, of which each is a row of a batch.
        batches: micro-batches of an epoch, of each process.
    """

    prompts: int
    answers: int
    batches: int


def generations_of(trainer: Any) -> Generations | None:
    """Those of TRL's GRPOTrainer, RLOOTrainer, DistillationTrainer and their like, as their sampler (RepeatSampler)
    has them; None where a row is given once an epoch, or the dataset does not say how long it is."""
    own = type(trainer)._get_train_sampler is not Trainer._get_train_sampler
    if not own or not has_length(trainer.train_dataset):
        return None
    sampler = trainer._get_train_sampler()
    if not all(hasattr(sampler, name) for name in ("batch_size", "mini_repeat_count", "repeat_count")):
        return None
    prompts, answers = sampler.batch_size, sampler.mini_repeat_count
    return Generations(prompts, answers, len(sampler) // (prompts * answers))
