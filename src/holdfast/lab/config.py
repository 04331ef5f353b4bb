"""A laboratory run's configuration: pretraining from scratch, or going on from a model on other text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from holdfast.config.reading import load
from holdfast.config.run import as_methods, as_tuner
from holdfast.config.section import FREE, Named, NamedField, Section, Seed
from holdfast.config.training import BaseTrainingConfig


class SizeConfig(Section):
    """The model: a new one of a size, or one to go on from."""

    path: str | None = Field(None, description="folder or hub name of a model to go on from, instead of a size")
    family: Literal["llama", "qwen3"] = Field("llama", description="architecture; qwen3 normalises queries and keys")
    width: int | None = Field(None, ge=8, description="width of the residual stream")
    depth: int | None = Field(None, ge=1, description="number of layers")
    head_size: int = Field(64, ge=2, description="width of an attention head; width must be a multiple of it")
    parameters: int | None = Field(
        None, ge=1, description="instead of width and depth: number of weights to come near, embeddings counted once"
    )
    mlp_width: int | None = Field(
        None, ge=1, description="width of the gated feed-forward layers; absent: 8/3 of the width, rounded up to eights"
    )
    tie_embeddings: bool = Field(False, description="one matrix for embeddings and head")
    attention: str | None = Field(None, description="attention implementation of transformers (eager, sdpa, ...)")

    @model_validator(mode="after")
    def _one_way(self) -> SizeConfig:
        ways = [self.path is not None, self.width is not None or self.depth is not None, self.parameters is not None]
        if sum(ways) != 1:
            raise ValueError("give path (a model to go on from), width and depth, or parameters: one of the three")
        if ways[1] and (self.width is None or self.depth is None):
            raise ValueError("width and depth go together")
        if self.width is not None and self.width % self.head_size:
            low = self.width // self.head_size * self.head_size
            raise ValueError(
                f"width: {self.width} is no multiple of head_size {self.head_size}; "
                f"{low or self.head_size} or {low + self.head_size} would be"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size: {self.head_size} is odd; rotary positions turn pairs of dimensions")
        return self


class PartConfig(Section):
    """One token file of a mixture."""

    path: str = Field(description="a token file (`holdfast lab tokens` makes one)")
    weight: float = Field(1.0, gt=0, description="its share of the sequences, relative to the other files'")


class OptimizerConfig(BaseTrainingConfig):
    """How the model is trained."""

    batch_size: int = Field(32, ge=1, description="sequences in one optimizer step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences in one forward pass of one process; batch_size must be a multiple of it"
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine", "wsd"] = Field(
        "constant", description="after the warm-up: constant, cosine to 0, or constant and then down to 0 (wsd)"
    )
    warmup_tokens: int = Field(0, ge=0, description="tokens over which the learning rate rises")
    decay: float = Field(0.2, gt=0, le=1, description="share of the steps in which wsd goes down")
    weight_decay: float = Field(0.02, ge=0, description="AdamW's decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's decay rates of the moments")
    max_grad_norm: float = Field(0.0, ge=0, description="gradients are clipped to this norm; 0: not at all")
    compile: bool = Field(False, description="torch.compile the model")
    save_every: int = Field(500, ge=1, description="optimizer steps between checkpoints", json_schema_extra=FREE)
    log_every: int = Field(50, ge=1, description="steps between lines of events.jsonl", json_schema_extra=FREE)


class StopConfig(Section):
    """When training ends: at the first of these that comes true."""

    tokens: int | None = Field(None, ge=1, description="tokens trained on")
    tokens_per_parameter: float | None = Field(
        None, gt=0, description="the same, divided by the number of weights, embeddings counted once"
    )
    epochs: float | None = Field(None, gt=0, description="passes over the data of all files")
    loss: float | None = Field(None, gt=0, description="next-token loss of `domain` at or below this, nats per token")
    patience: int | None = Field(None, ge=1, description="evaluations of `domain` in a row without a new lowest loss")
    seconds: float | None = Field(None, gt=0, description="time spent training; evaluations do not count")
    domain: str | None = Field(
        None, description="part of `valid` whose loss decides for loss and patience; absent: first"
    )

    @model_validator(mode="after")
    def _some(self) -> StopConfig:
        if not any((self.tokens, self.tokens_per_parameter, self.epochs, self.loss, self.patience, self.seconds)):
            raise ValueError("give at least one of tokens, tokens_per_parameter, epochs, loss, patience and seconds")
        return self


class MeasureConfig(Section):
    """What is measured before, during and after training."""

    every: int | None = Field(
        None, ge=1, description="tokens between evaluations; absent: only before training and at its end"
    )
    rows: int = Field(256, ge=1, description="sequences of each held-out part that are measured, from its start")
    batch_size: int = Field(64, ge=1, description="sequences in one forward pass")


def _parts(value: Any) -> Any:
    parts = value if isinstance(value, list) else [value]
    return [{"path": part} if isinstance(part, str) else part for part in parts]


def _size(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class LabConfig(Section):
    """A laboratory run: one model, one mixture of text, one directory."""

    model: Annotated[SizeConfig, BeforeValidator(_size)] = Field(description="a size, or a model to go on from")
    data: Annotated[list[PartConfig], BeforeValidator(_parts)] = Field(
        min_length=1, description="the token file to train on, or a mixture of several"
    )
    valid: dict[str, str] = Field(default_factory=dict, description="held-out token files by domain")
    context: int = Field(256, ge=2, description="tokens in a sequence")
    tuner: Annotated[Named, BeforeValidator(as_tuner)] = Field(
        Named(name="full"), description="which weights are trained: a name or a section"
    )
    method: Annotated[list[NamedField], BeforeValidator(as_methods)] = Field(
        [Named(name="sequential")], min_length=1, description="what is done against forgetting, as in `holdfast run`"
    )
    training: OptimizerConfig = Field(OptimizerConfig(), description="how the model is trained")
    stop: StopConfig = Field(description="when training ends")
    evaluation: MeasureConfig = Field(MeasureConfig(), description="what is measured")
    seed: Seed = Field(0, description="of the initial weights, the order of the data and the methods' choices")
    output: str = Field(description="the run's directory", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _watched(self) -> LabConfig:
        stop = self.stop
        if (stop.loss or stop.patience) and not self.valid:
            raise ValueError("stop.loss and stop.patience need a held-out part: give `valid`")
        if (stop.loss or stop.patience) and self.evaluation.every is None:
            raise ValueError("evaluation.every: stop.loss and stop.patience need evaluations during training")
        if stop.domain is not None and stop.domain not in self.valid:
            raise ValueError(f"stop.domain: {stop.domain!r} is not in `valid`: {', '.join(self.valid) or 'nothing is'}")
        bounded = stop.tokens or stop.tokens_per_parameter or stop.epochs
        if self.training.schedule != "constant" and not bounded:
            raise ValueError(
                f"stop: schedule {self.training.schedule} must know the end: give tokens, tokens_per_parameter or "
                "epochs"
            )
        return self

    @property
    def watched(self) -> str | None:
        """The domain that stop.loss and stop.patience look at."""
        return self.stop.domain or next(iter(self.valid), None)


def load_lab_config(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> LabConfig:
    """Read a laboratory run's configuration: a YAML file or the mapping that it holds, with ``key.path=value`` changes.

    Raises:
        ConfigError: a key is unknown, missing or wrong; the message names it and a near name.
    """
    return load(LabConfig, source, overrides)
