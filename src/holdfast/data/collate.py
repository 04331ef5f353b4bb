"""Token sequences to batches: dynamic padding, packing, and joining two batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.api.rows import IGNORED
from holdfast.models.seq2seq import encoder_inputs


class Collator:
    """Pads rows on the right to the longest of them.

    Rows that `pack` made have ``position_ids``, which start again at 0 with every sequence. A batch of them has
    ``position_ids`` and no ``attention_mask``: from such positions transformers keeps each sequence's attention
    within it, with eager, SDPA and flex attention at any batch size and with flash attention in a batch of one row,
    where the model is called without a mask and without a cache (``use_cache=False``, as Trainer sets it).
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch of rows that all are packed or all are not.

        Returns:
            ``input_ids`` and ``labels`` (-100 where padded), int64 [batch, seq]; ``attention_mask`` (1 where not
            padded) or, for packed rows, ``position_ids``, int64 [batch, seq]; ``encoder_ids`` and ``encoder_mask``,
            int64 [batch, prompt], of rows with a prompt apart; ``row``, int64 [batch], where every row has it.
        """
        width = max(len(row["input_ids"]) for row in rows)
        spare = [width - len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], [[self.pad_token_id] * n for n in spare]),
            "labels": _padded([row["labels"] for row in rows], [[IGNORED] * n for n in spare]),
        }
        if "position_ids" in rows[0]:
            batch["position_ids"] = _padded([row["position_ids"] for row in rows], [range(n) for n in spare])
        else:
            batch["attention_mask"] = _padded([[1] * (width - n) for n in spare], [[0] * n for n in spare])
        if "encoder_ids" in rows[0]:
            batch |= encoder_inputs([row["encoder_ids"] for row in rows], self.pad_token_id)
        if all("row" in row for row in rows):
            batch["row"] = torch.tensor([row["row"] for row in rows])
        return batch


def pack(rows: Sequence[Mapping[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """Put rows together into sequences of at most ``max_length`` tokens: each into the first with room for it.

    The loss per token stays what it is without packing: positions start again with each row, its first label is -100,
    so that the row before it does not predict it, and `Collator` keeps attention within it.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, lists of int.
    """
    shortest = min((len(row["input_ids"]) for row in rows), default=0)
    packed: list[dict[str, Any]] = []
    unfilled: list[dict[str, Any]] = []
    for row in rows:
        length = len(row["input_ids"])
        assert length <= max_length, f"a row of {length} tokens is longer than {max_length}"
        sequence = next((s for s in unfilled if len(s["input_ids"]) + length <= max_length), None)
        if sequence is None:
            sequence = {"input_ids": [], "labels": [], "position_ids": []}
            packed.append(sequence)
            unfilled.append(sequence)
        sequence["input_ids"] += row["input_ids"]
        sequence["labels"] += [IGNORED, *row["labels"][1:]]
        sequence["position_ids"] += range(length)
        if len(sequence["input_ids"]) + shortest > max_length:
            unfilled = [s for s in unfilled if s is not sequence]
    return packed


def concat(a: Mapping[str, Tensor], b: Mapping[str, Tensor], pad_token_id: int) -> dict[str, Tensor]:
    """Join two batches along the batch dimension, padded on the right to the longer one.

    Keys that only one of them has are left out; if either is packed, so is the result.
    """
    if ("position_ids" in a) != ("position_ids" in b):
        a, b = _positioned(a), _positioned(b)
    joint = {key: (a[key], b[key]) for key in a if key in b}
    return {key: torch.cat(_of_one_width(key, parts, pad_token_id)) for key, parts in joint.items()}


def _padded(rows: Sequence[Sequence[int]], padding: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([[*row, *spare] for row, spare in zip(rows, padding, strict=True)], dtype=torch.int64)


def _positioned(batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Say where tokens stand by position, as packed batches do; of padding on the right, causal attention sees none."""
    ids = batch["input_ids"]
    return {"position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids), **batch}


FILL = {"labels": IGNORED, "attention_mask": 0, "encoder_mask": 0}
"""What fills the columns of short rows; those of tokens take padding."""


def _of_one_width(key: str, parts: Sequence[Tensor], pad_token_id: int) -> list[Tensor]:
    """The parts of a column, padded on the right to the longest of them."""
    return [_widened(key, part, max(p.shape[-1] for p in parts), pad_token_id) for part in parts]


def _widened(key: str, values: Tensor, width: int, pad_token_id: int) -> Tensor:
    if key == "row":
        return values
    spare = torch.arange(width - values.shape[1], device=values.device)
    if key != "position_ids":
        spare = torch.full_like(spare, FILL.get(key, pad_token_id))
    return torch.cat([values, spare.expand(len(values), -1)], dim=1)
