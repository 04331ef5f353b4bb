"""Turn a configuration into all that a run needs, with checks before anything is trained or written."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast import methods, tuners
from holdfast.api.method import Method
from holdfast.api.scorer import Scorer
from holdfast.api.task import General, Stream
from holdfast.api.tuner import Tuner
from holdfast.config.model import ModelConfig
from holdfast.config.run import RunConfig, placed
from holdfast.config.section import Named
from holdfast.config.training import TrainingConfig
from holdfast.data.benchmark import general_samples
from holdfast.data.encode import Encoder, resolve_max_length
from holdfast.data.encode_apart import encoder_of
from holdfast.data.load import first_tasks_version
from holdfast.data.texts import is_hub_name, no_path
from holdfast.engines.profiles import check_engine
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.evaluation.general import matrix_name
from holdfast.methods.compatibility import refusal
from holdfast.models.precision import Machine, fastest_precision
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.quantization import check_quantization
from holdfast.models.sight import load_sight
from holdfast.records.directory import RunDirectory
from holdfast.records.gate import check_limits, is_general_loss
from holdfast.records.growth import Past
from holdfast.rehearsal.keep import Keep
from holdfast.runner.answering import check_engine_of_answers
from holdfast.runner.data import RunData, load_data
from holdfast.runner.kinds import check_kinds
from holdfast.runner.plan import PlannedStage, Rows, optimizer_steps, plan, stage_training
from holdfast.runner.quiz import askable, with_quiz
from holdfast.runner.rows import check_vocabulary, encode_dev, encode_tasks, try_rows
from holdfast.runner.seq2seq import check_answers, check_seq2seq
from holdfast.runner.sight import check_sight
from holdfast.training.arguments import RESERVED, check_arguments

logger = logging.getLogger("holdfast")

NEW = Past()
"""Of a run that begins."""


@dataclass(frozen=True)
class Resolved:
    """A complete configuration, and the methods and the tuner that it names.

    Attributes:
        config: names the tuner, and the path of the texts for each method that rehearses general texts.
        methods: new: no stage has used them.
        tuner: new: it has prepared no model.
        samples: the stream's own file of general samples, if it has one.
        keep: the budget, if there is one, over these methods.
    """

    config: RunConfig
    methods: list[Method]
    tuner: Tuner
    samples: str | None = None
    keep: Keep | None = None


@dataclass
class Setup:
    """All that a run needs, except the model's weights.

    Attributes:
        methods: those of the configuration.
        companion: a method that belongs to the tuner.
        scorers: of the tasks' metrics, by name.
        rows: each task's tokenised train rows.
        limits: tokens of the longest response to each task that is answered.
        stages: in order, without the start.
        training: the settings of each stage, with the epochs of that stage alone.
        steps: optimizer steps of each stage.
        past: what the run did before this start.
        samples: the stream's own file of general samples, if it has one.
        keep: the budget, if there is one.
        dev: tokenised dev rows of the tasks that are left, where a method reads them.
        types: why the data types of weights and training are what they are, where ``auto`` settled them.
    """

    config: RunConfig
    stream: Stream
    scorers: dict[str, Scorer]
    general: list[General]
    methods: list[Method]
    tuner: Tuner
    companion: Method | None
    encoder: Encoder
    max_length: int
    rows: Rows
    limits: dict[str, int]
    stages: list[PlannedStage]
    training: list[TrainingConfig]
    steps: list[int]
    past: Past
    samples: str | None = None
    keep: Keep | None = None
    dev: Rows = field(default_factory=dict)
    types: str = ""

    @property
    def applied(self) -> list[Method]:
        """The methods that the trainer applies: those of the configuration, the tuner's companion, and the budget."""
        return [*self.methods, *(method for method in (self.companion, self.keep) if method is not None)]

    @property
    def planned_steps(self) -> int:
        """Optimizer steps of the stages that the run began with, without those of tasks that were appended since."""
        return sum(self.steps[: self.past.planned])

    def facts(self, count: int | None = None) -> dict[str, Any]:
        """The facts about the data, for run.json.

        Args:
            count: of the first tasks alone; None: of all.
        """
        tasks = self.stream.tasks[:count]
        version = first_tasks_version(self.stream, len(tasks), self.scorers)
        return {
            "stream": {"name": self.stream.name, "version": version},
            "tasks": {
                task.name: {
                    "train": len(task.train) if task.gone is None else task.gone[0],
                    "test": len(task.test) if task.gone is None else task.gone[1],
                    "metric": task.metric,
                    "fingerprint": task.fingerprint,
                }
                | dataclasses.asdict(task.counts)
                for task in tasks
            },
            "max_length": self.max_length,
            "truncated_train_rows": self.encoder.truncated,
            "cut_answers": self.encoder.cut_answers,
        }

    def config_of(self, stage: PlannedStage) -> RunConfig:
        """The configuration of a stage, with its own settings of training."""
        return self.config.model_copy(update={"training": self.training[stage.index - 1]})

    def fingerprint(self, stage: PlannedStage) -> str:
        """The fingerprints of a stage's tasks, with spaces between them."""
        return " ".join(task.fingerprint for task in stage.tasks)

    def renewed(self) -> Setup:
        """The setup of a new process, with new methods and a new tuner; the data stay loaded and tokenised."""
        chosen, tuner = build_methods(self.config), build_tuner(self.config)
        tuner.plan(self.config.training, self.planned_steps)
        keep = build_keep(self.config, chosen)
        return replace(self, methods=chosen, tuner=tuner, companion=tuner.companion(), keep=keep)


def resolve(config: RunConfig) -> Resolved:
    """Complete a configuration with the tuner that its methods need and its stream's general samples.

    Raises:
        ConfigError: a method, a tuner or an option is unknown or wrong, the tuner is not one that a method works with,
            or two methods need different ones.
    """
    samples = general_samples(config.stream)
    if samples is not None:
        config = config.model_copy(update={"method": [_with_samples(named, samples) for named in config.method]})
    chosen = build_methods(config)
    if config.tuner is None:
        config = config.model_copy(update={"tuner": Named(name=_common_tuner(chosen))})
    assert config.tuner is not None
    for method in chosen:
        if reason := refusal(method, config.tuner.name):
            raise ConfigError(f"tuner: {reason}")
    tuner = build_tuner(config)
    if tuner.name == "lora":  # a record without it is that of a run with the former default
        named = Named(**config.tuner.model_dump() | {"lora_dropout": tuner.options.lora_dropout})
        config = config.model_copy(update={"tuner": named})
    return Resolved(config, chosen, tuner, samples, build_keep(config, chosen))


def prepare(resolved: Resolved, data: RunData | None = None, past: Past = NEW, *, begins: bool = False) -> Setup:
    """Check the rest of a configuration, and load and tokenise every task.

    Args:
        data: what :func:`load_data` gave, if it is loaded already.
        past: what the run did before, where it goes on.
        begins: whether the run begins. On a model with a chat template it has the built-in quiz, if neither the
            configuration nor the stream says what is measured of general ability.

    Raises:
        UserError: something in the configuration or the data cannot be used.
    """
    config, tuner = resolved.config, resolved.tuner
    check_quantization(config.model, tuner.name, tuner.quantized)
    check_engine(config.training.engine, config.training.optimizer)
    check_arguments(config.training.arguments, RESERVED)
    check_texts(resolved.methods)
    warn_of_rehearsed(resolved.config, resolved.methods)
    model_config = load_model_config(config.model)
    check_dtype(config.model, model_config)
    config, types = settle_types(config, model_config, tuner)
    check_seq2seq(model_config, config, resolved.methods, tuner)
    check_sight(model_config, config, resolved.methods, tuner)
    check_engine_of_answers(config, model_config, resolved.methods, tuner)
    encoder = build_encoder(resolved)
    max_length = encoder.max_length
    for method in resolved.methods:
        method.try_samples(encoder.tokenizer, model_config, encoder.apart().encode_all)
    data = data or load_data(config)
    stream, general = data.stream, data.general
    if begins and config.evaluation.general is None and not general and (quiz := askable(encoder)):
        config, general = with_quiz(config), quiz
    check_watching(config, general, [data.scorers[task.metric] for task in stream.tasks])
    check_answers(model_config, stream.tasks)
    check_kinds(stream.tasks, resolved.methods, tuner.name, config, max_length)
    stages = plan(resolved.methods, stream)
    for method in resolved.methods:
        method.plan(len(stages))
    training = stage_training(config.training, stages, past.training)
    rows, limits = encode_tasks(stream, encoder, config)
    check_vocabulary(rows, encoder, config.model)
    left = [task for stage in stages if stage.index not in past.finished for task in stage.tasks]
    for method in resolved.methods:
        try_rows(method, left, rows, config, encoder)
    dev = next((encode_dev(left, encoder, config, method) for method in resolved.methods if method.needs_dev), {})
    steps = [
        optimizer_steps(settings, config.data, stage, rows, max_length)
        for settings, stage in zip(training, stages, strict=True)
    ]
    setup = Setup(
        config=config,
        stream=stream,
        scorers=data.scorers,
        general=general,
        methods=resolved.methods,
        tuner=tuner,
        companion=None,
        encoder=encoder,
        max_length=max_length,
        rows=rows,
        limits=limits,
        stages=stages,
        training=training,
        steps=steps,
        past=past,
        samples=resolved.samples,
        keep=resolved.keep,
        dev=dev,
        types=types,
    )
    tuner.plan(config.training, setup.planned_steps)
    return replace(setup, companion=tuner.companion())


def check_growth(setup: Setup, directory: RunDirectory) -> list[str]:
    """The tasks that are new to the run in a directory.

    Raises:
        RunDirectoryError: the stream is not the run's with tasks appended, or the run cannot grow.
    """
    appended = directory.appended(setup.config, [task.name for task in setup.stream.tasks])
    method = setup.methods[0]
    if appended and method.schedule == "joint":
        raise RunDirectoryError(
            f"{directory.path}: method {method.name!r} learned all tasks in one stage, and none comes after it, so "
            f"{', '.join(appended)} cannot be appended; give another directory"
        )
    return appended


def check_texts(methods: Sequence[Method]) -> None:
    """Check that the files and folders that methods' options name are there.

    Raises:
        ConfigError: one is not.
    """
    for method in methods:
        for option in method.inputs:
            name = getattr(method.options, option, None)
            if not isinstance(name, str) or Path(name).exists():
                continue
            if option == "path" or not is_hub_name(name):
                raise ConfigError(f"method {method.name}: {option}: {no_path(Path(name))}")


def warn_of_rehearsed(config: RunConfig, methods: Sequence[Method]) -> None:
    """Warn of general abilities that are measured on files which a method rehearses."""
    named = [(method.name, getattr(method.options, option, None)) for method in methods for option in method.inputs]
    rehearsed = [(name, Path(path).resolve()) for name, path in named if isinstance(path, str) and Path(path).exists()]
    for measure in config.evaluation.general or ():
        measured = Path(measure.path).resolve()
        for name, path in rehearsed if measure.path else ():
            if measured.is_relative_to(path):
                logger.warning(
                    "evaluation.general: %r is measured on what %s rehearses, so it tells how well that is kept and "
                    "not what else is lost; other texts of the kind would",
                    *(measure.name, name),
                )


def check_dtype(model: ModelConfig, model_config: Any) -> None:
    """Refuse to train weights in float16, as ``dtype: stored`` would take them from some files.

    Raises:
        ConfigError: they would be.
    """
    stored = str(getattr(model_config, "dtype", None)).removeprefix("torch.")
    if model.dtype == "stored" and stored == "float16":
        raise ConfigError(
            f"model.dtype: stored takes the float16 of {model.name!r}, in which optimizers overflow; auto, float32 or "
            "bfloat16 would do"
        )


def settle_types(config: RunConfig, model_config: Any, tuner: Tuner) -> tuple[RunConfig, str]:
    """Settle ``model.dtype`` and ``training.precision`` where they are auto.

    Where both are, they follow from the machine, the model and the tuner; where one is given, the other is float32.

    Returns:
        the configuration, and why; empty where they were given.
    """
    model, training, why = config.model, config.training, ""
    if model.dtype == training.precision == "auto":
        chosen = fastest_precision(
            Machine.this(),
            model_config,
            frozen=tuner.frozen_base,
            quantized=model.quantization is not None,
            alone=training.engine in (None, "ddp"),
        )
        model = model.model_copy(update={"dtype": chosen.weights})
        training, why = training.model_copy(update={"precision": chosen.computation}), chosen.why
    if model.dtype == "auto":
        model = model.model_copy(update={"dtype": "float32"})
    if training.precision == "auto":
        training = training.model_copy(update={"precision": "float32"})
    return config.model_copy(update={"model": model, "training": training}), why


def build_encoder(resolved: Resolved) -> Encoder:
    """Make the encoder of a run's rows."""
    model, data = resolved.config.model, resolved.config.data
    model_config, tokenizer = load_model_config(model), load_tokenizer(model)
    return encoder_of(
        model_config,
        tokenizer,
        load_sight(model, model_config, tokenizer),
        max_length=resolve_max_length(data.max_length, model_config, resolved.tuner.virtual_tokens),
        template=data.template,
        supervise=data.supervise,
        long_answers=data.long_answers,
    )


def build_methods(config: RunConfig) -> list[Method]:
    """Make new methods from a configuration."""
    return methods.build([(method.name, method.options) for method in placed(config).method])


def build_keep(config: RunConfig, chosen: list[Method]) -> Keep | None:
    """Make the budget of a configuration, if it has one, which weighs the rehearsal of these methods.

    Raises:
        ConfigError: none of them rehearses what the budget is about.
    """
    return None if config.keep is None else Keep(config.keep, chosen)


def build_tuner(config: RunConfig) -> Tuner:
    """Make a new tuner from a configuration that names one."""
    assert config.tuner is not None
    return tuners.build(config.tuner)


def check_watching(config: RunConfig, general: list[General], scorers: list[Scorer]) -> None:
    """Check that the run measures what its gate and its watching need.

    Raises:
        ConfigError: it does not.
    """
    names = [matrix_name(measure) for measure in general]
    if config.evaluation.watch_general and not any(map(is_general_loss, names)):
        raise ConfigError("evaluation.watch_general: the run measures no loss on general text; name one in general")
    if config.gate is not None:
        check_limits(config.gate, names, scorers)
        check_left_out(config)
        if config.gate.stop_early and config.evaluation.watch_general is None:
            raise ConfigError("gate.stop_early: needs evaluation.watch_general (or --watch-general), which measures it")


def check_left_out(config: RunConfig) -> None:
    """Check that nothing which the gate judges after every stage is left out.

    Raises:
        ConfigError: something is.
    """
    settings, limits = config.evaluation, config.gate.limits if config.gate is not None else {}
    for key in ("max_forgetting", "max_task_forgetting", "min_average"):
        if key in limits and settings.when == "last":
            raise ConfigError(
                f"gate.{key}: needs all tasks learned so far, which evaluation.when: last leaves out; use learned, or "
                "all"
            )
    for key in ("max_general_drop", "max_general_loss_increase"):
        if key in limits and settings.general_when == "last":
            raise ConfigError(
                f"gate.{key}: needs general abilities after every stage, which evaluation.general_when: last leaves "
                "out; use all"
            )


def _with_samples(named: Named, samples: str) -> Named:
    """The method; if it rehearses general texts and names none, the stream's general samples become its path."""
    fields = methods.find(named.name).Options.model_fields
    source = named.options.get("source", fields["source"].default if "source" in fields else None)
    if source != "general" or {"path", "dataset"} & set(named.options):
        return named
    return Named.model_validate({"name": named.name} | named.options | {"path": samples})


def _common_tuner(chosen: list[Method]) -> str:
    """The first tuner that suits all methods.

    Raises:
        ConfigError: there is none.
    """
    bound = [method for method in chosen if method.tuners]
    wished = [m.default_tuner for m in chosen if m.default_tuner != Method.default_tuner] or [Method.default_tuner]
    common = [name for name in (bound[0].tuners if bound else wished) if all(name in m.tuners for m in bound)]
    if not common:
        needs = "; ".join(f"{method.name!r} needs {' or '.join(method.tuners)}" for method in bound)
        raise ConfigError(f"method: these cannot be applied together, since no tuner suits them all: {needs}")
    return common[0]
