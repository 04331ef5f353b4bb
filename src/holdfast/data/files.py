"""Data files to rows: JSON, JSON lines, CSV, TSV and Parquet, compressed or not, and where a row stands in its file."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from holdfast.data.spill import without_bytes
from holdfast.errors import DataError

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".zst")
"""Endings that may follow those of text files."""

_ROW = {
    ".jsonl": 'each line is one, such as {"prompt": "2 + 2?", "answer": "4"}',
    ".json": 'they are the objects of an array, such as [{"prompt": "2 + 2?", "answer": "4"}]',
    ".csv": "the first line names the columns, such as prompt,answer, and each line below it is one",
    ".tsv": "the first line names the columns, such as prompt and answer, and each line below it is one",
    ".parquet": "write one at least",
}
"""What rows of a file are, by its ending."""
_BLANK = re.compile(r"[ \t\r\n]*")
_PLACE = re.compile(r"(.*?): row (\d+)", re.DOTALL)
_QUOTED = re.compile(r'"[^"]*"')
_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}


class RawRow(dict[str, Any]):
    """One row of a file; ``line`` is the 1-based line on which it begins, where lines mean something, and ``index``
    its number in the file, from 0."""

    line: int | None = None
    index: int


def where(file: str | Path, index: int, row: dict[str, Any] | None = None) -> str:
    """Name a row in a message: its file, its 1-based number and, where known, its line."""
    line = getattr(row, "line", None)
    return f"{file}: row {index + 1}" + (f" (line {line})" if line else "")


def in_file_order(messages: Iterable[str]) -> list[str]:
    """Messages that begin as :func:`where` says, file by file, in the order of their rows."""
    files: dict[str, list[tuple[int, str]]] = {}
    for message in messages:
        found = _PLACE.match(message)
        file, number = (found[1], int(found[2])) if found else ("", 0)
        files.setdefault(file, []).append((number, message))
    return [message for told in files.values() for _, message in sorted(told, key=lambda row: row[0])]


def type_name(value: Any) -> str:
    """A JSON value's type in words."""
    return _TYPES.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def shown_name(column: str) -> str:
    """A column's name in a message, in quotes if nothing of it would be seen."""
    return column if column.strip() else repr(column)


def half_character(text: str) -> str | None:
    """What is wrong with a text that holds half a surrogate pair, which no file can hold; None: nothing."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half a character (\\u{ord(text[error.start]):04x})"
    return None


def suffix(path: Path) -> str:
    """A file's ending in lower case, without that of its compression."""
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() if ending in COMPRESSED else ending


def stem(path: Path) -> str:
    """A file's name in lower case, without its endings."""
    name = path.name.lower()
    for ending in (*COMPRESSED, *SUFFIXES):
        name = name.removesuffix(ending)
    return name


def is_data_file(path: Path) -> bool:
    """Whether what lies in a folder of data is a file; what is hidden need be none.

    Raises:
        DataError: it is neither a file nor a folder, such as a link to nothing.
    """
    if path.is_file() or path.is_dir() or path.name.startswith("."):
        return path.is_file()
    raise DataError(f"{path}: {no_file(path)}; put a file in its place, or take it away")


def no_file(path: Path) -> str:
    """What is there instead of a file or a folder."""
    return "is a link to nothing" if path.is_symlink() else "is neither a file nor a folder"


def read_rows(path: Path, bad: list[str] | None = None) -> list[dict[str, Any]]:
    """Read all rows of a file; see :func:`iterate_rows`."""
    return list(iterate_rows(path, bad))


def iterate_rows(path: Path, bad: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Read a file row by row.

    It is a .json (an array of objects, or one object a line), .jsonl, .ndjson, .csv, .tsv or .parquet file, in lower or
    upper case; all but the last may be compressed (.gz, .zst). Only an array is in memory as a whole. The fields of a
    .csv file are divided by semicolons if its first line has some, and no comma.

    Args:
        bad: what is wrong with lines that are no row is added to it, and they are left out, where each line is a row.
            None: the first raises.

    Raises:
        DataError: the file is absent, not UTF-8, malformed, or holds no row; a row is not an object; a name stands
            twice in a row or in the first line of a .csv file. The rows before a bad one are given first.
    """
    kind = suffix(path)
    if path.is_dir():
        raise DataError(f"{path}: is a folder, where a data file is needed")
    if kind not in SUFFIXES:
        raise DataError(
            f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(SUFFIXES)}, and {', '.join(COMPRESSED)} "
            "behind one of them"
        )
    rows: Iterable[dict[str, Any]]
    if kind == ".parquet":
        rows = _parquet(path)
    elif kind in (".csv", ".tsv"):
        rows = _csv(path, "\t" if kind == ".tsv" else _delimiter(path), bad)
    else:
        rows = _array(path, read_text(path).rstrip()) if _begins_an_array(path) else _lines(path, bad)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty and not bad:
        raise DataError(f"{path}: holds no rows; {_ROW.get(kind, _ROW['.jsonl'])}")


def _refuse(error: DataError, bad: list[str] | None) -> None:
    """Raise the error, or keep what it says."""
    if bad is None:
        raise error from None
    bad.append(str(error))


# --- text ---


def read_text(path: Path) -> str:
    """Read a UTF-8 file; DataError, with the offset of the first bad byte, if it is not UTF-8."""
    with open_text(path) as file:
        return file.read()


@contextlib.contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """Open a UTF-8 file, with or without a byte order mark; a line of it ends with a line feed and nothing else.

    Args:
        path: a text file, which may be compressed (.gz, .zst).
        newline: as of ``open``.

    Raises:
        DataError: the file cannot be read, or what is read of it is not UTF-8: with the offset of the first bad byte.
    """
    import pyarrow  # type: ignore[import-untyped]

    try:
        with _open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline) as file:
            try:
                yield file
            except UnicodeDecodeError:
                raise _not_utf8(path) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be decompressed: {error}") from None
    except OSError as error:
        failed = f"cannot be read: {error.strerror}" if error.strerror else f"cannot be decompressed: {error}"
        raise DataError(f"{path}: {failed}") from None


def _open_bytes(path: Path) -> BinaryIO:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")  # type: ignore[return-value]
        case ".zst":
            import pyarrow

            return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _not_utf8(path: Path) -> DataError:
    """Where the first byte stands that is not UTF-8; a decoder tells no more than its place in the part it read."""
    before = 0
    with _open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"byte {before + error.start} (line {number}) is 0x{line[error.start]:02x}"
                return DataError(f"{path}: is not UTF-8: {place}; save the file as UTF-8")
            before += len(line)
    raise AssertionError(path)


# --- JSON ---


class _NameTwiceError(Exception):
    """A name that stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _NameTwiceError(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_json_file(file: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: it is not UTF-8, not JSON (with the line), or a name stands twice in an object of it.
    """
    text = read_text(file)
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: is not valid JSON: {error.msg}") from None
    except (_NameTwiceError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What is wrong with JSON that parses but cannot be used."""
    if isinstance(error, _NameTwiceError):
        return f"the name {str(error)!r} stands twice in an object"
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return "holds a number of too many digits"


def _row(path: Path, index: int, line: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(f"{path}: row {index + 1} (line {line}): must be an object, not {type_name(value)}")
    row = RawRow(value)
    row.line, row.index = line, index
    return row


def _begins_an_array(path: Path) -> bool:
    with open_text(path) as file:
        return next((line.lstrip().startswith("[") for line in file if line.strip()), False)


def _array(path: Path, text: str) -> list[dict[str, Any]]:
    """Parse a JSON array element by element, so that each row knows its line."""
    rows = list[dict[str, Any]]()
    blank = lambda position: _BLANK.match(text, position).end()  # type: ignore[union-attr]  # noqa: E731 - always matches
    line, counted = 1, 0
    position = blank(text.index("[") + 1)
    try:
        while text[position : position + 1] != "]" or rows:
            line, counted = line + text.count("\n", counted, position), position
            value, position = _DECODER.raw_decode(text, position)
            rows.append(_row(path, len(rows), line, value))
            position = blank(position)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = blank(position + 1)
        if blank(position + 1) != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, blank(position + 1))
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise _invalid(path, len(rows), error.lineno, error) from None
    except (_NameTwiceError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: row {len(rows) + 1} (line {line}): {_reason(error)}") from None
    return rows


def _lines(path: Path, bad: list[str] | None) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        full = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for index, (number, line) in enumerate(full):
            try:
                row = _row(path, index, number, _DECODER.decode(line.rstrip()))
            except DataError as error:
                _refuse(error, bad)
            except json.JSONDecodeError as error:
                _refuse(_invalid(path, index, number, error), bad)
            except (_NameTwiceError, ValueError, RecursionError) as error:
                _refuse(DataError(f"{path}: row {index + 1} (line {number}): {_reason(error)}"), bad)
            else:
                yield row


def _invalid(path: Path, index: int, line: int, error: json.JSONDecodeError) -> DataError:
    expected = "an array of objects, or one object a line" if suffix(path) == ".json" else "one object a line"
    return DataError(
        f"{path}: row {index + 1} (line {line}): is not valid JSON: {error.msg} at column {error.colno}; "
        f"expected {expected}"
    )


# --- tables ---


def _delimiter(path: Path) -> str:
    """What divides the fields of a .csv file: a semicolon, as spreadsheets write where numbers have commas, or a
    comma."""
    header = ""
    with open_text(path, newline="") as file:
        for line in file:
            header += line
            if header.strip() and header.count('"') % 2 == 0:
                break
    bare = _QUOTED.sub("", header)
    return ";" if ";" in bare and "," not in bare else ","


def _csv(path: Path, delimiter: str, bad: list[str] | None) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    index, line = 0, 1
    names: list[str] = []
    kind = "TSV" if delimiter == "\t" else "CSV"
    divided = "; semicolons divide them, and a text that holds one must be in quotes" if delimiter == ";" else ""
    with open_text(path, newline="") as file:
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        try:
            for fields in reader:
                if not names:
                    names = fields
                    twice = next((name for name in names if names.count(name) > 1), None)
                    if twice is not None:
                        raise DataError(f"{path}: line {line}: the column {twice!r} stands twice; rename one of them")
                elif fields:
                    if len(fields) == len(names):
                        yield _row(path, index, line, dict(zip(names, fields, strict=True)))
                    else:
                        message = (
                            f"{path}: row {index + 1} (line {line}): has {len(fields)} fields, not the {len(names)} "
                            f"that the first line names: {', '.join(map(shown_name, names))}{divided}"
                        )
                        _refuse(DataError(message), bad)
                    index += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}: row {index + 1} (line {line}): is not valid {kind}: {error}") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise DataError(f"{path}: the column {twice!r} stands twice; rename one of them")
            binary = "binary" in str(file.schema_arrow)
            for rows in file.iter_batches(batch_size=64 if binary else 1024):
                yield from map(without_bytes, rows.to_pylist()) if binary else rows.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from None
