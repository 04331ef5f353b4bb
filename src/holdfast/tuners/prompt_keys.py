"""Queries and keys: how a row chooses soft prompts, prefixes or adapters, although its task is not known.

Wang et al., 2022, Learning to Prompt, arXiv 2112.08654, equations 3 and 4.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
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


def before_answer(ids: Tensor, mask: Tensor | None, labels: Tensor | None, lengths: Mapping[int, int]) -> Tensor:
    """The tokens of each row that a choice may look at: those before its answer.

    Args:
        ids: [rows, seq].
        mask: [rows, seq], not zero where there is a token; None: everywhere.
        labels: [rows, seq]; of a row in which something is supervised, they say where its answer begins.
        lengths: of the other rows, how many tokens stand before the answer, by :func:`row_fingerprint`; where it is
            not known, all of a row's tokens count.

    Returns:
        bool [rows, seq].
    """
    mask = torch.ones_like(ids) if mask is None else mask
    labels = torch.full_like(ids, IGNORED) if labels is None else labels
    labelled, seen = (labels != IGNORED).any(1), prompt_mask(mask, labels)
    if lengths and not labelled.all():
        tokens = mask.bool()
        rows = [row[is_token].tolist() for row, is_token in zip(ids, tokens, strict=True)]
        known = [lengths.get(row_fingerprint(row), len(row)) for row in rows]
        told = tokens & (tokens.cumsum(1) <= torch.tensor(known, device=ids.device)[:, None])
        seen = torch.where(labelled[:, None], seen, told)
    return seen


def row_fingerprint(ids: Sequence[int]) -> int:
    """A hash of 64 bits of a sequence of tokens, the same on every machine."""
    digest = hashlib.blake2b(np.asarray(ids, dtype="<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


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
