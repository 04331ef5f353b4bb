"""List the keys of a configuration, and the differences between two."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from holdfast.config.section import Named, section_of

SHOWN = 100
"""Characters of a value that a difference shows."""


class Difference(NamedTuple):
    """A key whose value differs between two configurations; ``...`` is the value of one that is not there."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = ("(absent)" if v is ... else json.dumps(v, ensure_ascii=False) for v in (self.old, self.new))
        pairs = enumerate(zip(old, new, strict=False))
        begin = next((n for n, (a, b) in pairs if a != b), min(len(old), len(new))) - SHOWN // 4
        return f"{self.key}: {_cut(old, begin)} -> {_cut(new, begin)}"


def _cut(text: str, begin: int) -> str:
    """A text or, where it is long, what of it stands from a place on."""
    if len(text) <= SHOWN:
        return text
    begin = max(0, min(begin, len(text) - SHOWN))
    return ("…" if begin else "") + text[begin : begin + SHOWN] + ("…" if begin + SHOWN < len(text) else "")


def differences(recorded: dict[str, Any], config: BaseModel) -> list[Difference]:
    """Where a configuration differs from a recorded one.

    Keys that change no result are left out. A key that an older version did not record has its default. A section that
    one of the two lacks is one difference, of the keys that have not their defaults; where a method or tuner has
    another name, its options are left out.

    Args:
        recorded: what an earlier call of ``model_dump`` gave for a configuration of the same class.
    """
    cls = type(config)
    with contextlib.suppress(ValidationError):  # of a version with other keys: it is compared as it is
        recorded = cls.model_validate(recorded).model_dump(mode="json")
    return list(_differing(recorded, config.model_dump(mode="json"), cls))


def _differing(
    old: Mapping[str, Any], new: Mapping[str, Any], cls: type[BaseModel] | None, prefix: str = ""
) -> Iterator[Difference]:
    fields = cls.model_fields if cls else {}
    for key in dict.fromkeys([*old, *new]):
        before, after, field = old.get(key, ...), new.get(key, ...), fields.get(key)
        if before == after or (field and _is_free(field)):
            continue
        section = section_of(field.annotation) if field else None
        both = isinstance(before, dict) and isinstance(after, dict)
        if both and section is Named and before.get("name") != after.get("name"):
            yield Difference(f"{prefix}{key}.name", before.get("name", ...), after.get("name", ...))
        elif both and before and after:
            yield from _differing(before, after, section, f"{prefix}{key}.")
        else:
            yield Difference(prefix + key, _set_in(before, section), _set_in(after, section))


def _set_in(value: Any, section: type[BaseModel] | None) -> Any:
    """A section's keys that have not their defaults; another value as it is."""
    if not isinstance(value, dict) or section is None:
        return value
    return {key: below for key, below in value.items() if below != _default_of(section, key)}


def _default_of(section: type[BaseModel], key: str) -> Any:
    field = section.model_fields.get(key)
    default = field.get_default(call_default_factory=True) if field else ...
    return default.model_dump(mode="json") if isinstance(default, BaseModel) else default


def _is_free(field: FieldInfo) -> bool:
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("free"))


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


@cache
def free_keys(cls: type[BaseModel], prefix: str = "") -> frozenset[str]:
    """The dotted keys that may change between two starts of the same run."""
    keys: set[str] = set()
    for name, field in cls.model_fields.items():
        if _is_free(field):
            keys.add(prefix + name)
        section = section_of(field.annotation)
        if section is not None:
            keys |= free_keys(section, f"{prefix}{name}.")
    return frozenset(keys)


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
