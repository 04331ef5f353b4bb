"""The task's forward pass with the head on supervised tokens alone, where Trainer computes the loss as always."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from holdfast.models.head import base
from holdfast.models.supervised import Gathered, OneRow, head_on, keeps_its_loss


def may_gather(trainer: Any, compute_loss: Callable[..., Any]) -> bool:
    """Whether a trainer's loss needs logits of supervised tokens alone; all processes call this together.

    It does where transformers' own Trainer computes it from the labels, smoothed or not. A loss of the user's own,
    fused kernels and compiled models keep the logits of every position.

    Args:
        compute_loss: that of the trainer's class, without methods.
    """
    args = trainer.args
    if getattr(compute_loss, "__module__", "") != "transformers.trainer" or trainer.compute_loss_func is not None:
        return False
    if args.torch_compile or args.use_liger_kernel or args.n_gpu > 1:
        return False
    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        return False
    if trainer.label_smoother is not None:  # Trainer shifts the labels of models by their name
        name = type(base(trainer.model)).__name__
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            return False
    return keeps_its_loss(trainer.model)


@contextmanager
def task_pass(model: Any, batch: Any, rows: int | None, gather: bool) -> Iterator[tuple[Any, Gathered]]:
    """The batch for the task's forward pass, and whether the head is then applied to supervised tokens alone.

    Args:
        model: the trainer's, not wrapped by an engine.
        batch: task rows, and after them the extra rows that share the pass, all with labels.
        rows: how many are the task's; the others have no part in the loss. None: all.
        gather: whether the head may be applied to supervised tokens alone.
    """
    if gather:
        row, batch = OneRow.of(batch["labels"], rows), copy(batch)
        batch["labels"] = row.labels
        with head_on(model, row) as gathered:
            yield batch, gathered
        return
    if rows is not None:
        batch = copy(batch)
        batch["labels"] = batch["labels"].clone()
        batch["labels"][rows:] = -100
    yield batch, Gathered()
