"""Negative log-likelihood of sequences under a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from holdfast.engines.pieces import is_divided
from holdfast.models.batches import Size, by_batch, by_tokens
from holdfast.models.beginnings import Beginnings
from holdfast.models.cache import cache_name, cache_of, has_plain_decoder
from holdfast.models.generation import inference
from holdfast.models.head import base, hidden_only
from holdfast.models.seq2seq import encoder_inputs, reads_apart
from holdfast.models.supervised import OneRow, by_chunk

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Pair = tuple[float, int]
"""Nats and supervised tokens of a sequence."""

LEAST = 8
"""Tokens that sequences must begin with in common for these to be read once."""


def token_losses(
    model: PreTrainedModel | PeftModel,
    rows: Sequence[Mapping[str, Any]],
    *,
    batch_size: int,
    pad_token_id: int,
    on_batch: Callable[[int, int], None] | None = None,
    on_losses: Callable[[list[int], list[Pair]], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Negative log-likelihood of the supervised tokens of each sequence, teacher-forced.

    Sequences that differ only in their last token, such as a question with one letter or another, are read once. Where
    others begin alike, such as a question with one answer or another, what comes before the first supervised token is
    read once, if the model is a plain decoder with a cache; that reading also gives the likelihood of each first token,
    so answers of one token need no other. What many questions begin with in common is read once, too. Logits are made
    where they predict a supervised token, and of a few tokens at a time.

    Args:
        rows: sequences with ``input_ids`` and ``labels`` of equal length, and ``encoder_ids`` of a sequence-to-sequence
            model; a token with label -100 is not supervised, nor is the first token, which nothing predicts.
        batch_size: of the longest distinct sequences, in one forward pass; of shorter ones more, in no more padded
            tokens.
        pad_token_id: fills short sequences; it is masked, so any id of the vocabulary will do.
        on_batch: called after every batch with (sequences done, all sequences); it may raise to stop.
        on_losses: called before it with the numbers of the batch's sequences, and nats and tokens of each.

    Returns:
        Sums in nats (log-probabilities in float32, summed in float64) and counts of tokens, both ``[rows]``.
    """
    losses, counts = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    done = 0
    with inference(model):
        reader = _Reader(model, rows, pad_token_id)
        families = _families(rows) if reader.has_cache else [[one] for one in _distinct(rows)]
        alone = [family for family in families if len(family) == 1]
        shared = [family for family in families if len(family) > 1]
        for part, read in ((alone, reader.alone), (shared, reader.shared)):
            lengths = [max(len(one.ids) + len(one.prompt) for one in family) for family in part]
            order, common = reader.beginnings.order([family[0].before for family in part], lengths)
            sizes = [Size(len(f), n, length - n) for f, n, length in zip(part, common, lengths, strict=True)]

            def pairs_of(batch: list[int], part=part, read=read, common=common) -> list[Pair]:
                return read([part[i] for i in batch], [common[i] for i in batch])

            for batch, pairs in by_batch(by_tokens(order, sizes, batch_size), pairs_of):
                numbers = [number for i in batch for one in part[i] for number in one.numbers]
                losses[numbers], counts[numbers] = zip(*pairs, strict=True)
                done += len(numbers)
                if on_losses is not None:
                    on_losses(numbers, pairs)
                if on_batch is not None:
                    on_batch(done, len(rows))
    return losses, counts


@dataclass(frozen=True)
class _Reading:
    """Sequences that differ in their last token at most, and are read once.

    Attributes:
        numbers: of the rows.
        ids: tokens of one of them.
        places: of the tokens that are supervised in any of them, from 1, in order.
        prompt: what the encoder of a sequence-to-sequence model reads.
    """

    numbers: list[int]
    ids: list[int]
    places: list[int]
    prompt: list[int]

    @property
    def first(self) -> int:
        """The place of the first of these tokens; where there is none, of the last token."""
        return self.places[0] if self.places else max(1, len(self.ids) - 1)

    @property
    def before(self) -> list[int]:
        """The tokens before that place."""
        return self.ids[: self.first]


def _distinct(rows: Sequence[Mapping[str, Any]]) -> list[_Reading]:
    alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for i, row in enumerate(rows):
        alike.setdefault((tuple(row["input_ids"][:-1]), tuple(row.get("encoder_ids", ()))), []).append(i)
    return [
        _Reading(n, list(rows[n[0]]["input_ids"]), sorted({t for i in n for t in _supervised(rows[i]["labels"])}), [*p])
        for (_, p), n in alike.items()
    ]


def _supervised(labels: Sequence[int]) -> list[int]:
    return [t for t, label in enumerate(labels) if t and label != -100]


def _families(rows: Sequence[Mapping[str, Any]]) -> list[list[_Reading]]:
    """Sequences by what comes before their first supervised token; where that is short, each by itself."""
    families: dict[tuple[int, ...], list[_Reading]] = {}
    for number, one in enumerate(_distinct(rows)):
        before = tuple(one.before)
        families.setdefault(before if len(before) > LEAST else (-1, number), []).append(one)
    return list(families.values())


class _Reader:
    """Reads sequences with a model.

    Attributes:
        has_cache: whether what sequences begin with in common can be read once.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, rows: Sequence[Mapping[str, Any]], pad_token_id: int):
        self.model, self.rows, self.pad = model, rows, pad_token_id
        self.beginnings = Beginnings(model, pad_token_id)
        self._apart = reads_apart(model)
        plain = has_plain_decoder(model)
        # the processes of a divided model must call it equally often
        self.has_cache = plain and cache_name(base(model)) is not None and not is_divided(model)

    def alone(self, families: Sequence[Sequence[_Reading]], common: Sequence[int]) -> list[Pair]:
        """Nats and tokens of the rows of families of one.

        Args:
            common: how many tokens of each family lie in what it begins with in common with others.
        """
        batch = [one for family in families for one in family]
        sequences = [one.ids for one in batch]
        width = max(len(ids) - n for ids, n in zip(sequences, common, strict=True))
        marks = torch.full((len(batch), width), -100, device=self.model.device)
        for row, (one, n) in enumerate(zip(batch, common, strict=True)):
            marks[row, [place - n for place in one.places]] = 0
        predicted, owner = itertools.count(), itertools.count()
        wanted: list[tuple[int, int, int]] = []  # of each token: its prediction, which may be several rows', label, row
        for one in batch:
            number_of = {t: next(predicted) for t in one.places}
            for number in one.numbers:
                labels, row = self.rows[number]["labels"], next(owner)
                wanted += [(number_of[t], labels[t], row) for t in _supervised(labels)]
        places, targets, owners = torch.tensor(wanted, dtype=torch.int64).view(-1, 3).T

        def losses(logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
            """The rows of the tokens that this chunk predicts, and their losses in nats."""
            here = (places >= chunk.start) & (places < chunk.stop)
            at = (part[here].to(logits.device) for part in (places - chunk.start, targets))
            return owners[here], -logits.log_softmax(-1)[tuple(at)].cpu().double()

        count = sum(len(one.numbers) for one in batch)
        sums = torch.zeros(count, dtype=torch.float64)

        def inputs() -> dict[str, Any]:
            if any(common):
                return self.beginnings.arguments(sequences, common, left=False)
            ids, mask = self.beginnings.padded(sequences)
            apart = encoder_inputs([one.prompt for one in batch], self.pad, ids.device) if self._apart else {}
            return {"input_ids": ids, "attention_mask": mask, "use_cache": False} | apart

        for rows, nats in by_chunk(self.model, inputs, OneRow.of(marks), losses):
            sums.index_add_(0, rows, nats)
        return list(zip(sums.tolist(), torch.bincount(owners, minlength=count).tolist(), strict=True))

    def shared(self, families: Sequence[Sequence[_Reading]], common: Sequence[int]) -> list[Pair]:
        """As :meth:`alone`, of families of several, whose common beginnings are read first."""
        batch = [one for family in families for one in family]
        owners = [place for place, family in enumerate(families) for _ in family]
        asked = self.beginnings.arguments([family[0].before for family in families], common, left=True)
        mask = asked["attention_mask"]
        read = self.model(**asked | {"use_cache": True}, **hidden_only(self.model))
        logits = [read.logits[place, -1:] for place in owners]
        longer = [i for i, one in enumerate(batch) if len(one.ids) > one.first + 1]
        if longer:
            cache = cache_of(read)
            chosen = torch.tensor([owners[i] for i in longer], device=mask.device)
            cache.batch_select_indices(chosen)
            ends, ends_mask = self.beginnings.padded([batch[i].ids[batch[i].first : -1] for i in longer])
            starts = torch.tensor([batch[i].first for i in longer], device=mask.device)
            further = self.model(
                input_ids=ends,
                attention_mask=torch.cat([mask[chosen], ends_mask], dim=1),
                position_ids=starts[:, None] + torch.arange(ends.shape[1], device=mask.device),
                use_cache=True,
                **{str(cache_name(base(self.model))): cache},
            ).logits
            for i, more in zip(longer, further, strict=True):
                logits[i] = torch.cat([logits[i], more])
        return self._losses(batch, logits)

    def _losses(self, batch: Sequence[_Reading], logits: Sequence[Tensor]) -> list[Pair]:
        """Nats and tokens of the rows.

        Args:
            logits: of each reading, [tokens or more, vocab], those that predict its first supervised token and the ones
                after it.
        """
        pairs = []
        for one, logit in zip(batch, logits, strict=True):
            for number in one.numbers:
                label = torch.tensor(self.rows[number]["labels"][one.first :], device=logit.device, dtype=torch.int64)
                supervised = label != -100
                nats = F.cross_entropy(logit[: len(label)][supervised].float(), label[supervised], reduction="none")
                pairs.append((float(nats.cpu().double().sum()), len(nats)))
        return pairs
