"""From responses to records with scores, and from records to the score of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.api.task import Example, Task
from holdfast.errors import ConfigError
from holdfast.models.answers import AnswerCache
from holdfast.scoring import Record, Scorer, find


def response_records(
    task: Task, responses: Sequence[str], scorers: Mapping[str, Scorer] | None = None
) -> list[dict[str, Any]]:
    """One record a test example, in order, not scored yet: row, prompt, answer and response, ``answers`` (all right
    ones) where there are several, and ``input`` (what the prompt is about) where a scorer needs it.

    Args:
        scorers: of the task's metrics, by name; where None, those of :func:`holdfast.scoring.find`.
    """
    scorers = scorers or {name: find(name) for name in (task.metric, *task.beside)}
    needs_input = any(scorers[name].needs_input for name in (task.metric, *task.beside))
    records = []
    for example, response in zip(task.test, responses, strict=True):
        record = named(example) | {"prompt": example.question, "answer": example.answer}
        if example.also_right:
            record["answers"] = [example.answer, *example.also_right]
        if needs_input:
            record["input"] = example.input
        if any(scorer.needs_pictures for scorer in scorers.values()):
            record["pictures"] = [picture.name for picture in example.pictures]
        if example.columns is not None and any(scorer.needs_columns for scorer in scorers.values()):
            record["columns"] = dict(example.columns)
        records.append(record | {"response": response})
    return records


def named(example: Example) -> dict[str, Any]:
    """What names a test example among those of its task: its row, of a conversation's its number, and its pictures."""
    found: dict[str, Any] = {"row": example.row}
    if example.number is not None:
        found["number"] = example.number
    if shown := [number for turn in example.turns for number in turn.shown]:
        found["shown"] = [f"{number:015x}" for number in shown]
    return found


def score_records(
    task: Task,
    records: list[dict[str, Any]],
    scorers: Mapping[str, Scorer] | None = None,
    cache: AnswerCache | None = None,
) -> list[dict[str, Any]]:
    """Give each record its ``score`` and, where the task has further metrics, their scores as ``beside``.

    Args:
        scorers: of the task's metrics, by name; where None, those of :func:`holdfast.scoring.find`.
        cache: answers of the scorers that ask a model themselves.

    Raises:
        ConfigError: a library or an endpoint that a metric needs cannot be used.
    """
    scorers = scorers or {name: find(name) for name in (task.metric, *task.beside)}
    for record, score in zip(records, scorers[task.metric].rows(records, cache), strict=True):
        record["score"] = score
    for name in task.beside:
        for record, score in zip(records, scorers[name].rows(records, cache), strict=True):
            record.setdefault("beside", {})[name] = score
    return records


KEPT = ("row", "number", "score", "beside", "nats", "tokens")
"""What is kept of a record without its texts."""


def without_texts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Scored records without what was asked, answered or chosen."""
    return [{key: record[key] for key in KEPT if key in record} for record in records]


def task_score(records: Sequence[Record], metric: str) -> float:
    """The score of a task from its scored records: their mean for most metrics, and never for a loss, F1 or BLEU."""
    return scorer(metric).corpus(records)


def beside_score(records: Sequence[Record], metric: str) -> float:
    """The score of a task by one of the metrics beside its own.

    Records of an older run, whose stream had other metrics beside its own, are scored now, from their responses.
    """
    scores = [record.get("beside", {}).get(metric) for record in records]
    if None in scores:
        scores = [new if old is None else old for old, new in zip(scores, scorer(metric).rows(records), strict=True)]
    return task_score([{**record, "score": score} for record, score in zip(records, scores, strict=True)], metric)


def scorer(metric: str) -> Scorer:
    """What makes a task's score of rows that are scored already; for that, no metric needs more than its name.

    A metric that is not installed here, such as one of an older run, is taken for a mean.
    """
    try:
        return find(metric)
    except ConfigError:
        return Scorer(metric)
