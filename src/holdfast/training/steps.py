"""Optimizer steps of a trainer's stage; TRL's trainers that write the answers they learn from repeat their rows."""

from __future__ import annotations

import math
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


def planned_steps(trainer: Any, rows_a_step: int) -> int | None:
    """Optimizer steps of a stage; None where the dataset does not say how long it is."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    if not has_length(trainer.train_dataset):
        return None
    steps = math.ceil(len(trainer.train_dataset) / rows_a_step)
    if (written := generations_of(trainer)) is not None:
        steps = math.ceil(written.batches / trainer.args.gradient_accumulation_steps)
    return math.ceil(trainer.args.num_train_epochs * steps)
