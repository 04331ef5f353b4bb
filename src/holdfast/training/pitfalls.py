"""What lets a user's own trainer train and learn little: told before it trains, or as soon as its loss shows it.

A run knows its rows, its model and its tuner, and has checked them by itself.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from holdfast.api.rows import IGNORED
from holdfast.api.stage import Stage
from holdfast.errors import ConfigError
from holdfast.models.head import base
from holdfast.training.batches import is_packed, is_token_batch
from holdfast.training.rates import adapter_rate_advice, batch_advice, full_rate_advice, warmup_advice
from holdfast.training.requirements import other_loss
from holdfast.training.steps import generations_of

logger = logging.getLogger("holdfast")

SAMPLE = 16
"""Rows that are looked at, evenly spread."""

LINES = 10
"""Lines of the log, at least, by which a loss is said not to have fallen."""


def check_pitfalls(trainer: Any, collate: Callable[[list[Any]], Any], stage: Stage) -> None:
    """Look at a trainer's model, settings and some of its rows; warn of what it would learn little by.

    Args:
        collate: makes a batch of rows of the dataset.

    Raises:
        ConfigError: nothing could be learned, or training would fail.
    """
    _check_model(trainer)
    written = generations_of(trainer)
    if written is not None and not written.batches:
        raise ConfigError(
            f"per_device_train_batch_size: answers are written to {written.prompts} prompts at once, and of the "
            f"{len(trainer.train_dataset)} rows no batch can be made, since TRL leaves out what does not fill one; a "
            "smaller batch, fewer gradient_accumulation_steps or steps_per_generation, or a higher num_generations, "
            "would do"
        )
    if stage.steps:
        _tell_of_steps(trainer, stage.steps, stage.rows_a_step // (1 if written is None else written.answers))
    next_token = isinstance(base(trainer.model), PreTrainedModel) and not other_loss(trainer.model)
    rows = _sample(trainer.train_dataset, collate) if next_token else []
    if rows:
        _tell_of_rate(trainer)
        _check_vocabulary(trainer, rows)
        _check_labels(rows, own_loss=_has_own_loss(trainer))
        _tell_of_begins(trainer, rows)
        _tell_of_ends(trainer, rows)


# --- the model and the settings ---


def _check_model(trainer: Any) -> None:
    model = trainer.model
    if any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        advice = "load the model with dtype=torch.float32 or torch.bfloat16"
        if trainer.args.fp16:
            raise ConfigError(
                f"model: the weights that are trained are float16, whose gradients fp16=True cannot unscale; {advice}, "
                "and fp16=True computes in float16 all the same"
            )
        logger.warning("model: the weights that are trained are float16, in which AdamW overflows; %s", advice)
    inner: Any = base(model)
    if inner is not model and (hasattr(inner, "get_base_model") or getattr(inner, "_hf_peft_config_loaded", False)):
        logger.warning(
            "model: an adapter was put onto a model that has one already: the new one alone is trained and saved, and "
            "it fits the model with the old one alone; merge the old one first (merge_and_unload), or go on with it "
            "(PeftModel.from_pretrained(..., is_trainable=True))"
        )


def _tell_of_steps(trainer: Any, steps: int, rows_a_step: int) -> None:
    """Of few optimizer steps, each of so many rows of the dataset."""
    own_schedule = trainer._holdfast.optimizer_is_given or trainer.lr_scheduler is not None
    if not own_schedule and (advice := warmup_advice(trainer.args, steps)):
        logger.warning("warmup_steps: %s; warmup_steps=0, or more epochs, would do", advice)
    if has_length(trainer.train_dataset) and (advice := batch_advice(len(trainer.train_dataset), rows_a_step, steps)):
        logger.warning("per_device_train_batch_size: %s; a smaller batch, or more epochs, would do", advice)


def _tell_of_rate(trainer: Any) -> None:
    """Of the next-token loss; preferences and rewards take lower rates."""
    args, model = trainer.args, trainer.model
    if "adamw" not in str(getattr(args.optim, "value", args.optim)) or trainer._holdfast.optimizer_is_given:
        return
    configs = list(getattr(model, "peft_config", {}).values())
    if configs and all(_is_low_rank(config) for config in configs):
        advice = adapter_rate_advice(args.learning_rate)
    elif not configs and all(p.requires_grad for p in model.parameters()):
        advice = full_rate_advice(args.learning_rate, sum(p.numel() for p in model.parameters()))
    else:
        advice = None
    if advice:
        logger.warning("learning_rate: %s", advice)


def _is_low_rank(config: Any) -> bool:
    """Whether an adapter begins as an update of zero by low rank; PiSSA and OLoRA begin with factors of the weights."""
    kind, init = getattr(config, "peft_type", None), getattr(config, "init_lora_weights", True)
    return getattr(kind, "value", kind) in ("LORA", "ADALORA") and isinstance(init, bool)


# --- some rows ---


@dataclass
class _Row:
    """A row as the model gets it, without padding."""

    ids: list[int]
    labels: list[int]

    @property
    def is_answer(self) -> bool:
        """Whether a prompt of it is not supervised, and what follows is."""
        return len(self.labels) > 1 and self.labels[1] == IGNORED and any(label != IGNORED for label in self.labels)

    @property
    def last_supervised(self) -> int:
        return next(label for label in reversed(self.labels) if label != IGNORED)


def _sample(dataset: Any, collate: Callable[[list[Any]], Any]) -> list[_Row]:
    """Some rows, each collated alone; none where rows cannot be had by number, or are none of the next-token loss. Of a
    row that cannot be collated training itself tells."""
    if not has_length(dataset) or not len(dataset) or not hasattr(dataset, "__getitem__"):
        return []
    places = sorted({place * len(dataset) // SAMPLE for place in range(SAMPLE)})
    state, of_numpy, rows = random.getstate(), np.random.get_state(), list[_Row]()
    try:
        with torch.random.fork_rng(devices=[]):  # a collator may draw random numbers
            for place in places:
                batch = collate([dataset[place]])
                if not is_token_batch(batch) or is_packed(batch) or len(batch["input_ids"]) != 1:
                    return []
                mask = batch.get("attention_mask")
                there = mask[0].bool() if mask is not None and mask.dim() == 2 else ...
                row = _Row(*(batch[key][0][there].tolist() for key in ("input_ids", "labels")))
                rows += [row] if row.ids else []
    except Exception:  # whatever a dataset or a collator may raise
        return []
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)
    return rows


def _check_vocabulary(trainer: Any, rows: Sequence[_Row]) -> None:
    known = getattr(base(trainer.model).get_input_embeddings(), "num_embeddings", None)
    pad = getattr(_tokenizer(trainer), "pad_token_id", None)
    written = {token for row in rows for token in row.ids}
    if pad is not None and trainer.args.per_device_train_batch_size > 1 and len({len(row.ids) for row in rows}) > 1:
        written.add(pad)
    beyond = sorted(written)
    if known is None or not (beyond := [token for token in beyond if token >= known]):
        return
    raise ConfigError(
        f"model: the tokenizer writes token {beyond[0]} ({_named(trainer, beyond[0])}), and the model has embeddings "
        f"for {known}; model.resize_token_embeddings(len(tokenizer)) makes room, or take the tokenizer of the model"
    )


def _has_own_loss(trainer: Any) -> bool:
    """Whether the user's own code computes the loss, which need not be that of the labels."""
    classes = (cls for cls in type(trainer).__mro__ if "compute_loss" in vars(cls))
    libraries = {cls.__module__.partition(".")[0] for cls in classes} <= {"holdfast", "transformers", "trl"}
    return trainer.compute_loss_func is not None or not libraries


def _check_labels(rows: Sequence[_Row], own_loss: bool) -> None:
    empty = sum(all(label == IGNORED for label in row.labels[1:]) for row in rows)
    what = (
        f"train_dataset: no token of {empty} of {len(rows)} rows that were looked at is supervised: their labels are "
        f"all {IGNORED}; look at what masks them (the data collator, completion_only_loss, assistant_only_loss, a "
        "max_length that cuts the answer off)"
    )
    if empty == len(rows) and not own_loss:
        raise ConfigError(what)
    if empty:
        logger.warning(what)


def _tell_of_begins(trainer: Any, rows: Sequence[_Row]) -> None:
    begin = getattr(_tokenizer(trainer), "bos_token_id", None)
    if begin is not None and all(row.ids[:2] == [begin, begin] for row in rows):
        logger.warning(
            "train_dataset: rows begin with %s twice: the chat template writes it, and the tokenizer adds it again; "
            "tokenize rendered chats with add_special_tokens=False",
            _named(trainer, begin),
        )


def _tell_of_ends(trainer: Any, rows: Sequence[_Row]) -> None:
    """Warn of rows that never teach where to stop, or that are cut."""
    tokenizer = _tokenizer(trainer)
    end, pad = (getattr(tokenizer, f"{name}_token_id", None) for name in ("eos", "pad"))
    if end is None:
        return
    ends = {end} | _generation_ends(trainer.model)
    longest = getattr(trainer.args, "max_length", None)
    if isinstance(longest, int) and not getattr(trainer.args, "packing", False):
        cut = sum(len(row.ids) >= longest and row.ids[-1] not in ends for row in rows)
        if cut:
            logger.warning(
                "max_length: %d of %d rows that were looked at fill its %d tokens without an end: what is beyond is "
                "cut, the answer first; a larger max_length, or shorter rows, would do",
                *(cut, len(rows), longest),
            )
            return
    if any(label in ends for row in rows for label in row.labels):
        return
    shown = _named(trainer, end)
    if end == pad and any(row.ids[-1] == end for row in rows):
        logger.warning(
            "tokenizer: %s pads and ends, and the data collator masks it as padding, so that the model never learns to "
            "stop; give it a padding token of its own, such as an unused or the unknown token (tokenizer.pad_token)",
            shown,
        )
    elif answers := [row for row in rows if row.is_answer]:
        logger.warning(
            "train_dataset: no answer ends with %s, at which generation stops, but with tokens such as %s, so that the "
            "model does not learn to stop; append it to each answer, or set the tokenizer's eos_token to what ends one",
            *(shown, _named(trainer, answers[0].last_supervised)),
        )


def _tokenizer(trainer: Any) -> Any:
    """The trainer's tokenizer, its processor's, or its collator's."""
    given = trainer.processing_class or getattr(trainer.data_collator, "tokenizer", None)
    return getattr(given, "tokenizer", given)


def _generation_ends(model: nn.Module) -> set[int]:
    """The tokens at which the model's own generation settings stop."""
    settings = getattr(base(model), "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


def _named(trainer: Any, token: int) -> str:
    """A token for people."""
    tokenizer = _tokenizer(trainer)
    return repr(tokenizer.convert_ids_to_tokens(token)) if hasattr(tokenizer, "convert_ids_to_tokens") else str(token)


# --- the loss ---


def tell_of_first_loss(trainer: Any, logs: Mapping[str, float]) -> None:
    """Warn if the loss of the task's rows is 0, or no number, in the first line of a stage's log."""
    loss, log = logs.get("term/task"), trainer.state.log_history
    if loss is None or hasattr(trainer, "reward_funcs") or any("term/task" in line for line in log):
        return
    if trainer._holdfast.extra_rows.instead:  # rows of a method have the places of the task's, whose loss is left out
        return
    if loss == 0 or not math.isfinite(loss):
        logger.warning(
            "the loss is %s from the first step on, so that nothing is learned: labels that are all %d, a float16 that "
            "overflows, or answers that the model knows by heart; look at a batch (trainer.get_train_dataloader())",
            *(f"{loss:g}", IGNORED),
        )


@contextlib.contextmanager
def watched(trainer: Any) -> Iterator[None]:
    """Around the training of a stage: warn at its end if the loss did not fall, and say what to lower if there is too
    little memory."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error) and not trainer._holdfast.is_run:
            args = trainer.args
            rows, passes = args.per_device_train_batch_size, args.gradient_accumulation_steps
            halved = f"per_device_train_batch_size={rows // 2} with gradient_accumulation_steps={2 * passes}, or "
            error.add_note(
                f"holdfast: out of memory with {rows} rows in a forward pass; {halved if rows > 1 else ''}"
                "gradient_checkpointing=True, or shorter rows, would need less"
            )
        raise
    state = trainer._holdfast
    if not state.interrupted and not hasattr(trainer, "reward_funcs"):  # a reward's loss says nothing by its level
        tell_of_no_fall(trainer.state.log_history, f"stage {state.stage_index} ({state.task_name})")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of an accelerator or of a CPU without enough memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def tell_of_no_fall(log: Sequence[Mapping[str, Any]], name: str) -> None:
    """Warn if the loss of a stage's rows was on average no lower in the second half of its log than in the first.

    Args:
        log: the lines of the stage's log.
        name: of the stage.
    """
    losses = [line["term/task"] for line in log if "term/task" in line]
    half = len(losses) // 2
    if len(losses) < LINES or not any(losses):
        return
    first, second = (sum(part) / len(part) for part in (losses[:half], losses[half:]))
    if second >= first:
        logger.warning(
            "%s: the loss did not fall: %.4g on average in the first half of the steps, %.4g in the second; a higher "
            "learning rate or more epochs would be next, or rows whose answers follow from what is asked",
            *(name, first, second),
        )
