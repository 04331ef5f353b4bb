"""Query and keys: which soft prompts or adapters of a pool a row calls for, without knowing its task.

Wang et al., 2022, Learning to Prompt, arXiv 2112.08654, equations 3 and 4.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.api.rows import IGNORED
from holdfast.models.generation import inference
from holdfast.models.head import base


def prompt_mask(mask: Tensor, labels: Tensor) -> Tensor:
    """The tokens before each row's answer: what may be looked at to choose; see evaluation.at_test.prompt.

    Args:
        mask: [rows, seq], not zero where there is a token.
        labels: [rows, seq], -100 where not supervised.

    Returns:
        bool [rows, seq]; of a row of which nothing, or already the first or second token, is supervised, all tokens.
    """
    tokens = mask.bool()
    before = tokens & ((labels != IGNORED).cumsum(1) == 0)
    return torch.where(before.sum(1, keepdim=True) > 1, before, tokens)


def queries(model: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    """q(x): the mean over a row's tokens of the model's last hidden state, after the final norm.

    Soft prompts that a holdfast tuner puts before the input are left out; other adapters take part unless the caller
    turns them off. No dropout, no gradient, no random number.

    Args:
        model: a causal language model, or the PEFT model around it.
        input_ids: [rows, seq], padded on either side.
        mask: [rows, seq], not zero for the tokens that the query may see.

    Returns:
        float32 [rows, hidden].
    """
    backbone = base(model).base_model
    seen = mask.to(torch.int64)
    known = {"input_ids": input_ids, "attention_mask": seen, "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        known["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
    with inference(backbone):
        hidden = backbone(**known).last_hidden_state.float()
        found = (hidden * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True)
    return found.clone()  # an ordinary tensor again, which a loss may keep


def similarity(found: Tensor, keys: Tensor) -> Tensor:
    """Cosines of queries [rows, hidden] and keys [keys, hidden]: float32 [rows, keys], with gradient to the keys."""
    return F.normalize(found.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T


def nearest(cosines: Tensor, count: int, frequency: Tensor | None = None) -> Tensor:
    """The keys of smallest distance 1 - cosine (equation 3), or of smallest distance * frequency (equation 4).

    Args:
        cosines: [rows, keys].
        count: keys to choose, at most as many as there are.
        frequency: [keys] or [rows, keys], how often each was chosen so far, on any scale; of equal products, such as
            those of keys that were never chosen, the nearest come first.

    Returns:
        int64 [rows, count], the best first.
    """
    distance = 1 - cosines.detach()
    order = distance.argsort(dim=1, stable=True)
    if frequency is not None:
        penalised = (distance * frequency).gather(1, order)
        order = order.gather(1, penalised.argsort(dim=1, stable=True))
    return order[:, :count]
