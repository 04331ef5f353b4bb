"""The rows of a run's tasks as tokens; all that cannot become tokens is found before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

from holdfast.api.method import Method
from holdfast.api.task import Example, Stream, Task
from holdfast.config.model import ModelConfig
from holdfast.config.run import RunConfig
from holdfast.data.arrow_rows import ArrowRows, is_large
from holdfast.data.encode import Encoder
from holdfast.data.files import where
from holdfast.data.joined_rows import JoinedRows
from holdfast.data.load import judge_bad_rows
from holdfast.data.on_disk import OnDisk
from holdfast.errors import ConfigError
from holdfast.evaluation.respond import response_limit
from holdfast.models.pretrained import load_model_config
from holdfast.runner.kinds import method_rows, trained_row
from holdfast.runner.large_rows import encode_large, usable
from holdfast.runner.plan import Rows
from holdfast.scoring import find
from holdfast.training.kinds import completion_length
from holdfast.training.requirements import packed

NAMED = 5
"""Tokens that a message names."""


def encode_tasks(stream: Stream, encoder: Encoder, config: RunConfig) -> tuple[Rows, dict[str, int]]:
    """Tokenise the train rows of every task, and try the prompts of its test rows.

    Rows that cannot be encoded are treated as ``data.on_bad_row`` says: too long even without their input, say, or with
    tools that the chat template does not show.

    Returns:
        Each task's train rows, and for each task that is answered the tokens of its longest response.

    Raises:
        DataError: rows cannot be encoded, or none of a split is left.
    """
    bad: list[str] = []
    rows: Rows = {}
    limits: dict[str, int] = {}
    apart = encoder.apart()  # the counts of rows that were cut are about train rows
    for task in stream.tasks:
        reads = {find(name).reads for name in (task.metric, *task.beside)}
        own = encoder.apart()
        if task.kind == "sft" and encoder.sight is None and is_large(task.train):
            task.train, rows[task.name] = encode_large(task.train, own, config.data.cache, bad)
        elif task.kind == "sft":
            task.train, rows[task.name] = usable(task.train, own.encode_all, bad)
        else:
            task.train, _ = usable(task.train, partial(_trained, task, apart), bad)
            rows[task.name] = method_rows(task, own)
        encoder.tally.add(own.tally)
        if "loss" in reads:
            task.test, _ = usable(task.test, apart.encode_all, bad)
        if "response" in reads and task.train:
            if task.kind == "grpo":
                limit = completion_length(task.options, encoder.max_length)
            else:
                longest = own.tally.longest if task.kind == "sft" else None
                limit = config.evaluation.max_new_tokens or response_limit(apart, task, longest)
            limits[task.name] = limit

            def prompts(examples: Sequence[Example], limit: int = limit) -> list[list[int]]:
                return [apart.prompt(example, limit) for example in examples]

            task.test, _ = usable(task.test, prompts, bad)
    judge_bad_rows(bad, stream, config.data, config.output)
    return rows, limits


def check_vocabulary(rows: Rows, encoder: Encoder, model: ModelConfig) -> None:
    """Check that the model has an embedding for every token of the train rows, and for padding.

    Raises:
        ConfigError: it lacks some, as where tokens were added to the tokenizer alone.
    """
    known = getattr(load_model_config(model).get_text_config(), "vocab_size", None)
    if known is None:
        return
    tokenizer = encoder.tokenizer
    used = {tokenizer.pad_token_id}
    for of_task, key in product(rows.values(), ("input_ids", "encoder_ids")):
        if isinstance(of_task, ArrowRows):
            used |= of_task.beyond(key, known)
            continue
        for row in of_task:
            if max(row.get(key, ()), default=0) >= known:
                used |= set(row[key])
    used -= {encoder.sight.image_token_id} if encoder.sight is not None else set()
    beyond = sorted(token for token in used if token >= known)
    if beyond:
        named = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in beyond[:NAMED])
        more = f" and {len(beyond) - NAMED} more" if len(beyond) > NAMED else ""
        raise ConfigError(
            f"model.name: the tokenizer of {model.name!r} writes tokens beyond the {known} that the model has "
            f"embeddings for: {named}{more}; make room for them (model.resize_token_embeddings(len(tokenizer)), then "
            "save_pretrained), or take the tokenizer that belongs to the model"
        )


def _trained(task: Task, encoder: Encoder, examples: Sequence[Example]) -> list[Any]:
    """Rows of another kind than sft; of grpo, their prompts are tried, too."""
    rows = [row for example in examples for row in trained_row(task, encoder, example)]
    if task.kind == "grpo":
        limit = completion_length(task.options, encoder.max_length)
        for example in examples:
            encoder.prompt(example, limit)
    return rows


def try_rows(method: Method, tasks: Sequence[Task], rows: Rows, config: RunConfig, encoder: Encoder) -> None:
    """Let a method try the train rows of tasks, before there is a model.

    Raises:
        ConfigError: the rows are packed, and the method needs them apart; or activations would be recomputed, with
            which it cannot work.
        UserError: the method cannot learn one of them.
    """
    if config.data.packing and method.needs_rows_apart:
        raise ConfigError(f"data.packing: {packed(method)}; turn packing off")
    if config.training.gradient_checkpointing and method.no_checkpointing:
        raise ConfigError(
            f"training.gradient_checkpointing: method {method.name}: {method.no_checkpointing}; turn it off"
        )
    model_config = load_model_config(config.model)
    for task in tasks:
        described = partial(_place, files_of(task), rows[task.name])
        method.try_rows(rows[task.name], described, encoder.tokenizer, model_config)


def files_of(task: Task) -> str:
    """What messages call the file that a task's train rows came from, or their files."""
    files = task.train.files if isinstance(task.train, OnDisk) else {example.file for example in task.train}
    return files.pop() if len(files) == 1 else f"the files of task {task.name}"


def _place(file: str, rows: Sequence[dict[str, Any]], number: int) -> str:
    return where(file, rows[number]["row"])


def encode_dev(tasks: Sequence[Task], encoder: Encoder, config: RunConfig, method: Method) -> Rows:
    """Tokenise the dev split of every task, for a method that reads it.

    Raises:
        ConfigError: the run measures on the dev split, or a task has none.
        DataError: rows cannot be encoded.
    """
    if config.evaluation.split == "dev":
        raise ConfigError(
            f"evaluation.split: dev measures on the rows that method {method.name} chooses by; measure on the test "
            f"split, or give {method.name} no values to choose from"
        )
    for task in tasks:
        if not task.eval:
            raise ConfigError(
                f"method {method.name}: chooses by the dev split of each task, and task {task.name!r} has none; give "
                "it one (a file eval, dev or validation beside train), or the method one value instead of a list"
            )
    apart = encoder.apart()
    return {task.name: apart.encode_all(task.eval) for task in tasks}


class StageRows(JoinedRows):
    """The rows of a stage's tasks, one task after another; ``row`` is a row's number in the stage.

    Args:
        parts: of each task, what messages call its file, and its rows.
    """

    def __init__(self, parts: Sequence[tuple[str, Sequence[dict[str, Any]]]]):
        self._parts = list(parts)
        super().__init__(len(rows) for _, rows in self._parts)

    def row(self, place: int) -> dict[str, Any]:
        _, row = self._found(place)
        return row | {"row": place}

    def origin(self, place: int) -> tuple[str, int]:
        """What messages call a row's file, and its number there, from 1."""
        file, row = self._found(place)
        return file, row["row"] + 1

    def _found(self, place: int) -> tuple[str, dict[str, Any]]:
        part, at = self.part_of(place)
        file, rows = self._parts[part]
        return file, rows[at]
