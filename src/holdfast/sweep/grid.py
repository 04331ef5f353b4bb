"""A grid: columns with their values, and the cells of their product."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Grid = dict[str, list[Any] | dict[str, dict[str, Any]]]
"""A dotted key with its values, or a column with named values: {name: {dotted key: value}}."""


@dataclass(frozen=True)
class Axis:
    """The value of a cell in one column.

    Attributes:
        column: the column's name.
        value: the value, or the name of a named value.
        changes: to the configuration, {dotted key: value}.
    """

    column: str
    value: Any
    changes: dict[str, Any]


def cells(grid: Grid) -> Iterator[tuple[Axis, ...]]:
    """Every cell; the last column changes fastest."""
    axes = []
    for key, values in grid.items():
        if isinstance(values, dict):
            axes.append([Axis(key, value, changes) for value, changes in values.items()])
        else:
            column = key.removesuffix(".name").rpartition(".")[2]
            axes.append([Axis(column, value, {key: value}) for value in values])
    return itertools.product(*axes)
