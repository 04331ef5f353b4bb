"""The budget of what may be lost, which training keeps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from holdfast.config.gate import Increase
from holdfast.config.section import FREE, Section


class KeepConfig(Section):
    """What may be lost at most; multipliers weigh rehearsal so that a stage ends within it."""

    example: ClassVar[str] = "{general: 2%}"

    general: Increase = Field(
        None,
        description="rise of the loss on general samples since before training at most: as a share of what it was, "
        "such as 2%, or in nats a token",
    )
    tasks: Increase = Field(
        None,
        description="fall of each past task since its own stage at most: of the mean probability of its answers, such "
        "as 0.02; or, as a share such as 2%, rise of the loss of its answers",
    )
    every: int | None = Field(
        None,
        ge=1,
        description="optimizer steps between two measurements, each with a dual step; where absent, a twentieth of the "
        "stage",
    )
    step: float = Field(0.25, gt=0, description="dual step: a multiplier times (lost / budget) ^ step")
    damping: float = Field(
        0.25,
        ge=0,
        description="weight of the last measurement beside the multiplier: (lost / budget) ^ damping",
    )
    glide: float = Field(
        4.0,
        ge=0,
        description="budgets more that may be lost at the start of a stage; they shrink to none at its end",
    )
    margin: float = Field(
        1.65,
        ge=0,
        description="standard errors of a measurement by which a budget is to be undercut; 1.65: with 95 % certainty",
    )
    rows: int = Field(
        256, ge=8, description="samples that are held out from rehearsal, of each budget and past task, at most"
    )
    probe: int = Field(32, ge=2, description="samples among them that a measurement during training looks at, at most")
    give_back: bool = Field(
        True,
        description="at the end of a stage that is beyond its budget, take back as much of its update as is needed",
    )
    on_fail: Literal["stop", "rollback", "continue"] = Field(
        "stop",
        description="after a stage that is beyond its budget nevertheless: stop the run, go back to the last stage "
        "that kept it, or go on",
        json_schema_extra=FREE,
    )

    @field_validator("general", "tasks")
    @classmethod
    def _can_be_kept(cls, budget: float | str | None, info: ValidationInfo) -> float | str | None:
        if budget is not None and not float(str(budget).removesuffix("%")) > 0:
            raise ValueError(f"a budget must be above 0, as 0.5% is; {budget} leaves no room to learn")
        if info.field_name == "tasks" and isinstance(budget, float) and budget >= 1:
            raise ValueError(
                f"no probability falls by {budget:g}; two in a hundred are 0.02 of the mean probability of the "
                "answers, or 2% more of their loss"
            )
        return budget

    @model_validator(mode="after")
    def _has_budget(self) -> KeepConfig:
        if self.general is None and self.tasks is None:
            raise ValueError("gives no budget; general (such as 2%) or tasks (such as 0.02) is needed")
        return self
