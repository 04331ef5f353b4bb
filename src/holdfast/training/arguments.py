"""TrainingArguments of transformers from a configuration's training section."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from holdfast.engines.process import Process
from holdfast.engines.profiles import profile_of
from holdfast.errors import ConfigError, did_you_mean
from holdfast.records.trackers import TRACKERS
from holdfast.system.device import device_type, on_gpu

if TYPE_CHECKING:
    from holdfast.config.training import BaseTrainingConfig

GRADIENT_CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in inspect.signature(TrainingArguments).parameters
    else "gradient_checkpointing"
)
"""The name of this switch changed within transformers 5."""


def training_arguments(
    training: BaseTrainingConfig,
    checkpoints: Path,
    fields: dict[str, Any],
    make: type[TrainingArguments] = TrainingArguments,
) -> TrainingArguments:
    """TrainingArguments of a stage or a laboratory run.

    Args:
        checkpoints: folder of the checkpoints.
        fields: fields of TrainingArguments beside those that follow from the keys that all training shares; the
            user's ``training.arguments`` come over all of them.
        make: TrainingArguments, or TRL's subclass for a kind of stage.

    Raises:
        ConfigError: the batch cannot be divided among the processes, or transformers does not take a value.
    """
    micro, accumulation = micro_batches(training, Process.this().world)
    values = {
        "output_dir": str(checkpoints),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
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
        "report_to": others(training.report_to),
        "disable_tqdm": True,
        "use_cpu": not on_gpu(),
        "dataloader_pin_memory": device_type() not in ("cpu", "mps"),
        "ddp_find_unused_parameters": False,  # the continual trainer counts all of them as used
    }
    profile = profile_of(getattr(training, "engine", None))
    values |= profile.arguments()
    try:
        arguments = make(**values | fields | training.arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"training: {error}") from None
    profile.complete(arguments, training.precision == "bfloat16")
    return arguments


def others(report_to: list[str]) -> list[str]:
    """The trackers that transformers looks after: those that holdfast does not know itself.

    Raises:
        ConfigError: transformers does not know one either.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    names = [name for name in report_to if name not in TRACKERS and name != "all"]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            near = did_you_mean(name, [*TRACKERS, *INTEGRATION_TO_CALLBACK])
            raise ConfigError(f"training.report_to: there is no tracker {name!r}{near}")
    return names


def micro_batches(training: BaseTrainingConfig, world: int) -> tuple[int, int]:
    """Rows in one forward pass of one process, and how many such passes a process does in one optimizer step.

    Raises:
        ConfigError: ``world`` processes cannot divide the batch.
    """
    micro = training.micro_batch_size or max(1, training.batch_size // world)
    if training.batch_size % (micro * world):
        raise ConfigError(
            f"training.batch_size: {training.batch_size} rows do not make whole micro-batches of {micro} rows for each "
            f"of {world} processes; a multiple of {micro * world} would"
        )
    return micro, training.batch_size // (micro * world)


def check_arguments(arguments: dict[str, Any], reserved: dict[str, str]) -> None:
    """Check that ``training.arguments`` names fields of TrainingArguments which no key of the configuration sets.

    Args:
        reserved: the keys that set a field, by the field's name.

    Raises:
        ConfigError: a field does not exist, or a key sets it.
    """
    fields = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in arguments:
        if key in reserved:
            raise ConfigError(f"training.arguments.{key}: is set by the run; use {reserved[key]} instead")
        if key not in fields:
            raise ConfigError(f"training.arguments.{key}: unknown key{did_you_mean(key, fields)}")


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
"""Fields of TrainingArguments that keys of a run's configuration set."""
