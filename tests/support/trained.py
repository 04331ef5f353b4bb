"""A tiny model trained by a continual trainer."""

from __future__ import annotations

import torch
from transformers import TrainingArguments

from holdfast.data.collate import Collator
from holdfast.training.trainer import ContinualTrainer
from support.tiny import tiny_model, tiny_rows


def options(folder, **changes):
    values = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**values | changes)


def trained(folder, cls=ContinualTrainer, rows=None, model=None, args=None, stages=1, **extra):
    trainer = cls(
        model=model or tiny_model(),
        args=options(folder, **args or {}),
        train_dataset=rows or tiny_rows(18),
        data_collator=Collator(0),
        **extra,
    )
    for _ in range(stages):
        trainer.train()
    return trainer


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
