"""From a configuration to all that a run needs, checked before anything is trained or written."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

from holdfast import methods, tuners
from holdfast.compatibility import refusal
from holdfast.config import ModelConfig, Named, RunConfig
from holdfast.data.benchmark import general_samples
from holdfast.data.collate import pack
from holdfast.data.encode import Encoder, load_tokenizer, resolve_max_length
from holdfast.data.load import load_general, load_stream
from holdfast.data.task import General, Stream, Task
from holdfast.errors import ConfigError, did_you_mean
from holdfast.evaluation.general import matrix_name
from holdfast.gate import check_limits, is_general_loss
from holdfast.methods.base import Method
from holdfast.quantization import check_quantization
from holdfast.tuners.base import Tuner

FSDP2_SINCE = (5, 23)
"""The version of transformers that trains what it has sharded itself."""


@dataclass(frozen=True)
class Planned:
    """A stage to come. ``row`` is the row of the score matrix that is measured after it."""

    index: int
    name: str
    tasks: tuple[Task, ...]
    row: int


@dataclass
class Setup:
    """All that a run needs but the model's weights.

    Attributes:
        methods: those of the configuration.
        companion: what the tuner brings along.
        rows: each task's tokenised train rows.
    """

    config: RunConfig
    stream: Stream
    general: list[General]
    methods: list[Method]
    tuner: Tuner
    companion: Method | None
    encoder: Encoder
    max_length: int
    rows: dict[str, list[dict[str, Any]]]
    stages: list[Planned]

    @property
    def applied(self) -> list[Method]:
        """What the trainer applies: the methods, and then the tuner's companion."""
        return self.methods if self.companion is None else [*self.methods, self.companion]

    def facts(self) -> dict[str, Any]:
        """What run.json says of the data."""
        return {
            "stream": {"name": self.stream.name, "version": self.stream.version},
            "tasks": {
                task.name: {
                    "train": len(task.train),
                    "test": len(task.test),
                    "metric": task.metric,
                    "fingerprint": task.fingerprint,
                }
                | dataclasses.asdict(task.counts)
                for task in self.stream.tasks
            },
            "max_length": self.max_length,
            "truncated_train_rows": self.encoder.truncated,
            "cut_answers": self.encoder.cut_answers,
        }


def prepare(config: RunConfig) -> Setup:
    """Check the configuration and load and tokenise every task.

    Raises:
        UserError: something in the configuration or the data cannot be used.
    """
    config = with_general_samples(config)
    chosen = methods.build([(method.name, method.options) for method in config.method])
    config = resolve(config, chosen)
    assert config.tuner is not None
    tuner = tuners.build(config.tuner)
    check_quantization(config.model, tuner)
    check_engine(config.training.engine)
    check_arguments(config.training.arguments, RESERVED)
    model_config = load_model_config(config.model)
    max_length = resolve_max_length(config.data.max_length, model_config, tuner.virtual_tokens)
    tokenizer = load_tokenizer(config.model)
    encoder = Encoder(
        tokenizer,
        max_length=max_length,
        template=config.data.template,
        supervise=config.data.supervise,
        long_answers=config.data.long_answers,
    )
    stream = load_stream(config.stream, config.data, config.evaluation)
    general = load_general(config.evaluation.general, stream)
    check_watching(config, general, stream.tasks)
    stages = plan(chosen, stream)
    epochs = config.training.epochs
    if isinstance(epochs, list) and len(epochs) != len(stages):
        raise ConfigError(f"training.epochs: has {len(epochs)} entries, but the run has {len(stages)} stages")
    rows = {task.name: encoder.encode_all(task.train) for task in stream.tasks}
    tuner.plan(config.training, sum(optimizer_steps(config, stage, rows, max_length) for stage in stages))
    return Setup(config, stream, general, chosen, tuner, tuner.companion(), encoder, max_length, rows, stages)


def check_engine(engine: str | None) -> None:
    """ConfigError if what the engine needs is not installed."""
    if engine is not None and engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"training.engine: {engine} needs DeepSpeed (docs/launch.md: Which engine); or use fsdp2")
    if engine == "fsdp2":
        found, needed = importlib.metadata.version("transformers"), ".".join(map(str, FSDP2_SINCE))
        if tuple(map(int, found.split(".")[:2])) < FSDP2_SINCE:
            raise ConfigError(f"training.engine: fsdp2 needs transformers {needed} or newer, and this is {found}")


def check_watching(config: RunConfig, general: list[General], tasks: list[Task]) -> None:
    """ConfigError if the run does not measure what its gate, or watching it, needs."""
    names = [matrix_name(measure) for measure in general]
    if config.evaluation.watch_general and not any(map(is_general_loss, names)):
        raise ConfigError("evaluation.watch_general: the run measures no loss on general text; name one in general")
    if config.gate is not None:
        check_limits(config.gate, names, [task.metric for task in tasks])
        if config.gate.stop_early and config.evaluation.watch_general is None:
            raise ConfigError("gate.stop_early: needs evaluation.watch_general (or --watch-general), which measures it")


def with_general_samples(config: RunConfig) -> RunConfig:
    """The configuration with the stream's own general samples, where it has such, as the path of each method that
    rehearses general texts and names none."""
    samples = general_samples(config.stream)

    def filled(named: Named) -> Named:
        fields = methods.find(named.name).Options.model_fields
        source = named.options.get("source", fields["source"].default if "source" in fields else None)
        if source != "general" or {"path", "dataset"} & set(named.options):
            return named
        return Named(name=named.name, **named.options, path=samples)

    if samples is None:
        return config
    return config.model_copy(update={"method": [filled(named) for named in config.method]})


def resolve(config: RunConfig, chosen: list[Method] | None = None) -> RunConfig:
    """The configuration with the tuner that its methods need, and the general samples of its stream, where it names
    none.

    Args:
        chosen: the configuration's methods, where they are built already.

    Raises:
        ConfigError: the tuner is not one that a method works with, or two methods need different ones.
    """
    if chosen is None:
        config = with_general_samples(config)
        chosen = methods.build([(method.name, method.options) for method in config.method])
    bound = [method for method in chosen if method.tuners]
    if config.tuner is None:
        wished = [m.default_tuner for m in chosen if m.default_tuner != Method.default_tuner] or [Method.default_tuner]
        common = [name for name in (bound[0].tuners if bound else wished) if all(name in m.tuners for m in bound)]
        if not common:
            needs = "; ".join(f"{method.name!r} needs {' or '.join(method.tuners)}" for method in bound)
            raise ConfigError(f"method: these cannot be applied together, since no tuner suits them all: {needs}")
        config = config.model_copy(update={"tuner": Named(name=common[0])})
    assert config.tuner is not None
    for method in chosen:
        reason = refusal(method, config.tuner.name)
        if reason:
            raise ConfigError(f"tuner: {reason}")
    return config


def plan(chosen: list[Method], stream: Stream) -> list[Planned]:
    """The stages of a run: one a task, one for all tasks, or none."""
    schedule = chosen[0].schedule
    if schedule == "none":
        return []
    if schedule == "joint":
        return [Planned(1, "joint", tuple(stream.tasks), len(stream.tasks))]
    return [Planned(t, task.name, (task,), t) for t, task in enumerate(stream.tasks, start=1)]


def optimizer_steps(config: RunConfig, stage: Planned, rows: dict[str, list[dict[str, Any]]], max_length: int) -> int:
    """How many optimizer steps a stage takes.

    Args:
        rows: each task's tokenised train rows.
    """
    training = config.training
    if training.max_steps is not None:
        return training.max_steps
    sequences = [row for task in stage.tasks for row in rows[task.name]]
    if config.data.packing:
        sequences = pack(sequences, max_length)
    epochs = training.epochs[stage.index - 1] if isinstance(training.epochs, list) else training.epochs
    return math.ceil(epochs * math.ceil(len(sequences) / training.batch_size))


def load_model_config(model: ModelConfig) -> Any:
    """The model's transformers configuration.

    Raises:
        ConfigError: there is no such model, or it is not one that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name: {model.name!r} cannot be used as a model: {error}") from None


def check_arguments(arguments: dict[str, Any], taken: dict[str, str]) -> None:
    """ConfigError if training.arguments names a field that TrainingArguments lacks or that another key stands for.

    Args:
        taken: the keys that stand for fields.
    """
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for key in arguments:
        if key in taken:
            raise ConfigError(f"training.arguments.{key}: is set by the run; use {taken[key]} instead")
        if key not in known:
            raise ConfigError(f"training.arguments.{key}: unknown key{did_you_mean(key, known)}")


RESERVED = {
    "output_dir": "output",
    "num_train_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "per_device_train_batch_size": "training.batch_size and training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_steps": "training.warmup",
    "weight_decay": "training.weight_decay",
    "optim": "training.optimizer",
    "max_grad_norm": "training.max_grad_norm",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "seed": "seed",
    "data_seed": "seed",
    "save_steps": "training.save_every",
    "save_strategy": "training.save_every",
    "save_total_limit": "training.save_every",
    "logging_steps": "training.log_every",
    "logging_strategy": "training.log_every",
    "remove_unused_columns": "data",
}
