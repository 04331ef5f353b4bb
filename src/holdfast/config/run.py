"""The configuration of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.gate import GateConfig
from holdfast.config.keep import KeepConfig
from holdfast.config.model import ModelConfig
from holdfast.config.reading import load
from holdfast.config.section import FREE, Named, NamedField, Section, Seed, as_named
from holdfast.config.stream import DataConfig, StreamConfig
from holdfast.config.training import TrainingConfig

RUN = "{run}"
"""At the beginning of a path: the run's own directory, wherever it lies."""


def _stream(value: Any) -> Any:
    return {"tasks": value} if isinstance(value, list) else as_named(value)


def as_tuner(value: Any) -> Any:
    """The section of a tuner; LoRA if it gives options without a name."""
    return {"name": "lora"} | value if isinstance(value, dict) else as_named(value)


def as_methods(value: Any) -> Any:
    """A list of methods from one method or several."""
    return value if isinstance(value, list) else [value]


class RunConfig(Section):
    """The configuration of a run: model, tuner, method, stream and seed, in one directory."""

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
    keep: KeepConfig | None = Field(
        None, description="what may be lost at most of general ability and of past tasks; training keeps it"
    )
    seed: Seed = Field(0, description="every random choice of the run follows from it")
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


def placed(config: RunConfig) -> RunConfig:
    """The configuration with the run's own directory in the place of ``{run}``, where a path begins with it."""
    values = config.model_dump(mode="json")
    there = _placed(values, config.output)
    return config if there == values else RunConfig.model_validate(there)


def _placed(value: Any, output: str) -> Any:
    if isinstance(value, str):
        return output + value.removeprefix(RUN) if value == RUN or value.startswith(f"{RUN}/") else value
    if isinstance(value, dict):
        return {key: _placed(below, output) for key, below in value.items()}
    return [_placed(below, output) for below in value] if isinstance(value, list) else value
