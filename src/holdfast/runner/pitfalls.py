"""What lets a run train and learn little: told before it trains, each with what would do."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import TrainingArguments

from holdfast.api.task import Example, Task
from holdfast.data.arrow_rows import ArrowRows
from holdfast.data.encode import Encoder
from holdfast.data.tally import Seen
from holdfast.models.weights import shapes
from holdfast.runner.plan import PlannedStage
from holdfast.runner.setup import Setup
from holdfast.training.rates import (
    LARGEST,
    adapter_rate_advice,
    batch_advice,
    full_rate_advice,
    pretraining_rate,
    warmup_advice,
)
from holdfast.tuners.full import Full
from holdfast.tuners.lora import MOVES_BASE, Lora

logger = logging.getLogger("holdfast")

WHOLE = {"accuracy", "trace_exact_match", "o_lora_exact_match", "tree_lora_prefix_match", "trace_prefix_match"}
"""Metrics by which a response is right only if all of the answer stands in it."""


ENDS = 2
"""Tokens of an answer's end, at most."""


def warn_of_pitfalls(setup: Setup) -> None:
    """Warn of a learning rate and of rows with which the stages that are left would learn little."""
    left = [task for stage in setup.stages if stage.index not in setup.past.finished for task in stage.tasks]
    alike = left and all(task.kind == "sft" for task in left)  # preferences and rewards take lower rates
    if alike and (advice := _of_rate(setup)):
        logger.warning("training.learning_rate: %s", advice)
    for task in left:
        for advice in _of_task(setup, task):
            logger.warning("task %r: %s", task.name, advice)


def warn_of_steps(setup: Setup, stage: PlannedStage, arguments: TrainingArguments) -> None:
    """Warn of a stage that makes too few steps."""
    steps, name = setup.steps[stage.index - 1], f"stage {stage.index} ({stage.name})"
    if advice := warmup_advice(arguments, steps):
        logger.warning("training.warmup: %s: %s; warmup=0, or more training.epochs, would do", name, advice)
    rows, batch = sum(len(setup.rows[task.name]) for task in stage.tasks), setup.config.training.batch_size
    if stage.tasks[0].kind == "sft" and (advice := batch_advice(rows, batch, steps)):
        more = f"a batch of {max(rows // 8, 1)}, or more training.epochs, would do"
        logger.warning("training.batch_size: %s: %s; %s", name, advice, more)


def _of_rate(setup: Setup) -> str | None:
    training, tuner = setup.config.training, setup.tuner
    if "adamw" not in training.optimizer:
        return None
    if isinstance(tuner, Full) and training.learning_rate > pretraining_rate(LARGEST):
        weights = sum(p.numel() for p in shapes(setup.config.model).parameters())
        return full_rate_advice(training.learning_rate, weights)
    if isinstance(tuner, Lora) and not MOVES_BASE.fullmatch(str(tuner.options.init_lora_weights)):
        return adapter_rate_advice(training.learning_rate)
    return None


def _of_task(setup: Setup, task: Task) -> Iterator[str]:
    encoder, model = setup.encoder, setup.config.model.name
    train = setup.rows[task.name]
    seen = train.seen if isinstance(train, ArrowRows) else Seen.of(task.train, encoder.sign_as_text)
    rows, turns = seen.conversations, seen.several
    if turns and setup.config.data.template == "auto" and not encoder.chat:
        yield (
            f"{turns} of {rows} rows have several turns, and the tokenizer of {model!r} has no chat template, as "
            "that of a base model: lines follow each other, and nothing says who speaks; an instruct model has such a "
            "template, and data.template=plain says that plain lines are meant"
        )
    if 2 * seen.signs > len(task.train):
        yield (
            f"{seen.signs} of {len(task.train)} rows hold {seen.sign!r}, which is read as letters and not as the "
            "control token: holdfast writes these tokens itself, so take them out, and give rendered chats as messages"
        )
    if task.kind == "sft" and rows and not encoder.cut_answers and not _has_end(encoder, setup.rows[task.name]):
        yield (
            "no answer has an end that the model could learn, so that it would not stop: "
            + (
                "the chat template writes no special token after an answer, or does not mark it as generated; "
                "data.template=plain ends each"
                if encoder.chat
                else "the tokenizer has no end token (eos_token)"
            )
        )
    limit = setup.limits.get(task.name)
    if limit is None or task.metric not in WHOLE:
        return
    if long := sum(_is_longer(encoder, row, limit) for row in task.test):
        yield (
            f"{long} of {len(task.test)} test answers are longer than the {limit} tokens of a response, so that none "
            "can be right; evaluation.max_new_tokens raises them"
        )


def _has_end(encoder: Encoder, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the end of some answer is supervised."""
    ends = set(encoder.stop_ids)
    return any(not ends.isdisjoint(row["labels"]) for row in rows)


def _is_longer(encoder: Encoder, row: Example, limit: int) -> bool:
    """Whether a test row's answer, and every other that is as good, has more tokens than a response."""
    if len(row.answer.encode()) <= limit or row.also_right:  # a token has a byte at least
        return False
    return encoder.answer_length(row) - ENDS > limit
