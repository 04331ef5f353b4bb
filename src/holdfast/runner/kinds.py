"""Stages of other kinds than sft in a run: what is refused, and the rows that TRL's trainers get."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from holdfast.api.method import Method
from holdfast.api.rows import IGNORED
from holdfast.api.task import Example, Task
from holdfast.config.run import RunConfig
from holdfast.data.encode import Encoder
from holdfast.data.files import where
from holdfast.errors import ConfigError, DataError
from holdfast.scoring import find
from holdfast.scoring.reward import reward_function, rewards
from holdfast.training.kinds import check_options, completion_length
from holdfast.training.requirements import reads_outputs, works_on_batches

TUNERS = ("full", "freeze", "lora", "ia3", "adapter")
"""The tuners whose weights are part of the modules that TRL's losses go through."""


REFERRED = ("full", "freeze", "lora")
"""The tuners with which grpo has a reference, which TRL keeps in a second model or in a second adapter."""


def check_kinds(
    tasks: Sequence[Task], methods: Sequence[Method], tuner: str, config: RunConfig, max_length: int
) -> None:
    """Check that tasks of other kinds than sft can be trained so.

    Raises:
        ConfigError: an option is none, TRL is not installed, or a method, the tuner or another key cannot be used.
    """
    others = [task for task in tasks if task.kind != "sft"]
    for task in others:
        check_options(task.name, task.kind, task.options)
        if task.kind == "grpo" and (longest := completion_length(task.options, max_length)) >= max_length:
            raise ConfigError(
                f"task {task.name!r}: options.max_completion_length: {longest} tokens leave no room for a prompt in "
                f"data.max_length={max_length}"
            )
        what = f"task {task.name!r} is of kind {task.kind}"
        if config.data.packing:
            raise ConfigError(f"data.packing: {what}, whose rows cannot share a sequence; turn packing off")
        if tuner not in TUNERS:
            raise ConfigError(f"tuner: {what}, which works with {', '.join(TUNERS)}, not with {tuner}")
        if task.kind == "grpo" and task.options.get("beta") and tuner not in REFERRED:
            raise ConfigError(f"task {task.name!r}: options.beta: works with {', '.join(REFERRED)}, not with {tuner}")
        for method in methods:
            if reason := _refusal(method, task):
                raise ConfigError(f"method {method.name}: {what}, and {reason}")


def _refusal(method: Method, task: Task) -> str:
    """Why a method cannot work in a task's stage; empty where it can."""
    if method.schedule == "joint":
        return "all tasks would be one stage, which has one kind; learn them one after another"
    if method.schedule == "none":
        return ""
    if works_on_batches(method):
        return "it works on the task's rows in each batch, which are none of the next-token loss there"
    if reads_outputs(method):
        return "it reads what the model makes of the task's rows, which TRL's trainer does not hand on"
    if task.kind == "grpo" and task.options.get("beta") and "lora" in method.tuners:
        return "it wants the LoRA adapter alone, beside which options.beta keeps the reference; leave beta out"
    if method.needs_rows and task.kind == "grpo" and not all(example.answered for example in task.train):
        return (
            "it reads the answers of a task's rows, and these have none (a column answer); a method such as si, or one "
            "that rehearses general or self-generated text, would do"
        )
    return ""


def method_rows(task: Task, encoder: Encoder) -> list[dict[str, Any]]:
    """The train rows of a task as methods see them: rows of the next-token loss, of good answers alone.

    Raises:
        DataError: a row cannot be encoded.
    """
    return encoder.encode_all([example for example in task.train if example.good is not False and example.answered])


def trained_rows(task: Task, encoder: Encoder) -> list[dict[str, Any]]:
    """The train rows of a task of another kind than sft as TRL's trainers read them.

    Of grpo they are numbers: columns of any types need no place in a table, and TRL asks for a prompt's tokens.

    Raises:
        DataError: a row cannot be encoded.
    """
    if task.kind == "grpo":
        return [{"prompt": str(number)} for number in range(len(task.train))]
    return [row for example in task.train for row in trained_row(task, encoder, example)]


def trained_row(task: Task, encoder: Encoder, example: Example) -> list[dict[str, Any]]:
    """One of :func:`trained_rows`, in a list; of grpo there is nothing to encode.

    Raises:
        DataError: it cannot be encoded.
    """
    match task.kind:
        case "dpo":
            parts = [_divided(encoder, example, answer) for answer in example.choices]
            (prompt, chosen), (other, rejected) = parts
            if prompt != other:
                raise DataError(
                    f"{where(example.file, example.row)}: does not fit into data.max_length={encoder.max_length}; its "
                    "prompt would be cut differently before the chosen and the rejected answer. Raise it, or shorten "
                    "the row"
                )
            return [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}]
        case "kto":
            prompt, completion = _divided(encoder, example, example.answer)
            return [{"prompt_ids": prompt, "completion_ids": completion, "label": example.good}]
        case _:
            return []


def _divided(encoder: Encoder, example: Example, answer: str) -> tuple[list[int], list[int]]:
    """The tokens before an answer and those of the answer, its end included."""
    turns = (*example.turns[:-1], replace(example.turns[-1], content=answer, calls=(), reasoning=None))
    row = encoder.choice(replace(example, turns=turns), end=True)
    first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
    return row["input_ids"][:first], row["input_ids"][first:]


def reward_of(task: Task, encoder: Encoder) -> Callable[..., Any] | None:
    """What TRL's trainer rewards the answers to rows of :func:`trained_rows` by; None where nothing is rewarded."""
    if task.reward is None:
        return None
    function = reward_function(task.reward) if task.reward != "exact_match" else _exact_match(encoder)
    rows = [example.columns or {} for example in task.train]

    def reward(prompts: list[str], completions: list[str], **more: Any) -> Any:
        return rewards(function, [rows[int(number)] for number in prompts], completions, **more)

    return reward


def _exact_match(encoder: Encoder) -> Callable[..., list[float]]:
    """1 for an answer that the metric accuracy counts as right, otherwise 0."""
    accuracy = find("accuracy")

    def exact_match(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        texts = [encoder.answer(text if isinstance(text, str) else text[0]["content"]) for text in completions]
        pairs = zip(texts, answer, strict=True)
        return [accuracy.row({"response": text, "answer": right.strip()}) for text, right in pairs]

    return exact_match


def prompt_tokens(task: Task, encoder: Encoder, reserve: int) -> Callable[[str], list[int]] | None:
    """The tokens of the prompts of :func:`trained_rows`, as a test row's are; None where answers are not written.

    Args:
        reserve: tokens of the longest answer.
    """
    if task.kind != "grpo":
        return None
    tokens = [encoder.prompt(example, reserve) for example in task.train]
    return lambda number: tokens[int(number)]
