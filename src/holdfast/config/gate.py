"""The limits that a stage must keep."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from holdfast.config.section import FREE, Section
from holdfast.config.yaml_values import as_yaml


def _limit(value: Any, what: str) -> Any:
    """A number, or a share as text with a percent sign; the command line gives both as text."""
    if value is None:
        return None
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"must be {what}, such as 0.05, or a share, such as 5%, not {as_yaml(value)}")
    return text if text.endswith("%") else number


def increase(value: Any) -> Any:
    """A number of nats, or a share as text with a percent sign."""
    return _limit(value, "a number of nats a token")


Increase = Annotated[float | str | None, BeforeValidator(increase)]
Score = Annotated[float | str | None, BeforeValidator(lambda value: _limit(value, "a number"))]
"""Of a score in [0, 1], 5% is 0.05."""


class GateConfig(Section):
    """Limits on what may be forgotten, checked after every stage; the interval of a figure says how sure it is."""

    example: ClassVar[str] = "{max_forgetting: 5%}"

    max_forgetting: Score = Field(
        None, description="forgetting at most, over the tasks learned so far", json_schema_extra=FREE
    )
    max_task_forgetting: Score = Field(
        None, description="forgetting of any single task at most", json_schema_extra=FREE
    )
    max_general_loss_increase: Increase = Field(
        None,
        description="rise of each loss on general text since before training at most: in nats a token, or as a share "
        "of what it was, such as 2%",
        json_schema_extra=FREE,
    )
    max_general_drop: Score = Field(
        None,
        description="fall of each accuracy-like general ability since before training at most",
        json_schema_extra=FREE,
    )
    min_average: Score = Field(
        None, description="average over the tasks learned so far at least", json_schema_extra=FREE
    )
    min_new_task: Score = Field(None, description="score of a stage's own task at least", json_schema_extra=FREE)
    min_learned: Score = Field(
        None, description="rise of a stage's own task's score in that stage at least", json_schema_extra=FREE
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

    @field_validator("*")
    @classmethod
    def _in_range(cls, limit: Any, info: ValidationInfo) -> Any:
        """A limit that some model could exceed, and some could keep, whatever its tasks are scored by."""
        key = str(info.field_name)
        if limit is None or not key.startswith(("max_", "min_")):
            return limit
        number = float(str(limit).removesuffix("%"))
        if key.startswith("max_") and number < 0:
            raise ValueError(
                f"what may be lost at most must be 0 or more, such as 5%, not {str(limit).removesuffix('.0')}"
            )
        least = -100 if key == "min_learned" else 0
        if isinstance(limit, str) and key != "max_general_loss_increase" and not least <= number <= 100:
            raise ValueError(f"a share of a score must be from {least}% to 100%, not {limit}")
        return limit

    @property
    def limits(self) -> dict[str, Any]:
        """The given limits, by key."""
        return self.model_dump(exclude={"on_fail", "stop_early"}, exclude_none=True)

    @model_validator(mode="after")
    def _has_limits(self) -> GateConfig:
        if not self.limits:
            keys = ", ".join(key for key in GateConfig.model_fields if key.startswith(("max_", "min_")))
            raise ValueError(f"gives no limit; at least one of {keys} is needed")
        if self.stop_early and self.max_general_loss_increase is None:
            raise ValueError("stop_early needs max_general_loss_increase, the limit at which it stops")
        return self
