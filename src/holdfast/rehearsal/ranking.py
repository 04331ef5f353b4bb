"""Which rows of a task a memory keeps first: surprising ones, hard ones, or ones that differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from holdfast.api.rows import IGNORED, TokenRow, bare
from holdfast.api.stage import Stage
from holdfast.models.pictures import is_place


def by_surprise(stage: Stage, rows: Sequence[TokenRow]) -> list[int]:
    """Places of rows, the most surprising first (SuRe, Hazard et al., 2025, arXiv 2511.22367).

    Surprise is the mean negative log-likelihood of all tokens of a row, prompt and answer, under the current weights:
    those before the stage. The places of pictures do not count, since no token is predicted there. Of a
    sequence-to-sequence model, it is that of the answer, since no prompt is predicted.
    """
    return _descending(stage, [bare(row) | {"labels": _all_text(row["input_ids"])} for row in rows])


def _all_text(ids: Sequence[int]) -> list[int]:
    """Labels of all tokens but the places of pictures."""
    return [IGNORED if is_place(token) else token for token in ids]


def by_loss(stage: Stage, rows: Sequence[TokenRow]) -> list[int]:
    """Places of rows, those with the highest mean loss of their supervised tokens under the current weights first."""
    return _descending(stage, list(rows))


def by_diversity(stage: Stage, rows: Sequence[TokenRow], count: int) -> list[int]:
    """Places of ``count`` rows that cover the others: greedy k-center (Sener and Savarese, 2018, arXiv 1708.00489).

    The first is the row nearest to the mean; each further one is the row that is farthest from all chosen ones. A row's
    place is the mean over its tokens of the last hidden state, under the current weights; distances are Euclidean.
    """
    points: list[Tensor] = []
    for start in range(0, len(rows), stage.micro_batch_size):
        part = rows[start : start + stage.micro_batch_size]
        points += [hidden.float().mean(0) for hidden in stage.hidden_states(part)]
    return k_center(torch.stack(points), min(count, len(rows))) if points else []


def k_center(points: Tensor, count: int) -> list[int]:
    """The greedy choice of ``count`` of points [rows, width], in order; the first of equal ones."""
    chosen = [int((points - points.mean(0)).norm(dim=1).argmin())]
    away = (points - points[chosen[0]]).norm(dim=1)  # from the nearest chosen point
    while len(chosen) < count:
        away[chosen[-1]] = -1.0  # is not chosen again, even where all others lie on chosen ones
        chosen.append(int(away.argmax()))
        away = torch.minimum(away, (points - points[chosen[-1]]).norm(dim=1))
    return chosen[:count]


def _descending(stage: Stage, rows: list[TokenRow]) -> list[int]:
    """Places of rows by their mean loss, the highest first; the first of equal ones."""
    nats, tokens = stage.losses(rows)
    means = [loss / max(number, 1) for loss, number in zip(nats, tokens, strict=True)]
    return sorted(range(len(rows)), key=lambda place: -means[place])
