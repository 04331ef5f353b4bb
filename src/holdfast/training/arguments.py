"""TrainingArguments of transformers from a configuration's training section."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from holdfast.engines import zero
from holdfast.engines.profiles import DEEPSPEED
from holdfast.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from holdfast.config.training import TrainingConfig
    from holdfast.lab.config import OptimizerConfig

GRADIENT_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    else "gradient_checkpointing"
)
"""The name of this switch changed within transformers 5."""


def training_arguments(training: TrainingConfig | OptimizerConfig, checkpoints: Path, **own: Any) -> TrainingArguments:
    """What runs and laboratory runs have in common, what is their ``own``, and over these the user's `arguments`.

    Raises:
        ConfigError: a value is not one that transformers takes.
    """
    values = {
        "output_dir": str(checkpoints),
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "bf16": training.precision == "bfloat16",
        GRADIENT_CHECKPOINTING: training.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": training.save_every,
        "save_total_limit": 1,
        "logging_steps": training.log_every,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    profile = DEEPSPEED.get(getattr(training, "engine", None) or "")
    if profile is not None:
        zero.begin()
        values |= {"deepspeed": profile, "use_cpu": False, "accelerator_config": {"use_configured_state": True}}
        if not torch.cuda.is_available():
            values["bf16"] = False  # TrainingArguments would not believe that a CPU can
    try:
        arguments = TrainingArguments(**values | own | training.arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {error}") from None
    if profile is not None:
        zero.keep_float32(arguments)
        arguments.bf16 = training.precision == "bfloat16"
    return arguments


def check_arguments(arguments: dict[str, Any], taken: dict[str, str]) -> None:
    """ConfigError if training.arguments names a field that TrainingArguments lacks or that another key stands for.

    Args:
        taken: the keys that stand for fields.
    """
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in arguments:
        if key in taken:
            raise ConfigError(f"training.arguments.{key}: is set by the run; use {taken[key]} instead")
        if key not in known:
            raise ConfigError(f"training.arguments.{key}: unknown key{did_you_mean(key, known)}")


RESERVED = {
    "output_dir": "output",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size and training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup",
    "weight_decay": "training.weight_decay",
    "optim": "training.optimizer",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "seed": "seed",
    "data_seed": "seed",
    "save_steps": "training.save_every",
    "save_strategy": "training.save_every",
    "save_total_limit": "training.save_every",
    "logging_steps": "training.log_every",
    "logging_strategy": "training.log_every",
    "remove_unused_columns": "data",
}
