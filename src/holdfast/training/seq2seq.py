"""A Trainer of a sequence-to-sequence model: its batches become rows, and its loss is the next-token loss of these."""

from __future__ import annotations

from copy import copy
from typing import Any

from holdfast.errors import ConfigError
from holdfast.models.seq2seq import callable_as_causal, native_rows, next_token_loss, reads_apart, start_of


def take_seq2seq(trainer: Any) -> None:
    """Let a sequence-to-sequence model be called with rows (:mod:`holdfast.models.seq2seq`), and take their loss.

    Raises:
        ConfigError: the trainer has another loss.
    """
    if not reads_apart(trainer.model):
        return
    for key, other in (("label_smoothing_factor", "label_smoother"), ("compute_loss_func", "compute_loss_func")):
        if getattr(trainer, other, None) is not None:
            raise ConfigError(f"{key}: a sequence-to-sequence model learns by next-token loss alone; leave it out")
    trainer.compute_loss_func = next_token_loss
    callable_as_causal(trainer.model)


def as_rows(trainer: Any, batch: Any) -> Any:
    """A batch, in which a sequence-to-sequence model's rows are as methods see them."""
    pad = trainer._holdfast.pad.pad_token_id if "_holdfast" in vars(trainer) else 0
    return native_rows(batch, start_of(trainer.model), pad)


def to_pass(trainer: Any, inputs: Any) -> Any:
    """What the model gets of a micro-batch: a copy, from which Trainer takes the labels for :func:`next_token_loss`."""
    return copy(inputs) if reads_apart(trainer.model) else inputs
