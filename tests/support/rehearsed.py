"""Stages of rehearsal, one after another, of rows that differ."""

from __future__ import annotations

from typing import Any

from support.tiny import tiny_model, tiny_rows, tiny_tokenizer
from support.trained import trained


def stages(method: Any, *, folder: Any, rows: int = 12, count: int = 2, model: Any = None, **given: Any) -> Any:
    """Train stages of so many rows and return the last trainer.

    Args:
        given: for the trainer, and ``args`` for its TrainingArguments.
    """
    model = model or tiny_model()
    for index in range(1, count + 1):
        data = [row | {"row": i} for i, row in enumerate(tiny_rows(rows, seed=index))]
        own = {"rows": data, "model": model, "method": method, "processing_class": tiny_tokenizer()}
        trainer = trained(folder, **own, stage_index=index, **given)
    return trainer


def two_stages(folder, method, **args):
    """Two stages without a limit of the gradient's norm."""
    return stages(method, folder=folder, args={"max_grad_norm": 0} | args)
