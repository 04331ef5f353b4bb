"""List the keys of a configuration, and the differences between two."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from holdfast.config.section import Named, section_of


def difference(recorded: dict[str, Any], config: BaseModel) -> list[str]:
    """List where a configuration differs from a recorded one, as ``key: old -> new``.

    Keys that change no result are left out. A key that an older version did not record has its default.

    Args:
        recorded: what an earlier call of ``model_dump`` gave for a configuration of the same class.
    """
    cls = type(config)
    with contextlib.suppress(ValidationError):  # of a version with other keys: it is compared as it is
        recorded = cls.model_validate(recorded).model_dump(mode="json")
    old, new, free = flat(recorded), flat(config), free_keys(cls)
    keys = [key for key in [*old, *(k for k in new if k not in old)] if key not in free]
    show = lambda side, key: json.dumps(side[key], ensure_ascii=False) if key in side else "(absent)"  # noqa: E731
    return [f"{key}: {show(old, key)} -> {show(new, key)}" for key in keys if old.get(key, ...) != new.get(key, ...)]


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
