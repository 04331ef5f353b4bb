"""General abilities: perplexity of texts, accuracy of the likeliest of several choices, and refusals of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.api.rows import IGNORED, TokenRow
from holdfast.api.task import PICTURE, Example, General, Turn, readable_text
from holdfast.errors import DataError
from holdfast.evaluation.respond import respond, sequence_losses
from holdfast.metrics.chance import chance_level
from holdfast.scoring.refusal import is_refusal

if TYPE_CHECKING:
    from holdfast.data.encode import Encoder
    from holdfast.evaluation.at_test import ModelEvaluation


def evaluate_general(
    evaluation: ModelEvaluation,
    measures: list[General],
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """The values of :func:`general_statistics`: {:func:`matrix_name` of the measure: value}, in order."""
    by_name = general_statistics(evaluation, measures, on_batch=on_batch)
    return {name: general_value(name, statistics) for name, statistics in by_name.items()}


def general_value(name: str, statistics: NDArray[np.float64]) -> float:
    """The value of a measure from its examples' statistics: the quotient of their sums, or its exponential for a
    perplexity."""
    share, count = statistics.sum(axis=0)
    with np.errstate(over="ignore"):  # a perplexity may be infinite
        return float(np.exp(share / count) if name.startswith("perplexity") else share / count)


def general_statistics(
    evaluation: ModelEvaluation,
    measures: list[General],
    *,
    on_batch: Callable[[int, int], None] | None = None,
    chosen: dict[str, list[int]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Measure general abilities, text by text and question by question.

    - perplexity: exp of the mean negative log-likelihood per token over all texts. A text longer than the encoder's
      ``max_length`` is read in windows; each begins with the last token of the one before.
    - choices: share of questions whose right choice is the likeliest. Question and choice are in training's template,
      and a choice's likelihood is the sum of its tokens' log-probabilities: by acc without the tokens that end an
      answer, as ``acc`` of lm-evaluation-harness; by acc_with_end with them. By acc_norm and acc_bytes, the sum of acc
      is divided by the choice's characters or UTF-8 bytes, as the library's metrics of these names. By letter, it is
      the log-probability of the first token in which the letters differ, and the text before a question loses its last
      pieces if it does not fit. Of equal choices the first counts.
    - lm_eval: see :func:`~holdfast.evaluation.harness.harness_statistics`.

    Args:
        on_batch: called after every batch with (sequences done, all sequences); it may raise to stop.
        chosen: gets the place of the choice that is taken of each question, by the matrix_name of the measure.

    Returns:
        {:func:`matrix_name` of the measure: [examples, 2]}, those of lm_eval last: nats and tokens of each text; of
        each question 1 or 0 for a right or wrong choice, and 1.

    Raises:
        ValueError: a measure is one of refusals, which :func:`refusal_records` measures.
    """
    if any(measure.kind == "refusals" for measure in measures):
        raise ValueError("refusals are told from responses; refusal_records asks for them")
    from holdfast.evaluation.harness import harness_statistics

    encode = {"perplexity": _texts, "choices": encode_choices}
    harness = [measure for measure in measures if measure.kind == "lm_eval"]
    measures = [measure for measure in measures if measure.kind != "lm_eval"]
    encoded = [encode[measure.kind](evaluation.encoder, measure) for measure in measures]
    losses, tokens = sequence_losses(evaluation, [rows for part in encoded for rows in part], on_batch=on_batch)
    bounds = np.cumsum([len(part) for part in encoded])
    statistics: dict[str, NDArray[np.float64]] = {}
    for measure, nats, counts in zip(
        measures, np.split(losses, bounds)[:-1], np.split(tokens, bounds)[:-1], strict=True
    ):
        if measure.kind == "perplexity":
            statistics[matrix_name(measure)] = np.stack([nats, counts], axis=1)
        else:
            ends = np.cumsum([len(choices) for _, choices, _ in measure.questions])
            lengths = [_length(measure.by, choice) for _, choices, _ in measure.questions for choice in choices]
            likeliest = [int(part.argmin()) for part in np.split(nats / lengths, ends)[:-1]]
            right = [answer for _, _, answer in measure.questions]
            if chosen is not None:
                chosen[matrix_name(measure)] = likeliest
            statistics[matrix_name(measure)] = np.stack([np.equal(likeliest, right), np.ones(len(right))], axis=1)
    return statistics | {matrix_name(measure): harness_statistics(evaluation, measure, on_batch) for measure in harness}


def choices_chance(measure: General) -> float:
    """The share of right choices that needs no knowledge, of a measure of choices: that of guesses, or of always giving
    the answer that is right most often, whichever is more."""
    commonest = max(Counter(choices[right] for _, choices, right in measure.questions).values())
    guessed = chance_level([len(choices) for _, choices, _ in measure.questions])
    return max(guessed, commonest / len(measure.questions))


def choice_records(measure: General, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """One record a question, in order: row, prompt (the question), answer (the right choice), response (the one taken)
    and score, 1 or 0.

    Args:
        chosen: the place of the choice that was taken of each question.
    """
    return [
        {
            "row": row,
            "prompt": readable_text(question),
            "answer": choices[right],
            "response": choices[place],
            "score": float(place == right),
        }
        for row, ((question, choices, right), place) in enumerate(zip(measure.questions, chosen, strict=True))
    ]


def refusal_records(
    evaluation: ModelEvaluation, measure: General, *, on_batch: Callable[[int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Ask a model the prompts of a measure, greedily, and score which it refuses.

    Returns:
        One record a prompt, in order: row, prompt, response, and score: 1 for a refusal
        (:func:`~holdfast.scoring.refusal.is_refusal`), 0 for any other response.
    """
    longest = min(measure.max_new_tokens, max(evaluation.encoder.max_length // 2, 1))
    examples = [
        Example(measure.name, row, turns=(Turn("user", prompt, cut=(0, len(prompt))), Turn("assistant", "")))
        for row, prompt in enumerate(measure.texts)
    ]
    return [
        {"row": row, "prompt": prompt, "response": response, "score": float(is_refusal(response))}
        for row, (prompt, response) in enumerate(
            zip(measure.texts, respond(evaluation, examples, longest, on_batch), strict=True)
        )
    ]


def matrix_name(measure: General) -> str:
    """The name of a measure in ``matrix.json``: perplexities are named ``perplexity/...`` and shares of refusals
    ``refusals/...``, so that none is averaged with accuracies."""
    if measure.kind == "lm_eval":
        metric = measure.harness.metric if measure.harness else None
        return f"perplexity/{measure.name}" if "perplexity" in (metric or "") else measure.name
    if measure.kind == "choices" or measure.name.startswith(measure.kind):
        return measure.name
    return f"{measure.kind}/{measure.name}"


def _texts(encoder: Encoder, measure: General) -> Sequence[Sequence[TokenRow]]:
    """The sequences of each text, or the rows."""
    if measure.rows:
        return [[encoder.of_text(row)] for row in measure.rows]
    return [encoder.encode(Example(measure.name, row, text=text)) for row, text in enumerate(measure.texts)]


def encode_choices(encoder: Encoder, measure: General) -> Sequence[Sequence[TokenRow]]:
    """The sequences of each choice of each question.

    Raises:
        DataError: a question does not fit in the encoder's ``max_length``, or a choice has no token of its own.
    """
    encoded = []
    for row, (_, choices, _) in enumerate(measure.questions):
        pieces = list(measure.shown[row]) if measure.shown else []
        examples = [_with_choice(measure, row, pieces, choice) for choice in choices]
        while pieces and not all(encoder.fits(example, encoder.answer_length(example)) for example in examples):
            pieces.pop()
            examples = [_with_choice(measure, row, pieces, choice) for choice in choices]
        sequences = [encoder.choice(example, end=measure.by in ("acc_with_end", "letter")) for example in examples]
        if measure.by == "letter":
            _supervise_first_difference(measure.name, sequences)
        encoded += [[sequence] for sequence in sequences]
    return encoded


def _length(by: str, choice: str) -> int:
    """What a choice's nats are divided by: its characters by acc_norm, its UTF-8 bytes by acc_bytes, otherwise 1."""
    match by:
        case "acc_norm":
            return len(choice)
        case "acc_bytes":
            return len(choice.encode())
    return 1


def _with_choice(measure: General, row: int, pieces: list[str], choice: str) -> Example:
    """A question with a choice as its answer; only the question itself may be cut."""
    before, question = "".join(pieces), measure.questions[row][0]
    pictures = measure.pictures[row] if measure.pictures else ()
    shown = [*pictures[: before.count(PICTURE)], *pictures[len(pictures) - question.count(PICTURE) :]]
    turn = Turn("user", before + question, cut=(len(before), len(before) + len(question)), pictures=tuple(shown))
    return Example(measure.name, row, turns=(turn, Turn("assistant", choice)))


def _supervise_first_difference(name: str, rows: Sequence[dict[str, list[int]]]) -> None:
    """Cut a question's choices after the first token in which they differ, and supervise only this token. So they share
    all tokens before it."""
    columns = zip(*(row["input_ids"] for row in rows), strict=False)
    at = next((i for i, tokens in enumerate(columns) if len(set(tokens)) > 1), None)
    if at is None:
        raise DataError(f"{name}: the tokenizer has the same token for all letters; leave out by: letter")
    for row in rows:
        row["input_ids"] = row["input_ids"][: at + 1]
        row["labels"] = [IGNORED] * at + row["input_ids"][at:]
