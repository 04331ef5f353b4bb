"""The base of all sections of a configuration, and methods or tuners that are named with their options."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)
from pydantic.config import JsonDict

from holdfast.config.yaml_values import as_yaml
from holdfast.system.files import is_finite

FREE: JsonDict = {"free": True}
"""Marks a key that may change between two starts of the same run, since no result depends on it."""


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What torch, numpy and transformers all take as a seed."""


class Section(BaseModel):
    """A part of the configuration: unknown keys, numbers that are not finite, and true for a number are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    example: ClassVar[str] = ""
    """How the section may look, for the message where something else stands in its place."""

    name_alone: ClassVar[bool] = False
    """Whether a name alone may stand for the section."""

    @field_validator("*", mode="before")
    @classmethod
    def _number_is_no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes as true, which Python counts as 1."""
        truth = next((one for one in (value if isinstance(value, list) else [value]) if isinstance(one, bool)), None)
        types = set() if truth is None else _plain_types(cls.model_fields[str(info.field_name)].annotation)
        if types & {int, float} and bool not in types:
            raise ValueError(f"must be a {'whole ' if int in types else ''}number, not {as_yaml(truth)}")
        return value


def _plain_types(annotation: Any) -> set[type]:
    """The classes in an annotation, looking through Annotated, unions and lists."""
    parts = get_args(annotation)
    return {annotation} if not parts else set().union(*map(_plain_types, parts))


class Named(Section):
    """A tuner or method by name, with its options, which its own class checks."""

    model_config = ConfigDict(extra="allow")

    example: ClassVar[str] = "{name: ...}"
    name_alone: ClassVar[bool] = True

    name: str = Field(description="its name; `holdfast methods` and `holdfast tuners` list them")

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if not is_finite(value):
            raise ValueError(f"{key}: must be finite, not {as_yaml(value)}")
    return values


FreeOptions = Annotated[dict[str, Any], AfterValidator(_finite)]
"""Options by name whose values are checked elsewhere."""


def _share(value: Any) -> Any:
    """5% as 0.05; anything else as it is."""
    try:
        return float(value.strip().removesuffix("%")) / 100 if value.strip().endswith("%") else value
    except (AttributeError, ValueError):
        return value


Share = Annotated[float, BeforeValidator(_share)]
"""A number that may be written as a share: 0.05, or 5%."""


def year_as_text(value: Any) -> Any:
    """A task's name as text: YAML reads the name of a year as a number."""
    return str(value) if type(value) is int else value


TaskName = Annotated[str, BeforeValidator(year_as_text)]


def as_named(value: Any) -> Any:
    """A section from a name alone; anything else as it is."""
    return {"name": value} if isinstance(value, str) else value


NamedField = Annotated[Named, BeforeValidator(as_named)]


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The Section class of an annotation, looking through Annotated, unions and lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        section = section_of(part)
        if section is not None:
            return section
    return None
