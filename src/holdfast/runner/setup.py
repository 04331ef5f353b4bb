"""From a configuration to all that a run needs, checked before anything is trained or written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from holdfast import methods, tuners
from holdfast.api.method import Method
from holdfast.api.scorer import Scorer
from holdfast.api.task import General, Stream, Task
from holdfast.api.tuner import Tuner
from holdfast.config.run import RunConfig
from holdfast.config.section import Named
from holdfast.data.benchmark import general_samples
from holdfast.data.encode import Encoder, resolve_max_length
from holdfast.data.load import load_scorers, load_stream
from holdfast.engines.profiles import check_engine
from holdfast.errors import ConfigError
from holdfast.evaluation.abilities import load_general
from holdfast.evaluation.general import matrix_name
from holdfast.methods.compatibility import refusal
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.quantization import check_quantization
from holdfast.records.gate import check_limits, is_general_loss
from holdfast.runner.plan import PlannedStage, optimizer_steps, plan
from holdfast.training.arguments import RESERVED, check_arguments


@dataclass
class Setup:
    """All that a run needs but the model's weights.

    Attributes:
        methods: those of the configuration.
        companion: what the tuner brings along.
        scorers: of the tasks' metrics, by name.
        rows: each task's tokenised train rows.
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
    rows: dict[str, list[dict[str, Any]]]
    stages: list[PlannedStage]

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
    check_quantization(config.model, tuner.name, tuner.quantized)
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
    scorers = load_scorers(stream, config.evaluation)
    general = load_general(config.evaluation.general, stream)
    check_watching(config, general, stream.tasks)
    stages = plan(chosen, stream)
    epochs = config.training.epochs
    if isinstance(epochs, list) and len(epochs) != len(stages):
        raise ConfigError(f"training.epochs: has {len(epochs)} entries, but the run has {len(stages)} stages")
    rows = {task.name: encoder.encode_all(task.train) for task in stream.tasks}
    tuner.plan(config.training, sum(optimizer_steps(config, stage, rows, max_length) for stage in stages))
    return Setup(config, stream, scorers, general, chosen, tuner, tuner.companion(), encoder, max_length, rows, stages)


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
