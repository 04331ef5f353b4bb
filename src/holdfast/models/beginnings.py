"""What sequences begin with in common, such as an instruction before each question, is read once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from holdfast.engines.pieces import is_divided
from holdfast.models.cache import cache_name, cache_of, has_plain_decoder
from holdfast.models.head import base, hidden_only

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

SAVED = 256
"""Tokens that must be saved for a common beginning to be read by itself."""


def alike(sequences: Sequence[list[int]], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Put sequences that begin alike beside each other.

    In the order of their tokens, a sequence belongs to the one before it if they have at least half of the shorter one
    in common. Sequences whose group would save too little belong together, and may still begin alike, too.

    Args:
        sequences: token ids, at least one each.
        lengths: of each with all that follows it.

    Returns:
        their numbers, group by group, the one with the longest first, and within a group the longest first; and of each
        sequence, by its number, the tokens that it begins with in common with its group: 0 where too little would be
        saved, and always less than all.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    groups: list[list[int]] = []
    for place, i in enumerate(order):
        one, before = sequences[i], sequences[order[place - 1]]
        if not place or 2 * _common(before, one) < min(len(before), len(one)):
            groups.append([])
        groups[-1].append(i)
    common = [0] * len(sequences)
    rest: list[int] = []
    found: list[list[int]] = []
    for group in groups:
        if not _note(group, sequences, common):
            rest += group
        else:
            found.append(group)
    if rest:
        _note(rest, sequences, common)
        found.append(rest)
    for group in found:
        group.sort(key=lambda i: -lengths[i])
    found.sort(key=lambda group: -lengths[group[0]])
    return [i for group in found for i in group], common


def _note(group: list[int], sequences: Sequence[list[int]], common: list[int]) -> bool:
    """Note what a group, in the order of its tokens, begins with in common, where that saves enough."""
    shared = min(_common(sequences[group[0]], sequences[group[-1]]), min(len(sequences[i]) for i in group) - 1)
    if saves := shared * (len(group) - 1) >= SAVED:
        for i in group:
            common[i] = shared
    return saves


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


class Beginnings:
    """Reads what sequences begin with in common before the sequences.

    Attributes:
        usable: whether the model can read on from there: it is a plain decoder whose layers all attend to all tokens
            before, in one piece, and whose positions mean the same in sequences of any length.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, pad_token_id: int):
        self.model, self.pad = model, pad_token_id
        self._read: tuple[list[tuple[int, ...]], Any] = ([], None)
        # the processes of a divided model must call it equally often
        self.usable = has_plain_decoder(model) and not is_divided(model) and _attends_to_all(base(model).config)

    def order(self, sequences: Sequence[list[int]], lengths: Sequence[int]) -> tuple[list[int], list[int]]:
        """As :func:`alike`; with a model that cannot read on, the longest first, and no beginnings."""
        if self.usable:
            return alike(sequences, lengths)
        return sorted(range(len(sequences)), key=lambda i: -lengths[i]), [0] * len(sequences)

    def continued(self, sequences: Sequence[Sequence[int]], common: Sequence[int], *, left: bool) -> dict[str, Any]:
        """Arguments of ``model.generate``: ``input_ids`` and ``attention_mask``, int64 [sequences, seq], and the cache
        of the first of these tokens.

        Args:
            common: the tokens of each sequence that lie in the cache: at least one, and not all.
            left: whether what follows them is padded on the left or on the right.
        """
        begun = [tuple(sequence[:n]) for sequence, n in zip(sequences, common, strict=True)]
        distinct = list(dict.fromkeys(begun))
        ids, mask = self.padded(distinct, left=True)
        if self._read[0] != distinct:
            arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": _places(mask), "use_cache": True}
            self._read = distinct, cache_of(self.model(**arguments, **hidden_only(self.model)))
        owners = torch.tensor([distinct.index(one) for one in begun], device=ids.device)
        cache = copy.deepcopy(self._read[1])
        cache.batch_select_indices(owners)
        rest, rest_mask = self.padded([s[n:] for s, n in zip(sequences, common, strict=True)], left=left)
        ids, mask = torch.cat([ids[owners], rest], dim=1), torch.cat([mask[owners], rest_mask], dim=1)
        return {"input_ids": ids, "attention_mask": mask, str(cache_name(base(self.model))): cache}

    def arguments(self, sequences: Sequence[Sequence[int]], common: Sequence[int], *, left: bool) -> dict[str, Any]:
        """Arguments of a forward pass that reads what follows the beginnings; without any, of one that reads all."""
        if not any(common):
            ids, mask = self.padded(sequences, left=left)
            return {"input_ids": ids, "attention_mask": mask, "position_ids": _places(mask)}
        found = self.continued(sequences, common, left=left)
        new = slice(max(common), None)
        places = _places(found["attention_mask"])[:, new]
        return found | {"input_ids": found["input_ids"][:, new], "position_ids": places, "use_cache": True}

    def padded(self, sequences: Sequence[Sequence[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both int64 [sequences, longest]."""
        width = max(map(len, sequences))
        ids, mask = [], []
        for tokens in sequences:
            fill = width - len(tokens)
            parts = [([self.pad] * fill, [0] * fill), (list(tokens), [1] * len(tokens))]
            (one, ones), (other, others) = parts if left else parts[::-1]
            ids.append([*one, *other])
            mask.append([*ones, *others])
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)


def _places(mask: Tensor) -> Tensor:
    """The place of each token in its sequence, without padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _attends_to_all(config: Any) -> bool:
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))]
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    return plain and not {"dynamic", "longrope"} & {*kinds}
