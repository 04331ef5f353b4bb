"""How a stage is trained: optimizer, schedule, batch sizes, precision and engine."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from holdfast.config.section import FREE, FreeOptions, Section

Engine = Literal["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3_offload"]


def _names(value: Any) -> Any:
    """A list of trackers from one name or several; none is none."""
    names = [value] if isinstance(value, str) else value or []
    return [name for name in names if name != "none"] if isinstance(names, list) else names


class BaseTrainingConfig(Section):
    """What the training of a stage and of a laboratory run have in common."""

    example: ClassVar[str] = "{learning_rate: 3e-4}"

    batch_size: int = Field(16, ge=1, description="rows in one optimizer step, over all processes and accumulation")
    micro_batch_size: int | None = Field(
        None, ge=1, description="rows in one forward pass of one process; batch_size must be a multiple of it"
    )
    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
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
    report_to: Annotated[list[str], BeforeValidator(_names)] = Field(
        [],
        description="trackers that get curves, scores, figures and the page: wandb, mlflow, tensorboard, trackio, all; "
        "others that transformers knows get the loss",
        json_schema_extra=FREE,
    )
    arguments: FreeOptions = Field(
        default_factory=dict, description="any other field of transformers.TrainingArguments, by its name"
    )

    @model_validator(mode="before")
    @classmethod
    def _report_to_of_arguments(cls, values: Any) -> Any:
        """``arguments.report_to``, as people and version 0.1.0 wrote it, is ``report_to``."""
        arguments = values.get("arguments") if isinstance(values, dict) else None
        if not isinstance(arguments, dict) or "report_to" not in arguments:
            return values
        if values.get("report_to"):
            raise ValueError("report_to is given twice, here and in arguments; once is enough")
        others = {name: value for name, value in arguments.items() if name != "report_to"}
        return values | {"arguments": others, "report_to": arguments["report_to"]}

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> BaseTrainingConfig:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {micro}; "
                f"{self.batch_size // micro * micro or micro} or {-(-self.batch_size // micro) * micro} would be"
            )
        return self


class TrainingConfig(BaseTrainingConfig):
    """One stage's training; what is not here goes into `arguments`."""

    epochs: float | list[float] = Field(1.0, description="passes over a task's train split; a list gives one per stage")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps a stage at most, instead of epochs")
    schedule: str = Field("cosine", description="transformers' name of a schedule: cosine, linear, constant, ...")
    warmup: float = Field(0.03, ge=0, description="below 1: share of a stage's steps; from 1: steps")
    optimizer: str = Field("adamw_torch", description="transformers' name of an optimizer")
    precision: Literal["auto", "float32", "bfloat16"] = Field(  # type: ignore[assignment]
        "auto",
        description="bfloat16: mixed precision (autocast); auto: where model.dtype is auto, too, bfloat16 if this "
        "machine is faster in it; otherwise float32",
    )

    @model_validator(mode="after")
    def _positive_epochs(self) -> TrainingConfig:
        for epochs in self.epochs if isinstance(self.epochs, list) else [self.epochs]:
            if epochs <= 0:
                raise ValueError(f"epochs must be greater than 0, not {epochs}")
        return self
