"""The base of all sections of a configuration, and methods or tuners that are named with their options."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.config import JsonDict

from holdfast.system.files import is_finite

FREE: JsonDict = {"free": True}
"""Marks a key that may change between two starts of the same run, since no result depends on it."""


Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What torch, numpy and transformers all take as a seed."""


class Section(BaseModel):
    """A part of the configuration: unknown keys and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Named(Section):
    """A tuner or method by name, with its options, which its own class checks."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="its name; `holdfast methods` and `holdfast tuners` list them")

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if not is_finite(value):
            raise ValueError(f"{key}: must be finite, not {value!r}")
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
