"""What a model makes of a prompt: one vector, whatever the prompt's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from holdfast.api.rows import Batch, TokenRow, prompt
from holdfast.tuners.prompt_keys import queries


def prompt_features(
    model: Any, rows: Sequence[TokenRow], collate: Callable[[Sequence[TokenRow]], Batch], batch_size: int
) -> Tensor:
    """The mean over a row's prompt of the model's last hidden states, after the final norm, without dropout.

    Equal prompts get equal vectors; up to float rounding these do not depend on ``batch_size`` or the other rows. A
    soft prompt that stands before the input is left out.

    Args:
        rows: at least one; ``input_ids`` and perhaps ``labels``; of a row without a prompt (a text) all tokens count.
        collate: turns rows into a batch on the model's device, padded on the right.
        batch_size: rows in one forward pass.

    Returns:
        float32 [rows, hidden], on the CPU.
    """
    prompts = [tuple(prompt(row)) for row in rows]
    different = sorted(dict.fromkeys(prompts), key=len, reverse=True)
    features: dict[tuple[int, ...], Tensor] = {}
    for start in range(0, len(different), batch_size):
        part = different[start : start + batch_size]
        batch = collate([{"input_ids": list(ids), "labels": [-100] * len(ids)} for ids in part])
        features |= zip(part, queries(model, batch["input_ids"], batch["attention_mask"]).cpu(), strict=True)
    return torch.stack([features[ids] for ids in prompts])
