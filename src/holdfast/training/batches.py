"""What the micro-batches of an optimizer step hold: rows and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.engines.process import Process


def list_row_numbers(rows: list[int]) -> str:
    return f"rows {', '.join(str(row + 1) for row in sorted(rows))}"


def is_token_batch(batch: Any) -> bool:
    """Whether a batch has a label for every token, as batches for the next-token loss do."""
    if not isinstance(batch, Mapping):
        return False
    ids, labels = batch.get("input_ids"), batch.get("labels")
    return isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape


def is_packed(batch: Any) -> bool:
    """Whether several rows of a token batch may share a sequence; each row counts its positions from 0."""
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def count_rows(batch: Any) -> int:
    """Number of rows in a batch of any kind; 0 where it does not say."""
    if is_token_batch(batch) and is_packed(batch):
        number = (batch["position_ids"] == 0).flatten().cumsum(0)
        return len(number[batch["labels"].flatten() != -100].unique())
    if isinstance(batch, Mapping):
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
        return len(batch.get("input_ids", tensors[0])) if tensors else 0
    return len(batch) if isinstance(batch, list | tuple) else 0


def count_tokens(batch: Any) -> int:
    """Number of tokens in a batch and in the extra rows beside it, without padding; 0 where it has no ``input_ids``."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return 0
    mask = batch.get("attention_mask")  # of four dimensions where it keeps packed sequences apart
    tokens = int(mask.sum()) if isinstance(mask, Tensor) and mask.dim() == 2 else batch["input_ids"].numel()
    return tokens + sum(count_tokens(extra) for extra in batch.get("rehearsal", {}).values())


def drop_repeated_rows(batches: list[Any], process: Process, first: int, size: int, total: int) -> list[int]:
    """Remove the rows that accelerate repeats to fill an epoch's last batches; labels are changed in place.

    A batch keeps one row where all of its rows are repeated, since the model needs an input; all labels of that row
    become -100, so that nothing is learned of it.

    Args:
        batches: this process's micro-batches of one step.
        first: number of the step's first micro-batch in its epoch.
        size: rows of a full micro-batch.
        total: rows of the dataset.

    Returns:
        how many rows of each batch count; empty where none is repeated.
    """
    if (first + len(batches)) * process.world * size <= total or not all(map(is_token_batch, batches)):
        return []
    sizes = []
    for number, batch in enumerate(batches):
        start = ((first + number) * process.world + process.rank) * size
        sizes.append(min(size, max(0, total - start)))
        batches[number] = {key: value[: max(sizes[-1], 1)] for key, value in batch.items()}
        if not sizes[-1]:
            batches[number]["labels"] = torch.full_like(batches[number]["labels"], -100)
    return sizes
