"""An experiment's tables as CSV: one row per run or evaluation, numbers as numbers, empty cells where not measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from holdfast.errors import DataError
from holdfast.system.files import write_text

TableRow = dict[str, Any]


def write_table(path: Path, rows: Sequence[TableRow]) -> None:
    """Write a table whole; its columns are those of all rows, in the order in which they first occur."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({column: _shown(value) for column, value in row.items()})
    write_text(path, text.getvalue())


def read_table(path: Path) -> list[TableRow]:
    """Read what :func:`write_table` wrote; an empty cell becomes None.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such table; run the experiment first")
    with path.open(encoding="utf-8", newline="") as file:
        return [{column: _value(text) for column, text in row.items()} for row in csv.DictReader(file)]


def select(rows: Iterable[TableRow], **wanted: Any) -> list[TableRow]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(column) == value for column, value in wanted.items())]


def distinct(rows: Iterable[TableRow], column: str) -> list[Any]:
    """The values of a column, in the order in which they first occur; empty cells are skipped."""
    return list(dict.fromkeys(row[column] for row in rows if row.get(column) is not None))


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def _value(text: str) -> Any:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text or None
