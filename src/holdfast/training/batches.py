"""What the micro-batches of an optimizer step hold: rows and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from holdfast.api.rows import IGNORED
from holdfast.engines.process import Process


def list_row_numbers(rows: list[int]) -> str:
    return f"rows {', '.join(str(row + 1) for row in sorted(rows))}"


def is_token_batch(batch: Any) -> bool:
    """Whether a batch has a label for every token, as batches for the next-token loss do."""
    if not isinstance(batch, Mapping):
        return False
    ids, labels = batch.get("input_ids"), batch.get("labels")
    return isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape


MEDIA = ("pixel_", "image", "video", "audio", "input_image", "input_audio", "input_features", "input_values")
"""How the names of a batch's columns begin that hold pictures or sounds beside its tokens."""


def media(batch: Any) -> str | None:
    """The first column of a batch that holds pictures or sounds beside its tokens; None where none does."""
    columns = batch.items() if isinstance(batch, Mapping) else ()
    return next((key for key, value in columns if str(key).startswith(MEDIA) and value is not None), None)


def tokens_alone(column: str) -> str:
    """Why a method that stores or reads rows as tokens cannot do so where they have a column of pictures or sounds."""
    return (
        f"its rows have {column}, and a method that stores rows, or goes through the model with them, does so with "
        "their tokens alone; `holdfast run` keeps pictures, or a method that needs no rows, such as si, would do"
    )


def is_preference_batch(batch: Any) -> bool:
    """Whether a batch has completions that are judged, as TRL's DPOTrainer and KTOTrainer make them."""
    ids, mask = (batch.get(key) for key in ("input_ids", "completion_mask")) if isinstance(batch, Mapping) else (0, 0)
    return isinstance(ids, Tensor) and isinstance(mask, Tensor) and ids.shape == mask.shape


def good_answers(batch: Any) -> Any:
    """The token batch of the completions that a batch of preferences calls good, in the batch's order.

    TRL's DPOTrainer has the chosen completions in the first half of a batch, and the rejected ones after them. Its
    KTOTrainer says of each completion whether it is good (``label``).

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, int64 [good, seq]; a batch of another kind as it is.
    """
    if is_token_batch(batch) or not is_preference_batch(batch):
        return batch
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    good = batch["label"].bool() if "label" in batch else torch.arange(len(ids)) < len(ids) // 2
    labels = ids.masked_fill(~mask, IGNORED)
    return {"input_ids": ids[good], "attention_mask": batch["attention_mask"][good], "labels": labels[good]}


def is_packed(batch: Any) -> bool:
    """Whether several rows of a token batch may share a sequence; each row counts its positions from 0."""
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def count_rows(batch: Any, most: int | None = None) -> int:
    """Number of rows in a batch of any kind; 0 where it does not say.

    Args:
        most: rows of a micro-batch. TRL's GRPOTrainer is given a list of the rows of several micro-batches.
    """
    if is_token_batch(batch) and is_packed(batch):
        number = (batch["position_ids"] == 0).flatten().cumsum(0)
        return len(number[batch["labels"].flatten() != -100].unique())
    if is_preference_batch(batch) and "label" not in batch:
        return len(batch["input_ids"]) // 2  # a chosen and a rejected completion a row
    if isinstance(batch, Mapping):
        tensors = [value for value in batch.values() if isinstance(value, Tensor) and value.dim()]
        return len(batch.get("input_ids", tensors[0])) if tensors else 0
    rows = len(batch) if isinstance(batch, list | tuple) else 0
    return rows if most is None else min(rows, most)


def count_tokens(batch: Any) -> int:
    """Number of tokens in a batch and in the extra rows beside it, without padding; 0 where it has no ``input_ids``."""
    if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
        return 0
    mask = batch.get("attention_mask")  # of four dimensions where it keeps packed sequences apart
    tokens = int(mask.sum()) if isinstance(mask, Tensor) and mask.dim() == 2 else batch["input_ids"].numel()
    if "encoder_mask" in batch:
        tokens += int(batch["encoder_mask"].sum())
    return tokens + sum(count_tokens(extra) for extra in batch.get("rehearsal", {}).values())


def count_written(batch: Any) -> int:
    """Number of tokens in a batch of answers that the model wrote while it trains, as TRL's GRPOTrainer has them."""
    masks = [batch.get(f"{part}_mask") for part in ("prompt", "completion")] if isinstance(batch, Mapping) else [None]
    return sum(int(mask.sum()) for mask in masks if mask is not None) if None not in masks else 0


def drop_repeated_rows(batches: list[Any], process: Process, first: int, size: int, total: int) -> list[int]:
    """Remove the rows that accelerate repeats to fill an epoch's last batches; labels are changed in place.

    A batch keeps one row where all of its rows are repeated, since the model needs an input; all labels of that row
    become -100, so that nothing is learned of it. So do those of every repeated row beside pictures, and it stays.

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
        if media(batch):  # whose parts do not say which row they belong to
            batches[number] = {**batch, "labels": batch["labels"].clone()}
        else:
            batches[number] = {key: value[: max(sizes[-1], 1)] for key, value in batch.items()}
        batches[number]["labels"][sizes[-1] :] = -100
    return sizes
