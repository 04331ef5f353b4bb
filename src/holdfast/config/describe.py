"""List the keys of a configuration, and the differences between two."""

from __future__ import annotations

import contextlib
import json
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from holdfast.config.section import Named, section_of


class Difference(NamedTuple):
    """A key whose value differs between two configurations; ``...`` is the value of one that is not there."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("(absent)" if v is ... else json.dumps(v, ensure_ascii=False) for v in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def differences(recorded: dict[str, Any], config: BaseModel) -> list[Difference]:
    """Where a configuration differs from a recorded one.

    Keys that change no result are left out. A key that an older version did not record has its default.

    Args:
        recorded: what an earlier call of ``model_dump`` gave for a configuration of the same class.
    """
    cls = type(config)
    with contextlib.suppress(ValidationError):  # of a version with other keys: it is compared as it is
        recorded = cls.model_validate(recorded).model_dump(mode="json")
    old, new, free = flat(recorded), flat(config), free_keys(cls)
    keys = [key for key in [*old, *(k for k in new if k not in old)] if key not in free]
    found = [Difference(key, old.get(key, ...), new.get(key, ...)) for key in keys]
    return [difference for difference in found if difference.old != difference.new]


def flat(config: BaseModel | dict[str, Any]) -> dict[str, Any]:
    """A configuration as ``{"training.epochs": 1.0, ...}``; lists stay whole."""
    values = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= {f"{key}.{below}": v for below, v in flat(value).items()}
        else:
            result[key] = value
    return result


def free_keys(cls: type[BaseModel], prefix: str = "") -> set[str]:
    """The dotted keys that may change between two starts of the same run."""
    keys = set()
    for name, field in cls.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free"):
            keys.add(prefix + name)
        section = section_of(field.annotation)
        if section is not None:
            keys |= free_keys(section, f"{prefix}{name}.")
    return keys


def describe(cls: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Every key as (dotted key, default, description), for `holdfast run --help`."""
    rows = []
    for name, field in cls.model_fields.items():
        section = section_of(field.annotation)
        if section is not None and section is not Named:
            rows.append((prefix + name, "required" if field.is_required() else "", field.description or ""))
            rows += describe(section, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        rows.append((prefix + name, default, field.description or ""))
    return rows


def _default(value: Any) -> str:
    if isinstance(value, Named):
        return value.name
    if isinstance(value, list) and value and all(isinstance(v, Named) for v in value):
        return ", ".join(v.name for v in value)
    return json.dumps(value)
