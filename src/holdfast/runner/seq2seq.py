"""What a run on a sequence-to-sequence model refuses before training, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from holdfast.api.method import Method
from holdfast.api.task import Task
from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig
from holdfast.errors import ConfigError
from holdfast.models.kinds import is_seq2seq
from holdfast.training.requirements import check_kind, kind_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_seq2seq(model_config: PretrainedConfig, config: RunConfig, methods: Sequence[Method], tuner: Tuner) -> None:
    """Check that a configuration can train a sequence-to-sequence model; a causal model passes.

    Raises:
        ConfigError: it cannot; the message names the key and the reason.
    """
    if not is_seq2seq(model_config):
        return
    what = kind_of(model_config)
    check_kind(model_config, [*methods, tuner])
    if config.data.packing:
        raise ConfigError(f"data.packing: {what}, which reads each prompt by itself; turn packing off")
    if config.training.engine == "fsdp2":
        raise ConfigError(
            f"training.engine: {what}, and fsdp2 gathers weights where the whole model is called, while an answer "
            "calls its encoder by itself; take ddp, or zero3 to divide the weights"
        )


def check_answers(model_config: PretrainedConfig, tasks: Sequence[Task]) -> None:
    """Check that the tasks of a run on a sequence-to-sequence model have prompts and answers to learn.

    Raises:
        ConfigError: one has not.
    """
    if not is_seq2seq(model_config):
        return
    what = kind_of(model_config)
    for task in tasks:
        if task.kind != "sft":
            raise ConfigError(f"task {task.name!r}: {what}, and TRL trains kind {task.kind} on causal models alone")
        if any(example.text is not None for example in chain(task.train, task.test)):
            raise ConfigError(
                f"task {task.name!r}: {what}, which learns answers to prompts, and the task's rows are texts; rows of "
                "prompt and answer would do"
            )
