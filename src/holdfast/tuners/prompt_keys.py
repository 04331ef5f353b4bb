"""Queries and keys: how a row chooses soft prompts, prefixes or adapters, although its task is not known.

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
from holdfast.models.seq2seq import reader


def prompt_mask(mask: Tensor, labels: Tensor) -> Tensor:
    """The tokens before each row's answer, which alone a choice may look at; as :func:`holdfast.api.rows.prompt`.

    Args:
        mask: [rows, seq], not zero where there is a token.
        labels: [rows, seq], -100 where not supervised.

    Returns:
        bool [rows, seq]; all tokens of a row in which nothing is supervised, or the first or second token already is.
    """
    tokens = mask.bool()
    before = tokens & ((labels != IGNORED).cumsum(1) == 0)
    return torch.where(before.sum(1, keepdim=True) > 1, before, tokens)


def batch_queries(model: Any, input_ids: Tensor, mask: Tensor) -> Tensor:
    """q(x) of the rows of a batch: the mean over a row's tokens of the model's last hidden state, after the final norm.

    Of a sequence-to-sequence model it is the encoder's.

    Soft prompts that a holdfast tuner puts before the input are left out. Other adapters take part unless the caller
    turns them off. There is no dropout and no gradient, and no random number is drawn.

    Args:
        model: a language model, or the PEFT model around it.
        input_ids: [rows, seq], padded on either side.
        mask: [rows, seq], not zero for the tokens that the query may look at.

    Returns:
        float32 [rows, hidden].
    """
    backbone = reader(model)
    seen = mask.to(torch.int64)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": seen, "use_cache": False}
    if "position_ids" in inspect.signature(backbone.forward).parameters:
        inputs["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
    with inference(backbone):
        hidden = backbone(**inputs).last_hidden_state.float()
        queries = (hidden * seen.unsqueeze(-1)).sum(1) / seen.sum(1, keepdim=True)
    return queries.clone()  # a tensor outside inference mode, which a loss may keep


def similarity(queries: Tensor, keys: Tensor) -> Tensor:
    """Cosines of queries [rows, hidden] and keys [keys, hidden]: float32 [rows, keys], with gradient to the keys."""
    return F.normalize(queries.float(), dim=-1) @ F.normalize(keys.float(), dim=-1).T


def nearest(cosines: Tensor, count: int, frequency: Tensor | None = None) -> Tensor:
    """The keys of smallest distance 1 - cosine (equation 3), or of smallest distance * frequency (equation 4).

    Args:
        cosines: [rows, keys].
        count: how many keys to choose, at most as many as there are.
        frequency: [keys] or [rows, keys], how often each was chosen so far, on any scale. If products are equal, as
            those of keys that were never chosen are, the nearest keys come first.

    Returns:
        int64 [rows, count], the best first.
    """
    distance = 1 - cosines.detach()
    order = distance.argsort(dim=1, stable=True)
    if frequency is not None:
        penalised = (distance * frequency).gather(1, order)
        order = order.gather(1, penalised.argsort(dim=1, stable=True))
    return order[:, :count]
