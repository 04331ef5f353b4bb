"""The tasks of a run, in their order, and how their rows are read."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from holdfast.config.pattern import check_pattern
from holdfast.config.section import FREE, FreeOptions, Section, TaskName, year_as_text
from holdfast.config.yaml_values import as_yaml

Columns = dict[str, str | None]
COLUMNS = "renames columns of the source to those of a format, for example {text: sentence}; null leaves one out"


class TaskOptions(Section):
    """How a task's rows are read and scored."""

    columns: Columns = Field(default_factory=dict, description=COLUMNS)
    format: str | None = Field(
        None, description="prompt_answer, sentence_label, messages, sharegpt, alpaca or text; detected where absent"
    )
    metric: str | None = Field(
        None, description="how it is scored (`holdfast streams --metrics` lists the metrics); by format where absent"
    )
    beside: list[str] = Field(default_factory=list, description="further metrics, reported beside the score matrix")
    labels: list[str] | None = Field(
        None, min_length=1, description="every answer there may be; a sentence_label folder has them in labels.json"
    )
    instruction: str | None = Field(None, description="instruction put before each sentence of a sentence_label task")
    prompt: str | None = Field(
        None, description="how a sentence_label row is asked, from {instruction}, {labels} and {sentence}"
    )
    input: str | None = Field(
        None,
        description="regular expression whose group 1 is what a prompt is about: what sari compares with, and what is "
        "cut where a row is too long",
    )
    images: str | None = Field(
        None, description="folder that the paths of pictures start from; where absent, that of the row's file"
    )
    turns: Literal["last", "each"] = Field(
        "last", description="a test conversation is asked for its last answer, or for each after the true ones before"
    )
    max_new_tokens: int | None = Field(None, ge=1, description="longest response, where evaluation does not say")
    kind: Literal["sft", "dpo", "kto", "grpo"] = Field(
        "sft", description="how its stage is trained: on answers; on preferences (dpo, kto); on rewarded answers (grpo)"
    )
    reward: str | None = Field(
        None, description="of grpo: exact_match with the column answer, or module:function, as TRL calls it"
    )
    options: FreeOptions = Field(
        default_factory=dict, description="of a dpo, kto or grpo stage: fields of TRL's configuration, such as beta"
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> TaskOptions:
        if self.kind == "sft" and self.options:
            raise ValueError("options: belong to a kind of stage that TRL trains: kind: dpo, kto or grpo")
        if (self.kind == "grpo") != (self.reward is not None):
            raise ValueError(
                "reward: says what an answer is worth, which only kind: grpo needs; it is exact_match, "
                "or module:function"
            )
        if self.reward is not None and not re.fullmatch(r"exact_match|[\w.]+:\w+", self.reward):
            raise ValueError(f"reward: {self.reward!r} must be exact_match or module:function")
        for key in ("format", "labels", "instruction", "prompt", "input") if self.kind != "sft" else ():
            if getattr(self, key) is not None:
                raise ValueError(f"{key}: belongs to tasks of kind sft; rows of kind {self.kind} have columns of TRL's")
        return self

    @model_validator(mode="after")
    def _prompt_and_input(self) -> TaskOptions:
        if self.prompt is not None:
            unknown = set(re.findall(r"\{\w*\}", self.prompt)) - {"{instruction}", "{labels}", "{sentence}"}
            if unknown or self.prompt.count("{sentence}") != 1:
                raise ValueError("prompt: must hold {sentence} once, and of {...} else only {instruction} and {labels}")
        if self.input is not None:
            try:
                check_pattern(self.input)
            except ValueError as error:
                raise ValueError(f"input: {error}") from None
        return self


class TaskConfig(TaskOptions):
    """One task of a stream that is composed by hand."""

    example: ClassVar[str] = "{name: july, path: july.jsonl}"

    name: TaskName = Field(description="what the task is called in the matrix and the report")
    path: str | None = Field(None, description="folder with train, eval (or dev) and test files, or one data file")
    dataset: str | None = Field(None, description="a Hugging Face dataset: hub name or local folder")
    subset: str | None = Field(None, description="configuration name of the Hugging Face dataset")

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path (a folder or a file) or dataset (a Hugging Face dataset)")
        if self.subset is not None and self.dataset is None:
            raise ValueError(f"subset: {self.subset!r} would be a part of a dataset, and path names none")
        return self


def _order(value: Any) -> Any:
    if isinstance(value, list):
        value = [year_as_text(name) for name in value]
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"must be names of tasks, not {as_yaml(value)}")
        if len(value) == 0 or len(set(value)) != len(value):
            raise ValueError("must name at least one task, and each task once")
    elif isinstance(value, str) and value.startswith("random") and not re.fullmatch(r"random:\d+", value):
        raise ValueError(f"{value!r} must say its seed, for example random:0")
    elif value is not None and not isinstance(value, str):
        raise ValueError(f"must be a list of tasks, reverse, random:SEED or an order by name, not {as_yaml(value)}")
    return value


class StreamConfig(Section):
    """Tasks in an order: a stream by name, a folder of task folders, or a list of tasks."""

    example: ClassVar[str] = "{path: tasks}"
    name_alone: ClassVar[bool] = True

    name: str | None = Field(None, description="a benchmark or the built-in stream (`holdfast streams` lists them)")
    path: str | None = Field(
        None,
        description="folder of the named stream's data; alone, one in which every task is a folder, or one data file",
    )
    columns: Columns = Field(default_factory=dict, description=f"of all tasks of a path alone: {COLUMNS}")
    images: str | None = Field(
        None, description="of all tasks of a path or a named stream: folder that the paths of pictures start from"
    )
    paths: dict[TaskName, str] = Field(
        default_factory=dict, description="folders of single tasks of a named stream whose data lie elsewhere"
    )
    tasks: list[TaskConfig] | None = Field(None, description="tasks composed by hand")
    order: Annotated[list[str] | str | None, BeforeValidator(_order)] = Field(
        None,
        description="the tasks to learn, in order: their names, reverse, random:SEED, or an order of the named stream; "
        "where absent, all of them",
    )
    scoring: Literal["strict", "source"] = Field(
        "strict",
        description="whether a named stream is scored by whole answers or as its source does, where that differs; "
        "the other figure stands beside it",
    )
    options: FreeOptions = Field(
        default_factory=dict,
        description="options of a stream that is made, for example {size: 40, seed: 1} of chronicle",
    )

    @model_validator(mode="after")
    def _one_source(self) -> StreamConfig:
        if (self.tasks is not None) == (self.name is not None or self.path is not None):
            raise ValueError("give name (a stream, with the path of its data), or path (a folder), or tasks (a list)")
        if self.columns and (self.path is None or self.name is not None):
            raise ValueError("columns: belongs to a path alone; tasks that are listed have columns of their own")
        if self.images is not None and self.path is None:
            raise ValueError("images: belongs to a path; tasks that are listed have images of their own")
        if self.name is None:
            for key in ("paths", "scoring"):  # they may be given with their defaults, as in run.json
                if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                    raise ValueError(f"{key}: only a named stream (stream.name) has it")
        return self


class DataConfig(Section):
    """How rows become tokens."""

    example: ClassVar[str] = "{max_length: 512}"

    max_length: int | None = Field(
        None, ge=8, description="tokens of prompt and answer together; the model's context where absent"
    )
    template: Literal["auto", "chat", "plain"] = Field(
        "auto", description="chat: the tokenizer's chat template; plain: prompt, space, answer; auto: chat if it exists"
    )
    supervise: Literal["answer", "all"] = Field("answer", description="tokens that the loss counts")
    packing: bool = Field(False, description="put several short rows into one sequence of max_length tokens")
    long_answers: Literal["error", "cut"] = Field(
        "error",
        description="train rows whose answer alone is too long: stop, or cut its end, so that it has no end token",
    )
    on_overlap: Literal["error", "warn", "drop"] = Field(
        "warn", description="what to do with test rows that stand in the train split; drop removes them from train"
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        "stop", description="rows that cannot be used: stop and list them all, or leave them out and say how many"
    )
    reasoning: Literal["template", "drop"] = Field(
        "template", description="reasoning before answers: as the chat template shows it, or left out of every row"
    )
    hold_out: float = Field(
        0.1, gt=0, lt=1, description="share of the rows of a task in one file that are held out as its test split"
    )
    train_rows: int | None = Field(None, ge=1, description="use only the first n train rows of each task")
    test_rows: int | None = Field(None, ge=1, description="use only the first n test rows of each task")
    cache: str | None = Field(
        None,
        description="folder in which the tokens of large tasks lie, for this start and later ones; yours to clear",
        json_schema_extra=FREE,
    )
