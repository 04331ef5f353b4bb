"""Before a stage: whether the model's logits are those of its head, for losses that are built from the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from holdfast.api.rows import TokenRow
from holdfast.api.stage import Stage
from holdfast.engines.autocast import is_mixed
from holdfast.errors import ConfigError
from holdfast.models.generation import evaluating
from holdfast.models.head import whole_head
from holdfast.models.pictures import is_place

TOKENS = 16  # that are compared
EXACT, ROUNDED = 1e-3, 0.05  # relative distances: of float32, and of shorter types


@torch.no_grad()
def check_head(stage: Stage, row: TokenRow | Mapping[str, Any], method: str) -> None:
    """Compare :class:`~holdfast.losses.chunked.Head` with the model on a few tokens; every process calls this.

    Args:
        row: which tokens; of those that show pictures, the text.
        method: whose loss it is for, for messages.

    Raises:
        ConfigError: the logits are not those that head and last hidden state give.
    """
    model = stage.model
    batch = stage.collate([_first_text(row)])
    batch.pop("labels")
    with evaluating(model):
        outputs = model(**batch, output_hidden_states=True, use_cache=False)
    logits = outputs.logits[0, -TOKENS:]
    hidden = outputs.hidden_states[-1][0, -len(logits) :]
    try:
        head = whole_head(model)
    except ConfigError as error:
        raise ConfigError(f"method {method}: {error}") from None
    found = head.logits(hidden)
    types = {logits.dtype, hidden.dtype, head.weight.dtype}
    tolerance = EXACT if types <= {torch.float32, torch.float64} and not is_mixed(model) else ROUNDED
    if found.shape == logits.shape:
        distance = float((found - logits).norm() / logits.float().norm())
        if distance <= tolerance:
            return
        how = f"on {len(logits)} tokens they differ by {distance:.0%}"
    else:
        how = f"they are of {found.shape[-1]} and {logits.shape[-1]} tokens of the vocabulary"
    raise ConfigError(
        f"method {method}: its loss is computed from the last hidden states and the head, but the logits of "
        f"{type(model).__name__} are not scale * (hidden @ weight.T + bias) of its head, soft-capped or not: {how}. "
        "A loss on hidden states (gere, gere_l1, gere_l2) or next-token loss (replay, gere_ce, self_replay) would do"
    )


def _first_text(row: TokenRow | Mapping[str, Any]) -> TokenRow:
    """The first tokens of a row that are no places of pictures, which nothing may cut apart."""
    if set(row) - {"input_ids", "labels", "row"}:
        return row
    text = [place for place, token in enumerate(row["input_ids"]) if not is_place(token)][:TOKENS]
    return {key: [row[key][place] for place in text] for key in ("input_ids", "labels")}
