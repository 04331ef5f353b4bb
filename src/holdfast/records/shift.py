"""What a run's files hold of how far its stages moved the model."""

from __future__ import annotations

from pydantic import with_config
from typing_extensions import TypedDict

from holdfast.models.pictures import RowToken
from holdfast.system.shapes import AS_WRITTEN, Count, Number

DRAWN = "drawn.json"
"""In the folder of a stage that is trained: responses of the model before it."""


@with_config(AS_WRITTEN)
class Shift(TypedDict):
    """How far a stage moved the model from what it was before, KL on its own responses to the stage's prompts.

    ``nats`` a token, its 95 % interval over the responses, and how many responses and tokens they were.
    """

    nats: Number
    interval: list[float] | None
    responses: Count
    tokens: Count


@with_config(AS_WRITTEN)
class _DrawnRow(TypedDict):
    input_ids: list[RowToken]
    labels: list[int]


@with_config(AS_WRITTEN)
class Drawn(TypedDict):
    """drawn.json: prompts with responses, and the negative log-likelihood of each response, in nats."""

    rows: list[_DrawnRow]
    nats: list[float]
