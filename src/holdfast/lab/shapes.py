"""What the files of a laboratory run hold, for those who read them back; see :mod:`holdfast.system.shapes`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, with_config
from typing_extensions import TypedDict

from holdfast.system.shapes import AS_WRITTEN, Count, Facts, Number


@with_config(AS_WRITTEN)
class Step(TypedDict):
    """A line of events.jsonl."""

    step: Count


@with_config(AS_WRITTEN)
class _Domain(TypedDict):
    loss: Number
    second_half: Number
    kl: Number


@with_config(AS_WRITTEN)
class Evaluation(TypedDict):
    """A line of evaluations.jsonl."""

    step: Count
    tokens: Count
    seconds: float
    domains: dict[str, _Domain]


@with_config(AS_WRITTEN)
class Result(TypedDict):
    """result.json."""

    stop: str | None
    step: Count
    tokens: Count
    seconds: float
    parameters: Count
    start: Evaluation
    end: Evaluation
    best: Evaluation | None


@with_config(AS_WRITTEN)
class _Begin(TypedDict):
    size: Facts
    context: Count
    seed: Count
    weights: str


@with_config(AS_WRITTEN)
class Note(TypedDict):
    """lab.json."""

    begin: _Begin | None
    tokens: Count


@with_config(AS_WRITTEN)
class Matrix(TypedDict):
    """matrix.json of a run of one stage."""

    tasks: list[str]
    metrics: dict[str, str]
    scores: Annotated[list[list[Number]], Field(min_length=2, max_length=2)]
    general: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)]]


Measured = dict[str, Number | str]
"""done.json: columns of the table."""
