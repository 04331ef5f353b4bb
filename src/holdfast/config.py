"""The run's configuration: one pydantic model, every field documented, unknown keys refused with a near name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from holdfast.errors import ConfigError, did_you_mean

# A key marked so may change between two starts of the same run: no number of what is done already depends on it.
FREE: Any = {"free": True}


class Section(BaseModel):
    """A part of the configuration: keys it does not know are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelConfig(Section):
    """Which pretrained model to start from."""

    name: str = Field(description="folder or hub name of a causal language model with its tokenizer")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "float32", description="data type of the weights; auto: as stored in the checkpoint"
    )
    quantization: Literal["4bit"] | None = Field(
        None, description="hold the frozen weights in 4 bits (NF4, QLoRA) and compute in dtype; needs bitsandbytes"
    )
    attention: str | None = Field(
        None, description="attention implementation of transformers (eager, sdpa, flash_attention_2, ...)"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with this model; off unless you ask")


class Named(Section):
    """A tuner or method by name, with its own options, which its own class checks."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="its name; `holdfast methods` and `holdfast tuners` list them")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _text(value: Any) -> Any:
    """Names of tasks may be years, which YAML reads as numbers."""
    return str(value) if type(value) is int else value


TaskName = Annotated[str, BeforeValidator(_text)]


class TaskOptions(Section):
    """How a task's rows are read and scored."""

    columns: dict[str, str] = Field(
        default_factory=dict,
        description="renames columns of the source to those of a format, for example {text: sentence}",
    )
    format: str | None = Field(
        None, description="prompt_answer, sentence_label, messages, sharegpt, alpaca or text; detected where absent"
    )
    metric: str | None = Field(
        None, description="how it is scored (`holdfast streams --metrics` lists the metrics); by format where absent"
    )
    beside: list[str] = Field(
        default_factory=list, description="further metrics of the same responses, reported beside the score matrix"
    )
    labels: list[str] | None = Field(
        None, description="every answer there may be; a sentence_label folder has them in labels.json"
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
    turns: Literal["last", "each"] = Field(
        "last", description="a test conversation is asked for its last answer, or for each after the true ones before"
    )
    max_new_tokens: int | None = Field(None, ge=1, description="longest response, where evaluation does not say")

    @model_validator(mode="after")
    def _prompt_and_input(self) -> TaskOptions:
        if self.prompt is not None:
            unknown = set(re.findall(r"\{\w*\}", self.prompt)) - {"{instruction}", "{labels}", "{sentence}"}
            if unknown or self.prompt.count("{sentence}") != 1:
                raise ValueError("prompt: must hold {sentence} once, and of {...} else only {instruction} and {labels}")
        if self.input is not None:
            try:
                groups = re.compile(self.input).groups
            except re.error as error:
                raise ValueError(f"input: {self.input!r} is no regular expression: {error}") from None
            if groups != 1:
                raise ValueError(f"input: {self.input!r} must have exactly one group, around what the prompt is about")
        return self


class TaskConfig(TaskOptions):
    """One task of a stream that is composed by hand."""

    name: TaskName = Field(description="what the task is called in the matrix and the report")
    path: str | None = Field(None, description="folder with train, eval (or dev) and test files")
    dataset: str | None = Field(None, description="a Hugging Face dataset: hub name or local folder")
    subset: str | None = Field(None, description="configuration name of the Hugging Face dataset")

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either path (a folder) or dataset (a Hugging Face dataset)")
        return self


def _order(value: Any) -> Any:
    if isinstance(value, list):
        value = [_text(name) for name in value]
        if not all(isinstance(name, str) for name in value):
            raise ValueError(f"must be names of tasks, not {value!r}")
        if len(value) == 0 or len(set(value)) != len(value):
            raise ValueError("must name at least one task, and each task once")
    elif isinstance(value, str) and value.startswith("random") and not re.fullmatch(r"random:\d+", value):
        raise ValueError(f"{value!r} must say its seed, for example random:0")
    elif value is not None and not isinstance(value, str):
        raise ValueError(f"must be a list of tasks, reverse, random:SEED or an order by name, not {value!r}")
    return value


class StreamConfig(Section):
    """Tasks in an order: a stream by name, a folder of task folders, or a list of tasks."""

    name: str | None = Field(None, description="a benchmark or the built-in stream (`holdfast streams` lists them)")
    path: str | None = Field(
        None, description="folder of the named stream's data; alone, one in which every task is a folder"
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
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of a stream that is made, for example {size: 40, seed: 1} of chronicle",
    )

    @model_validator(mode="after")
    def _one_source(self) -> StreamConfig:
        if (self.tasks is not None) == (self.name is not None or self.path is not None):
            raise ValueError("give name (a stream, with the path of its data), or path (a folder), or tasks (a list)")
        if self.name is None:
            for key in ("paths", "scoring"):  # run.json names their defaults, too
                if getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True):
                    raise ValueError(f"{key}: only a named stream (stream.name) has it")
        return self


class DataConfig(Section):
    """How rows become tokens."""

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
    train_rows: int | None = Field(None, ge=1, description="use only the first n train rows of each task")
    test_rows: int | None = Field(None, ge=1, description="use only the first n test rows of each task")


Engine = Literal["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3_offload"]


class TrainingConfig(Section):
    """One stage's training; what is not here goes into `arguments`."""

    epochs: float | list[float] = Field(1.0, description="passes over a task's train split; a list gives one per stage")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps a stage at most, instead of epochs")
    batch_size: int = Field(16, ge=1, description="rows in one optimizer step, over all processes and accumulation")
    micro_batch_size: int | None = Field(
        None, ge=1, description="rows in one forward pass of one process; batch_size must be a multiple of it"
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    schedule: str = Field("cosine", description="transformers' name of a schedule: cosine, linear, constant, ...")
    warmup: float = Field(0.03, ge=0, description="below 1: share of a stage's steps; from 1: steps")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    optimizer: str = Field("adamw_torch", description="transformers' name of an optimizer")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are clipped to this norm; 0 turns clipping off")
    precision: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16: mixed precision (autocast)")
    engine: Engine | None = Field(
        None,
        description="how processes divide the work: ddp, fsdp2, zero0 to zero3, zero3_offload; absent: ddp",
        json_schema_extra=FREE,
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass to save memory")
    save_every: int = Field(200, ge=1, description="optimizer steps between checkpoints", json_schema_extra=FREE)
    log_every: int = Field(10, ge=1, description="steps between lines of events.jsonl", json_schema_extra=FREE)
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="any other field of transformers.TrainingArguments, by its name"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}; "
                f"{self.batch_size // micro * micro or micro} or {-(-self.batch_size // micro) * micro} would be"
            )
        for epochs in self.epochs if isinstance(self.epochs, list) else [self.epochs]:
            if epochs <= 0:
                raise ValueError(f"epochs must be greater than 0, not {epochs}")
        return self


HARNESS = ("tasks", "include_path", "num_fewshot", "limit", "apply_chat_template", "metric")
"""Keys of a measure of general ability that are for lm-evaluation-harness."""


class GeneralConfig(Section):
    """One measure of general ability, taken before training and after every stage."""

    name: str = Field(
        "", description="what it is called in the matrix and the report; of lm_eval, put before each task's name"
    )
    path: str = Field("", description="file of texts or prompts (.txt, .jsonl) or of questions with choices (.jsonl)")
    kind: Literal["perplexity", "choices", "refusals", "lm_eval"] = Field(
        "perplexity",
        description="perplexity of texts, accuracy of the likeliest of several choices, share of prompts refused, or "
        "tasks of lm-evaluation-harness",
    )
    rows: int | None = Field(None, ge=1, description="use only the first n rows")
    by: Literal["answer", "letter"] = Field(
        "answer", description="of choices, which likelihood is compared: that of the whole answer, or of its letter"
    )
    shots: int = Field(0, ge=0, description="of choices by letter, answered questions of the same subject shown before")
    demonstrations: str | None = Field(None, description="file of the questions that shots shows, such as MMLU's dev")

    max_new_tokens: int = Field(64, ge=1, description="of refusals, longest response")
    tasks: list[str] = Field(default_factory=list, description="of lm_eval, names of tasks, groups or tags")
    include_path: str | None = Field(None, description="of lm_eval, folder of task definitions (YAML) of your own")
    num_fewshot: int | None = Field(None, ge=0, description="of lm_eval, examples shown; where absent, the task's own")
    limit: float | None = Field(None, gt=0, description="of lm_eval, first examples of each task; below 1, their share")
    apply_chat_template: bool = Field(False, description="of lm_eval, ask in the tokenizer's chat template")
    metric: str | None = Field(
        None, description="of lm_eval, such as acc_norm or exact_match,strict-match; where absent, each task's first"
    )

    @property
    def harness(self) -> dict[str, Any]:
        """What lm-evaluation-harness is told."""
        return self.model_dump(include=set(HARNESS))

    @model_validator(mode="after")
    def _of_kind(self) -> GeneralConfig:
        if self.kind == "lm_eval":
            if not self.tasks:
                raise ValueError("tasks: kind lm_eval needs them, for example tasks: [hellaswag]")
            others = set(GeneralConfig.model_fields) - {"name", "kind", *HARNESS}
            wrong = f"is not for kind lm_eval, which has {', '.join(HARNESS)}"
        else:
            for key in ("name", "path"):
                if not getattr(self, key):
                    raise ValueError(f"{key}: is required but absent")
            others, wrong = set(HARNESS), f"is for kind lm_eval, not {self.kind}"
        for key in sorted(others):  # run.json names their defaults, too
            if getattr(self, key) != GeneralConfig.model_fields[key].get_default(call_default_factory=True):
                raise ValueError(f"{key}: {wrong}")
        return self

    @model_validator(mode="after")
    def _of_choices(self) -> GeneralConfig:
        if self.by == "letter" and self.kind != "choices":
            raise ValueError(f"by: letter is for kind choices, not {self.kind}")
        if self.shots and (self.by != "letter" or self.demonstrations is None):
            raise ValueError("shots: needs by: letter, and the questions to show, such as demonstrations: dev.jsonl")
        if self.demonstrations is not None and not self.shots:
            raise ValueError("demonstrations: needs shots, the number of them to show before a question, for example 5")
        return self


def _increase(value: float | str | None) -> float | str | None:
    """A number of nats, or a share with its sign of percent; on the command line both come as text."""
    if value is None:
        return None
    text = str(value)
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"must be a number of nats a token, such as 0.05, or a share, such as 2%, not {value!r}")
    return text if text.endswith("%") else number


class JudgeConfig(Section):
    """The language model that metric judge asks, behind an OpenAI-compatible endpoint."""

    url: str = Field(description="base of the endpoint, for example http://localhost:8000/v1")
    model: str = Field(description="the judge's name at the endpoint")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if one is needed")
    prompt: str = Field(
        "Question:\n{question}\n\nRight answer:\n{answer}\n\nResponse:\n{response}\n\n"
        "Does the response say what the right answer says, in whatever words? Reply with one word: "
        "correct or incorrect.",
        description="what the judge is asked, from {question}, {answer} and {response}; it must reply with correct or "
        "incorrect",
    )
    max_tokens: int = Field(512, ge=1, description="longest reply of the judge")
    concurrency: int = Field(8, ge=1, description="requests under way at once", json_schema_extra=FREE)
    timeout: float = Field(60.0, gt=0, description="seconds that a request may take", json_schema_extra=FREE)
    retries: int = Field(5, ge=0, description="how often a request that failed is repeated", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _asks_about_the_response(self) -> JudgeConfig:
        if "{response}" not in self.prompt:
            raise ValueError("prompt: must hold {response}, what is judged")
        return self


class EvaluationConfig(Section):
    """What is measured after every stage."""

    split: Literal["test", "dev"] = Field(
        "test", description="rows that the tasks are measured on: test, or their eval (dev) split, to choose settings"
    )
    batch_size: int = Field(32, ge=1, description="prompts generated together")
    max_new_tokens: int | None = Field(
        None,
        ge=1,
        description="longest response; where absent, the longest train answer of the task and 8 more, but no more than "
        "the task allows and half of data.max_length",
    )
    general: list[GeneralConfig] | None = Field(
        None, description="measures of general ability; where absent, those of the stream itself"
    )
    similarity_model: str = Field(
        "paraphrase-multilingual-MiniLM-L12-v2",
        description="Sentence Transformers model of metric semantic_similarity: folder or hub name",
    )
    judge: JudgeConfig | None = Field(None, description="the language model that metric judge asks")
    bootstrap: int = Field(1000, ge=0, description="resamples for 95 % intervals over test examples; 0 turns them off")
    every: int | None = Field(
        None,
        ge=1,
        description="steps between evaluations of a stage's own task while it trains, for its learning curve",
    )
    watch_general: int | None = Field(
        None, ge=1, description="steps between measurements of the loss on general text while a stage trains"
    )


class GateConfig(Section):
    """Limits on what may be forgotten, checked after every stage; the interval of a figure says how sure it is."""

    max_forgetting: float | None = Field(
        None,
        allow_inf_nan=False,
        description="forgetting at most, over the tasks learned so far",
        json_schema_extra=FREE,
    )
    max_task_forgetting: float | None = Field(
        None, allow_inf_nan=False, description="forgetting of any single task at most", json_schema_extra=FREE
    )
    max_general_loss_increase: Annotated[float | str | None, AfterValidator(_increase)] = Field(
        None,
        description="rise of each loss on general text since before training at most: in nats a token, or as a share "
        "of what it was, such as 2%",
        json_schema_extra=FREE,
    )
    max_general_drop: float | None = Field(
        None,
        allow_inf_nan=False,
        description="fall of each accuracy-like general ability since before training at most",
        json_schema_extra=FREE,
    )
    min_average: float | None = Field(
        None, allow_inf_nan=False, description="average over the tasks learned so far at least", json_schema_extra=FREE
    )
    min_new_task: float | None = Field(
        None, allow_inf_nan=False, description="score of a stage's own task at least", json_schema_extra=FREE
    )
    on_fail: Literal["stop", "rollback", "continue"] = Field(
        "stop",
        description="after a stage that fails: stop the run, go back to the last stage that passed, or go on",
        json_schema_extra=FREE,
    )
    stop_early: bool = Field(
        False,
        description="end a stage as soon as the general loss, as evaluation.watch_general measures it, is beyond "
        "max_general_loss_increase",
        json_schema_extra=FREE,
    )

    @property
    def limits(self) -> dict[str, Any]:
        """The limits that are given, by key."""
        return self.model_dump(exclude={"on_fail", "stop_early"}, exclude_none=True)

    @model_validator(mode="after")
    def _has_limits(self) -> GateConfig:
        if not self.limits:
            known = ", ".join(key for key in GateConfig.model_fields if key.startswith(("max_", "min_")))
            raise ValueError(f"gives no limit; at least one of {known} is needed")
        if self.stop_early and self.max_general_loss_increase is None:
            raise ValueError("stop_early needs max_general_loss_increase, the limit at which it stops")
        return self


def as_named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _stream(value: Any) -> Any:
    return {"tasks": value} if isinstance(value, list) else as_named(value)


def as_tuner(value: Any) -> Any:
    return {"name": "lora"} | value if isinstance(value, dict) else as_named(value)


def as_methods(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


NamedField = Annotated[Named, BeforeValidator(as_named)]


class RunConfig(Section):
    """A run: model x tuner x method x stream x seed, in one directory."""

    model: Annotated[ModelConfig, BeforeValidator(as_named)] = Field(
        description="the model to teach: a name or a section"
    )
    tuner: Annotated[Named | None, BeforeValidator(as_tuner)] = Field(
        None, description="which weights are trained: a name or a section; where absent, what the method needs, or lora"
    )
    method: Annotated[list[NamedField], BeforeValidator(as_methods)] = Field(
        [Named(name="sequential")],
        min_length=1,
        description="what is done against forgetting: a name, a section, or a list that is applied together",
    )
    stream: Annotated[StreamConfig, BeforeValidator(_stream)] = Field(description="the tasks, in order")
    data: DataConfig = Field(DataConfig(), description="how rows become tokens")
    training: TrainingConfig = Field(TrainingConfig(), description="one stage's training")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="what is measured")
    gate: GateConfig | None = Field(
        None, description="limits on what may be forgotten, checked after every stage", json_schema_extra=FREE
    )
    seed: int = Field(0, ge=0, description="every random choice of the run follows from it")
    output: str = Field(description="the run's directory", json_schema_extra=FREE)


def load_config(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> RunConfig:
    """Read a run's configuration.

    Args:
        source: a YAML file, or the mapping that such a file holds.
        overrides: ``key.path=value`` strings; values are YAML.

    Raises:
        ConfigError: a key is unknown, missing or wrong; the message names it and a near name.
    """
    return load(RunConfig, source, overrides)


def load(
    cls: type[Any],
    source: str | Path | dict[str, Any],
    overrides: list[str] | None = None,
    where: str = "the configuration",
) -> Any:
    """Read a configuration of any class, as :func:`load_config` does; ``where`` says where a mapping came from."""
    if isinstance(source, dict):
        values = dict(source)
    else:
        where, values = str(source), read_yaml(Path(source))
    for override in overrides or []:
        _apply_override(values, override)
    return validate(cls, values, where)


def validate(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """Build a pydantic model from a user's mapping; every complaint names its key and, for a typo, the near name.

    Raises:
        ConfigError: with one line a complaint.
    """
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        lines = [_complaint(cls, complaint) for complaint in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; ConfigError if the file is absent, unreadable or no mapping."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values, not {type(values).__name__}")
    return values


def difference(
    old: BaseModel | dict[str, Any], new: BaseModel | dict[str, Any], cls: type[BaseModel] = RunConfig
) -> list[str]:
    """List where two configurations differ, as ``key: old -> new``; keys that change no result are passed over.

    Args:
        cls: of both; it says which keys those are.
    """
    old, new = (flat(c) for c in (old, new))
    free = free_keys(cls)
    keys = [key for key in [*old, *(k for k in new if k not in old)] if key not in free]
    show = lambda side, key: json.dumps(side[key], ensure_ascii=False) if key in side else "(absent)"  # noqa: E731
    return [f"{key}: {show(old, key)} -> {show(new, key)}" for key in keys if old.get(key, ...) != new.get(key, ...)]


def flat(config: BaseModel | dict[str, Any]) -> dict[str, Any]:
    """Turn a configuration into ``{"training.epochs": 1.0, ...}``; lists stay whole."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= {f"{key}.{below}": v for below, v in flat(value).items()}
        else:
            result[key] = value
    return result


def free_keys(cls: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted names of the keys that may change between two starts of the same run."""
    keys = set()
    for name, field in cls.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free"):
            keys.add(prefix + name)
        section = _section(field.annotation)
        if section is not None:
            keys |= free_keys(section, f"{prefix}{name}.")
    return keys


def describe(cls: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key as (dotted name, default, description), for `holdfast run --help`."""
    rows = []
    for name, field in cls.model_fields.items():
        section = _section(field.annotation)
        if section is not None and section is not Named:
            rows.append((prefix + name, "required" if field.is_required() else "", field.description or ""))
            rows += describe(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append((prefix + name, default, field.description or ""))
    return rows


def _default(value: Any) -> str:
    if isinstance(value, Named):
        return value.name
    if isinstance(value, list) and value and all(isinstance(v, Named) for v in value):
        return ", ".join(v.name for v in value)
    return json.dumps(value)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The Section class of an annotation, looking through Annotated, unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        section = _section(part)
        if section is not None:
            return section
    return None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: an override is key.path=value, for example training.epochs=3")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    try:
        set_key(values, key, value)
    except ConfigError as error:
        raise ConfigError(f"{override!r}: {error}") from None


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key of a mapping, as ``key=value`` on the command line does.

    Raises:
        ConfigError: a part of the key is not a section.
    """
    *parents, last = key.split(".")
    for parent in parents:
        below = values.get(parent)
        if isinstance(below, str) and parent in ("model", "tuner", "method", "stream"):
            below = {"name": below}
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"{parent} is not a section but {below!r}")
        values[parent] = below = dict(below or {})
        values = below
    values[last] = value


def _complaint(cls: type[BaseModel], complaint: Any) -> str:
    location = [part for part in complaint["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
    key = ".".join(str(part) for part in location)
    section: type[BaseModel] | None = cls
    for part in location[:-1]:
        if isinstance(part, str) and section is not None and part in section.model_fields:
            section = _section(section.model_fields[part].annotation)
    known = list(section.model_fields) if section is not None else []
    match complaint["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{did_you_mean(str(location[-1]), known)}"
        case "missing":
            return f"{key}: is required but absent"
        case "value_error":
            return f"{key + ': ' if key else ''}{complaint['ctx']['error']}"
    message = complaint["msg"][0].lower() + complaint["msg"][1:]
    return f"{key}: {message}, not {complaint['input']!r}"


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 3e-4 as a number, as everybody expects."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
