"""What is wrong with a configuration's values, in the words of YAML: one line a key."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from holdfast.config.section import Section, section_of
from holdfast.config.yaml_values import as_yaml
from holdfast.errors import did_you_mean

_WANTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
}
"""What a value must be, by the type of pydantic's error."""

_MANY = {"float": "numbers", "int": "whole numbers", "str": "names"}


class _Fault(NamedTuple):
    """An error of pydantic.

    Attributes:
        path: the keys and places in lists, as the user wrote them.
        parent: the section in which the last key stands.
        section: what the last key must hold, if that is a section.
        branch: where a key takes values of several types, the one that was tried; empty elsewhere.
        at: the path of that key.
    """

    error: ErrorDetails
    path: tuple[str | int, ...]
    parent: type[BaseModel] | None
    section: type[BaseModel] | None
    branch: str
    at: tuple[str | int, ...]


def in_words(cls: type[BaseModel], values: dict[str, Any], errors: Sequence[ErrorDetails]) -> list[str]:
    """A line for each key with an error: the key, what it must be, and what it is.

    Args:
        cls: the class that refused the values.
        values: as the user wrote them.
    """
    by_key: dict[tuple[str | int, ...], list[_Fault]] = defaultdict(list)
    for error in errors:
        fault = _located(cls, values, error)
        by_key[fault.at if fault.branch else fault.path].append(fault)
    lines = (line for faults in by_key.values() for line in _lines(cls, faults))
    return list(dict.fromkeys(lines))


def _located(cls: type[BaseModel], values: Any, error: ErrorDetails) -> _Fault:
    section: type[BaseModel] | None = cls
    parent, branch = section, ""
    path: list[str | int] = []
    at: list[str | int] = []
    for place, part in enumerate(error["loc"]):
        is_key = isinstance(part, str) and section is not None and part in section.model_fields
        is_unknown = error["type"] == "extra_forbidden" and place == len(error["loc"]) - 1
        below = _below(values, part)
        if is_key or is_unknown or below is not ...:
            path.append(part)
            values = values if below is ... else below  # a list alone stands for its section
            parent = section
            if is_key:
                assert section is not None
                section = section_of(section.model_fields[str(part)].annotation)
        elif isinstance(part, str) and part != "[key]" and not branch:
            branch, at = part, list(path)
    return _Fault(error, tuple(path), parent, section, branch, tuple(at))


def _below(values: Any, part: str | int) -> Any:
    """What a key or place of a value holds; ``...`` if it has none of this name."""
    if isinstance(values, dict):
        return values.get(part, ...)
    is_place = isinstance(values, list) and isinstance(part, int) and part < len(values)
    return values[part] if is_place else ...


def _lines(cls: type[BaseModel], faults: list[_Fault]) -> list[str]:
    """The lines of a key; where it takes values of several types, of the one that was most likely meant."""
    if not faults[0].branch:
        return [_line(cls, fault) for fault in faults]
    within = [fault for fault in faults if len(fault.path) > len(fault.at)]
    of_right_type = [fault for fault in faults if not _is_of_type(fault)]
    if meant := within or of_right_type:
        return [_line(cls, fault) for fault in meant]
    wanted = " or ".join(dict.fromkeys(_wanted(fault) for fault in faults))
    return [_refusal(faults[0], f"must be {wanted}")]


def _is_of_type(fault: _Fault) -> bool:
    """Whether the error is that a value has another type, so that another branch may be meant."""
    return fault.error["type"] in _WANTED or fault.error["type"] == "literal_error"


def _wanted(fault: _Fault) -> str:
    if fault.error["type"] == "literal_error":
        return str(fault.error["ctx"]["expected"])
    inner = re.fullmatch(r"list\[(\w+)\]", fault.branch)
    many = _MANY.get(inner[1]) if inner else None
    return f"a list of {many}" if many else _WANTED[fault.error["type"]]


def _line(cls: type[BaseModel], fault: _Fault) -> str:
    error, key = fault.error, _dotted(fault.path)
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: unknown key{_suggestion(cls, fault)}"
        case "missing":
            return f"{key}: is required but absent"
        case "value_error":
            return f"{key + ': ' if key else ''}{error['ctx']['error']}"
        case "model_type" | "model_attributes_type":
            return _refusal(fault, f"must be {_section_in_words(fault.section)}")
        case "too_short" if isinstance(error["input"], list):
            least = error["ctx"]["min_length"]
            return _refusal(fault, f"must have at least {least} {'entry' if least == 1 else 'entries'}")
    if _is_of_type(fault):
        said = _WANTED.get(error["type"]) or error["ctx"]["expected"]
        return _refusal(fault, f"must be {said}")
    said = error["msg"][0].lower() + error["msg"][1:]
    return _refusal(fault, said.replace("input should", "must"))


def _refusal(fault: _Fault, said: str) -> str:
    return f"{_dotted(fault.path)}: {said}, not {as_yaml(fault.error['input']):.200}"


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _suggestion(cls: type[BaseModel], fault: _Fault) -> str:
    """The section that has an unknown key, or a near name in its own section."""
    name = str(fault.path[-1])
    sections = {key: section_of(field.annotation) for key, field in cls.model_fields.items()}
    known = [f"'{key}.{name}'" for key, section in sections.items() if section and name in section.model_fields]
    if known:
        return f"; did you mean {' or '.join(known)}?"
    return did_you_mean(name, list(fault.parent.model_fields) if fault.parent is not None else [])


def _section_in_words(section: type[BaseModel] | None) -> str:
    if section is None or not issubclass(section, Section) or not section.example:
        return "a section of keys and values"
    return f"{'a name or ' if section.name_alone else ''}a section, such as {section.example}"
