"""What a step's micro-batches hold: rows and tokens."""

from __future__ import annotations

from typing import Any


def list_row_numbers(rows: list[int]) -> str:
    return f"rows {', '.join(str(row + 1) for row in sorted(rows))}"


def count_rows(batch: Any) -> int:
    """Rows of a micro-batch; several may stand in one sequence, each counting its positions from 0."""
    if not is_packed(batch):
        return len(batch["input_ids"])
    number = (batch["position_ids"] == 0).flatten().cumsum(0)
    return len(number[batch["labels"].flatten() != -100].unique())


def is_packed(batch: Any) -> bool:
    return batch.get("position_ids") is not None and batch.get("attention_mask") is None


def count_tokens(batch: Any) -> int:
    """Tokens of a micro-batch and of the rehearsal rows beside it, without padding."""
    mask = batch.get("attention_mask")  # of four dimensions where it keeps packed sequences apart
    own = int(mask.sum()) if mask is not None and mask.dim() == 2 else batch["input_ids"].numel()
    return own + sum(count_tokens(extra) for extra in batch.get("rehearsal", {}).values())
