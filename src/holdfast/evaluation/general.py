"""General abilities: perplexity of texts, and accuracy of the likeliest of several choices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from holdfast.data.task import Example, General, Turn
from holdfast.evaluation.respond import example_losses

if TYPE_CHECKING:
    from holdfast.evaluation.at_test import Evaluation


def evaluate_general(
    evaluation: Evaluation,
    measures: list[General],
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The values of :func:`general_statistics`: {:func:`matrix_name` of the measure: value}, in order."""
    found = general_statistics(evaluation, measures, on_batch=on_batch)
    return {name: general_value(name, statistics) for name, statistics in found.items()}


def general_value(name: str, statistics: NDArray[np.float64]) -> float:
    """The value of a measure from its examples' statistics: their quotient, of a perplexity its exponential."""
    share, count = statistics.sum(axis=0)
    return float(np.exp(share / count) if name.startswith("perplexity") else share / count)


def general_statistics(
    evaluation: Evaluation,
    measures: list[General],
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Measure general abilities, text by text and question by question.

    - perplexity: exp of the mean negative log-likelihood per token over all texts; a text that is longer than the
      encoder's ``max_length`` is read in windows, of which each knows the one before by its last token only.
    - choices: share of questions whose right choice is the likeliest. Question and choice stand in the template that
      training uses, and a choice's likelihood is the plain sum of its tokens' log-probabilities, end token included,
      not divided by its length (what lm-evaluation-harness calls ``acc``). Of equal ones the first counts.

    Args:
        on_batch: called after every batch with the sequences done and all sequences; it may raise to stop.

    Returns:
        {:func:`matrix_name` of the measure: [examples, 2]}, in order: nats and tokens of each text; 1 or 0 for a right
        or wrong choice, and 1.
    """
    examples = [_texts(measure) if measure.kind == "perplexity" else _choices(measure) for measure in measures]
    losses, tokens = example_losses(evaluation, [example for part in examples for example in part], on_batch=on_batch)
    bounds = np.cumsum([len(part) for part in examples])
    found: dict[str, NDArray[np.float64]] = {}
    for measure, nats, counts in zip(
        measures, np.split(losses, bounds)[:-1], np.split(tokens, bounds)[:-1], strict=True
    ):
        if measure.kind == "perplexity":
            found[matrix_name(measure)] = np.stack([nats, counts], axis=1)
        else:
            ends = np.cumsum([len(choices) for _, choices, _ in measure.questions])
            likeliest = [int(part.argmin()) for part in np.split(nats, ends)[:-1]]
            right = [answer for _, _, answer in measure.questions]
            found[matrix_name(measure)] = np.stack([np.equal(likeliest, right), np.ones(len(right))], axis=1)
    return found


def matrix_name(measure: General) -> str:
    """What a measure is called in ``matrix.json``: a perplexity is named ``perplexity/...``, so that none is averaged
    with accuracies."""
    if measure.kind == "perplexity" and not measure.name.startswith("perplexity"):
        return f"perplexity/{measure.name}"
    return measure.name


def _texts(measure: General) -> list[Example]:
    return [Example(file=measure.name, row=row, text=text) for row, text in enumerate(measure.texts)]


def _choices(measure: General) -> list[Example]:
    return [
        Example(
            file=measure.name,
            row=row,
            turns=(Turn("user", question, cut=(0, len(question))), Turn("assistant", choice)),
        )
        for row, (question, choices, _) in enumerate(measure.questions)
        for choice in choices
    ]
