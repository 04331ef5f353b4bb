"""One task's test examples: the model's responses and their scores, or its loss per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.api.rows import TOKENS, TokenRow
from holdfast.api.task import Example, Task, Turn
from holdfast.models.answers import Add, AnswerCache
from holdfast.models.generation import generate
from holdfast.models.likelihood import token_losses
from holdfast.scoring import Scorer, find
from holdfast.scoring.score import named, response_records, score_records
from holdfast.system.progress import OnBatch

if TYPE_CHECKING:
    from holdfast.data.encode import Encoder
    from holdfast.evaluation.at_test import ModelEvaluation

Save = Callable[[list[int], list[Any]], None]
"""Takes the numbers of a batch's rows, and their answers."""

SAVED_TOGETHER = 32  # batches that an engine which fills its own answers in one call

MARGIN = 8  # tokens by which a response may be longer than the longest train answer


def evaluate_task(
    evaluation: ModelEvaluation,
    task: Task,
    *,
    max_new_tokens: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure a model on the test examples of a task.

    Args:
        max_new_tokens: longest response, in tokens; where absent, :func:`response_limit`, which reads all train
            examples, so compute it once for several measurements.
        on_batch: called after every batch with (sequences done, all sequences); it may raise to stop.

    Metrics that read the same of the model share one pass; each further thing that a metric beside the first reads
    takes a pass of its own.

    Returns:
        One scored record a test example, in order: row, prompt, answer, response and score. If choices are compared,
        the response is the likeliest choice, unless one is generated too, and choices, choice_nats and choice_tokens
        say how likely each is (bare_choice_nats: without the end, where a scorer asks for that). A record of a loss has
        row, score, and nats and tokens (the negative log-likelihood, and of how many tokens).

    Raises:
        DataError: a test example cannot be encoded in the encoder's ``max_length``, or has no token to predict.
        ConfigError: a library or an endpoint that a metric needs cannot be used.
    """
    scorers = {name: evaluation.scorers.get(name) or find(name) for name in (task.metric, *task.beside)}
    reads = {scorer.reads for scorer in scorers.values()}
    passes = [name for name in ("choices", "loss", "response") if name in reads]  # a later one's response counts
    records: list[dict[str, Any]] = [{} for _ in task.test]
    for number, name in enumerate(passes):
        shown = _pass(on_batch, number, len(passes))
        match name:
            case "choices":
                part = _choices(evaluation, task, [s for s in scorers.values() if s.reads == "choices"], shown)
            case "loss":
                part = _losses(evaluation, task, shown)
            case "response":
                part = response_records(task, _responses(evaluation, task, max_new_tokens, shown), scorers)
        records = [record | more for record, more in zip(records, part, strict=True)]
    return score_records(task, records, scorers, evaluation.answers)


def _pass(on_batch: OnBatch, number: int, count: int) -> OnBatch:
    """Report the progress of one of several passes as progress of all."""
    return None if on_batch is None else lambda done, total: on_batch(number * total + done, count * total)


def _losses(evaluation: ModelEvaluation, task: Task, on_batch: OnBatch) -> list[dict[str, Any]]:
    losses, counts = example_losses(evaluation, task.test, on_batch=on_batch)
    return [
        named(example)
        | {"nats": float(nats), "tokens": int(tokens)}
        | ({} if example.good is None else {"good": example.good})
        for example, nats, tokens in zip(task.test, losses, counts, strict=True)
    ]


def _choices(
    evaluation: ModelEvaluation, task: Task, scorers: Sequence[Scorer], on_batch: OnBatch
) -> list[dict[str, Any]]:
    """The records of test examples, with the negative log-likelihood of each choice as the answer.

    Args:
        scorers: those that read choices; the first says which is the response.
    """
    encoder, ends = evaluation.encoder, sorted({scorer.counts_end for scorer in scorers})
    offered = [example.choices or tuple(task.labels or ()) for example in task.test]
    examples = []
    for example, choices in zip(task.test, offered, strict=True):
        each = [replace(example, turns=(*example.turns[:-1], Turn("assistant", choice))) for choice in choices]
        question = evaluation.ask(task, example, max(encoder.answer_length(choice) for choice in each))
        examples += [replace(question, turns=(*question.turns[:-1], choice.turns[-1])) for choice in each]
    sequences = [[encoder.choice(example, end=end)] for end in ends for example in examples]
    losses, counts = (part.reshape(len(ends), -1) for part in sequence_losses(evaluation, sequences, on_batch=on_batch))
    bounds = np.cumsum([0, *map(len, offered)])
    records: list[dict[str, Any]] = []
    for number, (example, choices) in enumerate(zip(task.test, offered, strict=True)):
        record = named(example) | {"prompt": example.question, "answer": example.answer, "response": ""}
        record |= {"choices": list(choices)}
        of = slice(*bounds[number : number + 2])
        for end, nats, tokens in zip(ends, losses, counts, strict=True):
            named_nats = "choice_nats" if end else "bare_choice_nats"
            record |= {named_nats: nats[of].tolist()} | ({"choice_tokens": tokens[of].tolist()} if end else {})
        record["response"] = choices[scorers[0].choose(record)]
        records.append(record)
    return records


def _responses(evaluation: ModelEvaluation, task: Task, max_new_tokens: int | None, on_batch: OnBatch) -> list[str]:
    """The model's response to each test example."""
    encoder = evaluation.encoder
    if max_new_tokens is None:
        max_new_tokens = response_limit(encoder, task)
    questions = [evaluation.ask(task, example, max_new_tokens) for example in task.test]
    return respond(evaluation, questions, max_new_tokens, on_batch)


def respond(
    evaluation: ModelEvaluation, questions: Sequence[Example], max_new_tokens: int, on_batch: OnBatch
) -> list[str]:
    """The model's greedy response to each example, whose answer it does not see."""
    encoder, answers = evaluation.encoder, evaluation.answers or AnswerCache()
    if evaluation.endpoint is not None:
        return evaluation.endpoint.respond(encoder, questions, max_new_tokens, on_batch, answers)
    prompts = [encoder.prompt(question, reserve=max_new_tokens) for question in questions]

    def work(numbers: list[int], on_batch: OnBatch, on_responses: Save) -> None:
        if evaluation.responder is not None:
            size = SAVED_TOGETHER * evaluation.batch_size
            for start in range(0, len(numbers), size):
                part = range(start, min(start + size, len(numbers)))
                asked = [prompts[numbers[i]] for i in part]
                on_responses([*part], evaluation.responder(asked, max_new_tokens, encoder.stop_ids))
                if on_batch is not None:
                    on_batch(part.stop, len(numbers))
            return
        generate(
            evaluation.model,
            [prompts[i] for i in numbers],
            max_new_tokens=max_new_tokens,
            batch_size=evaluation.batch_size,
            eos_token_ids=encoder.stop_ids,
            pad_token_id=encoder.tokenizer.pad_token_id,
            on_batch=on_batch,
            on_responses=on_responses,
        )

    ask = _in_parts(evaluation, [encoder.asked(ids) for ids in prompts], on_batch, work)
    responses = answers.complete([["response", ids, max_new_tokens] for ids in prompts], ask)
    return [encoder.decode(tokens) for tokens in responses]


def response_limit(encoder: Encoder, task: Task, longest: int | None = None) -> int:
    """Tokens that a response may have: those of the longest train answer with its end, and 8 more, but no more than the
    task allows, and no more than half of the encoder's ``max_length``, since prompts need room, too.

    Args:
        longest: tokens of that answer, where they are known.
    """
    longest = (longest or max(encoder.answer_length(example) for example in task.train)) + MARGIN
    return min(longest, task.max_new_tokens or longest, max(encoder.max_length // 2, 1))


def example_losses(
    evaluation: ModelEvaluation,
    examples: Sequence[Example],
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums over each example's sequences of :func:`token_losses`: nats and supervised tokens, both ``[examples]``.

    Raises:
        DataError: an example cannot be encoded, or has no token to predict.
    """
    return sequence_losses(evaluation, [evaluation.encoder.encode(example) for example in examples], on_batch=on_batch)


def sequence_losses(
    evaluation: ModelEvaluation,
    encoded: Sequence[Sequence[TokenRow]],
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """As :func:`example_losses`, of examples that are encoded already: the sequences of each."""
    owner = np.array([i for i, rows in enumerate(encoded) for _ in rows], dtype=np.int64)
    rows = [row for rows in encoded for row in rows]

    def work(numbers: list[int], on_batch: OnBatch, on_losses: Save) -> None:
        token_losses(
            evaluation.model,
            [rows[i] for i in numbers],
            batch_size=evaluation.batch_size,
            pad_token_id=evaluation.encoder.tokenizer.pad_token_id,
            on_batch=on_batch,
            on_losses=on_losses,
        )

    answers, ask = evaluation.answers or AnswerCache(), _in_parts(evaluation, rows, on_batch, work)
    losses = answers.complete([["loss", *(row[key] for key in TOKENS if key in row)] for row in rows], ask)
    loss_sums, token_sums = np.zeros(len(encoded)), np.zeros(len(encoded), dtype=np.int64)
    np.add.at(loss_sums, owner, [nats for nats, _ in losses])
    np.add.at(token_sums, owner, [tokens for _, tokens in losses])
    return loss_sums, token_sums


def _in_parts(
    evaluation: ModelEvaluation,
    rows: Sequence[TokenRow],
    on_batch: OnBatch,
    work: Callable[[list[int], OnBatch, Save], None],
) -> Callable[[list[int], Add], None]:
    """A function that answers the rows without an answer, in the parts that the methods divide them into.

    Args:
        work: answers the rows of these numbers; it counts batches and numbers answers among these rows only.
    """

    def ask(left: list[int], add: Add) -> None:
        done = len(rows) - len(left)
        with closing(evaluation.parts([rows[i] for i in left])) as parts:
            for part in parts:
                numbers = [left[k] for k in part]
                work(numbers, _counted_from(on_batch, done, len(rows)), _saved_as(add, numbers))
                done += len(part)

    return ask


def _saved_as(add: Add, numbers: list[int]) -> Save:
    """Save the answers of a part as answers of the whole; ``numbers`` are the part's rows."""
    return lambda batch, answers: add([numbers[i] for i in batch], answers)


def _counted_from(on_batch: OnBatch, done: int, total: int) -> OnBatch:
    """Report the progress of a part as progress of the whole."""
    return None if on_batch is None else lambda in_part, _: on_batch(done + in_part, total)
