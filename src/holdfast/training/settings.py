"""Whether an optimizer, a schedule and a data loader can be made of TrainingArguments: known before training."""

from __future__ import annotations

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from holdfast.engines.vectors import momentum
from holdfast.errors import ConfigError


def check_settings(arguments: TrainingArguments, steps: int, needs_momentum: bool = False) -> None:
    """Make the optimizer, the schedule and the data loader of a stage once, on a model of one small layer.

    Args:
        steps: optimizer steps of the stage.
        needs_momentum: whether a method reads the optimizer's moving average of the gradients.

    Raises:
        ConfigError: one of them cannot be made: a package is not installed, or a value is out of range; or the
            optimizer keeps no such average.
    """
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    key = "optimizer"
    try:
        made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        groups = options.pop("params", None) or options.pop("optimizer_dict", None) or list(model.parameters())
        optimizer = made(groups, **{name: value for name, value in options.items() if name != "model"})
        if needs_momentum:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            momentum(model, optimizer)
        key = "schedule"
        _schedule(arguments, optimizer, steps)
        key = "arguments"
        workers = arguments.dataloader_num_workers
        DataLoader(
            [0],  # type: ignore[arg-type]
            num_workers=workers,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            persistent_workers=arguments.dataloader_persistent_workers,
        )
    except ConfigError:
        raise
    except (ImportError, ValueError, TypeError, RuntimeError, AssertionError) as error:
        what = {"optimizer": arguments.optim, "schedule": arguments.lr_scheduler_type, "arguments": ""}[key]
        name = f" {getattr(what, 'value', what)!r}" if what else ""
        raise ConfigError(f"training.{key}:{name} cannot be used: {error}") from None


def _schedule(arguments: TrainingArguments, optimizer: torch.optim.Optimizer, steps: int) -> None:
    from transformers import get_scheduler

    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    schedule.get_last_lr()
