"""The shape of a JSON value that a file holds: the value has it, or a message names the key that has not.

Whoever reads a file back says what shape it needs, and may then use the value without a further look at it. A value of
another shape comes from damage, from an edit by hand, or from somebody who wishes no good.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

Number = float | None
"""None: not measured."""
Facts = dict[str, Any]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]

AS_WRITTEN = ConfigDict(strict=True, extra="allow")
"""Of TypedDicts that say what a JSON object holds: nothing is converted, and further keys may stand there."""


def of_shape(shape: Any, value: Any, name: str = "") -> Any:
    """The value itself.

    Args:
        shape: a TypedDict with :data:`AS_WRITTEN`, or a type of plain values, such as ``list[int]``.
        name: the key of the value, for the message; where absent, a list is one of lines.

    Raises:
        ValueError: it is of another shape; the message names the key, and the line of a list of objects.
    """
    try:
        _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(_first(error, name)) from None
    return value


def alike(value: Any, like: Any) -> bool:
    """Whether a plain value is of the kind of another: a number for a number, as many entries for a list or tuple."""
    if isinstance(like, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(like)
        return same and all(map(alike, value, like))
    if like is None or value is None:
        return value is None or isinstance(value, bool | int | float | str)
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(like, bool)
    if isinstance(like, int | float):
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return isinstance(value, type(like))


def _first(error: ValidationError, name: str) -> str:
    """The first fault, as ``key: what it must be, not what it is``."""
    first = error.errors(include_url=False)[0]
    place = [*([name] if name else []), *first["loc"]]
    line = f"line {place.pop(0) + 1}: " if place and isinstance(place[0], int) else ""  # type: ignore[operator]
    key = ".".join(map(str, place))
    found = "" if first["type"] == "missing" else f", not {first['input']!r:.60}"
    return f"{line}{key or 'it'}: {first['msg'][0].lower()}{first['msg'][1:]}{found}"


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
