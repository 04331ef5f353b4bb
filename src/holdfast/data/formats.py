"""Files to rows to examples: which shapes a row of a task may have, and what is said about a row that has none."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

from holdfast.api.task import Example, Turn
from holdfast.errors import ConfigError, DataError, did_you_mean

Format = Literal["messages", "sharegpt", "prompt_answer", "sentence_label", "alpaca", "text"]

# The keys that tell a format, in the order in which `detect` looks; alpaca's `input` may be absent.
KEYS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_answer": ("prompt", "answer"),
    "sentence_label": ("sentence", "label"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")

_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_BLANK = re.compile(r"[ \t\r\n]*")


class RawRow(dict[str, Any]):
    """One row of a file; ``line`` is the 1-based line on which it begins, where lines mean something."""

    line: int | None = None


def where(file: str | Path, index: int, row: dict[str, Any] | None = None) -> str:
    """Name a row in a message: its file, its 1-based number and, where known, its line."""
    line = getattr(row, "line", None)
    return f"{file}: row {index + 1}" + (f" (line {line})" if line else "")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a file; see :func:`iterate_rows`."""
    return list(iterate_rows(path))


def iterate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read a .json (an array of objects, or one object a line), .jsonl, .csv or .parquet file, row by row.

    Only an array is in memory as a whole.

    Raises:
        DataError: the file is absent, not UTF-8, malformed, or holds no row; a row is not an object. The rows before
            a bad one are given first.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    rows: Iterable[dict[str, Any]]
    if path.suffix == ".parquet":
        rows = _parquet(path)
    elif path.suffix == ".csv":
        rows = _csv(path)
    else:
        rows = _array(path, read_text(path)) if _begins_an_array(path) else _lines(path)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: holds no rows")


def read_text(path: Path) -> str:
    """Read a UTF-8 file; DataError, with the offset of the first bad byte, if it is not UTF-8."""
    with open_text(path) as file:
        return file.read()


@contextlib.contextmanager
def open_text(path: Path, newline: str = "\n") -> Iterator[TextIO]:
    """Open a UTF-8 file, with or without a byte order mark; a line of it ends with a line feed and nothing else.

    Args:
        newline: as of ``open``.

    Raises:
        DataError: the file cannot be read, or what is read of it is not UTF-8: with the offset of the first bad byte.
    """
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def _not_utf8(path: Path) -> DataError:
    """Where the first byte stands that is not UTF-8; a decoder tells no more than its place in the part it read."""
    before = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                place = f"byte {before + error.start} (line {number}) is 0x{line[error.start]:02x}"
                return DataError(f"{path}: is not UTF-8: {place}; save the file as UTF-8")
            before += len(line)
    raise AssertionError(path)


def detect(rows: list[dict[str, Any]], file: str | Path) -> Format:
    """Name the format of a split by the keys of its first row.

    Raises:
        DataError: the keys are those of no known format.
    """
    found = rows[0].keys()
    for format in get_args(Format):
        if found >= set(KEYS[format]):
            return format
    known = ", ".join(f"{format} {{{', '.join(keys)}}}" for format, keys in KEYS.items())
    raise DataError(
        f"{where(file, 0, rows[0])}: the keys {', '.join(map(repr, found))} are no known shape; known: {known}"
    )


def to_examples(
    rows: list[dict[str, Any]],
    format: str,
    *,
    file: str | Path,
    labels: list[str] | None = None,
    instruction: str | None = None,
    prompt: str | None = None,
    input: str | None = None,
    each: bool = False,
) -> list[Example]:
    """Turn the rows of one split into examples.

    Args:
        rows: what `read_rows` returned.
        format: one of `KEYS`.
        file: where the rows came from, for messages.
        labels: the answers that a row may have; None: any.
        instruction: what is asked about each sentence of a sentence_label split.
        prompt: how a sentence_label row is asked; where absent, as :func:`asked` says.
        input: regular expression whose group 1 is what the prompt of a prompt_answer row is about; None: all of it.
        each: a conversation gives an example for each of its answers, after the true ones before, not for its last.

    Raises:
        ConfigError: the format is unknown.
        DataError: a row is not of the format; the message names file, row, line and reason.
    """
    if format not in KEYS:
        raise ConfigError(f"format: unknown format {format!r}{did_you_mean(format, KEYS)}")
    template = asked(instruction, labels, prompt)
    examples = []
    for index, row in enumerate(rows):
        try:
            if format == "text":
                examples.append(Example(file=str(file), row=index, text=_field(row, "text")))
                continue
            turns = _turns(row, format, template, input)
            ends = [end for end, turn in enumerate(turns, 1) if turn.role == "assistant"]
            for number, end in enumerate(ends) if each else [(None, ends[-1])]:
                _check_label(turns[end - 1].content, labels)
                examples.append(Example(file=str(file), row=index, turns=turns[:end], number=number))
        except _BadRowError as error:
            raise DataError(f"{where(file, index, row)}: {error}") from None
    return examples


def all_said(row: dict[str, Any], file: str | Path, index: int) -> str | None:
    """All that a row of a task says, turn by turn, on lines of their own; None where its keys are those of no format.

    Raises:
        DataError: the row is not of the format that its keys tell.
    """
    if not any(row.keys() >= set(keys) for keys in KEYS.values()):
        return None
    try:
        turns = _turns(row, detect([row], file), asked(None, None), None)
    except _BadRowError as error:
        raise DataError(f"{where(file, index, row)}: {error}") from None
    return "\n".join(turn.content for turn in turns)


class _BadRowError(Exception):
    """The reason why a row cannot be used."""


def asked(instruction: str | None, labels: list[str] | None, prompt: str | None = None) -> str:
    """How a sentence_label row is asked, with {sentence} in its place.

    O-LoRA's prompt where none is given: instruction, options, sentence, "Answer:". Without an instruction the sentence
    asks itself.
    """
    if prompt is None:
        options = "Option: {labels}\n" if labels else ""
        prompt = ("{instruction}\n" + options if instruction else "") + "{sentence}\nAnswer:"
    return prompt.replace("{labels}", ", ".join(labels or [])).replace("{instruction}", (instruction or "").rstrip())


def _turns(row: dict[str, Any], format: str, template: str, input: str | None) -> tuple[Turn, ...]:
    match format:
        case "prompt_answer":
            prompt = _field(row, "prompt")
            return Turn("user", prompt, _about(prompt, input)), Turn("assistant", _field(row, "answer").strip())
        case "sentence_label":
            sentence, label = _field(row, "sentence"), _field(row, "label").strip()
            before, _, after = template.partition("{sentence}")
            cut = (len(before), len(before) + len(sentence))
            return Turn("user", before + sentence + after, cut), Turn("assistant", label)
        case "alpaca":
            instruction, text = _field(row, "instruction"), _field({"input": ""} | row, "input", may_be_empty=True)
            question = Turn("user", instruction)
            if text.strip():
                start = len(instruction) + 1
                question = Turn("user", f"{instruction}\n{text}", (start, start + len(text)))
            return question, Turn("assistant", _field(row, "output").strip())
        case "messages":
            return _conversation(row, "messages", "role", "content", {r: r for r in ("system", "user", "assistant")})
        case "sharegpt":
            return _conversation(row, "conversations", "from", "value", _SHAREGPT_ROLES)
    raise AssertionError(format)


def _about(prompt: str, input: str | None) -> tuple[int, int]:
    """The span of a prompt that says what it is about."""
    if input is None:
        return 0, len(prompt)
    found = re.search(input, prompt)
    if found is None:
        raise _BadRowError(f"prompt: does not match {input!r}, the task's input")
    return found.span(1)


def _check_label(answer: str, labels: list[str] | None) -> None:
    if labels is not None and answer not in labels:
        near = did_you_mean(answer, labels)
        raise _BadRowError(
            f"label: {answer!r:.60} is not one of the labels ({', '.join(labels)})"
            + (near if near.startswith("; did") else "")
        )


def _conversation(
    row: dict[str, Any], key: str, role_key: str, content_key: str, roles: dict[str, str]
) -> tuple[Turn, ...]:
    messages = row.get(key)
    if not isinstance(messages, list):
        raise _BadRowError(f"{key}: must be a list of turns, not {_type(messages)}")
    turns = []
    for number, message in enumerate(messages, 1):
        turn = f"{key}, turn {number}"
        if not isinstance(message, dict):
            raise _BadRowError(f"{turn}: must be an object with {role_key} and {content_key}, not {_type(message)}")
        role = roles.get(_field(message, role_key, turn))
        if role is None:
            raise _BadRowError(
                f"{turn}: unknown {role_key} {message[role_key]!r}{did_you_mean(message[role_key], roles)}"
            )
        content = _field(message, content_key, turn, may_be_empty=role == "system")
        if role == "assistant":
            turns.append(Turn("assistant", content.strip()))
        elif role == "user":
            turns.append(Turn("user", content, (0, len(content))))
        elif content.strip():
            turns.append(Turn("system", content))
    if not turns or turns[-1].role != "assistant":
        raise _BadRowError(f"{key}: must end with an answer ({role_key} {_name(roles, 'assistant')})")
    if next(turn.role for turn in turns if turn.role != "system") != "user":
        raise _BadRowError(f"{key}: must begin with a question ({role_key} {_name(roles, 'user')})")
    return tuple(turns)


def _name(roles: dict[str, str], role: str) -> str:
    return next(name for name, meant in roles.items() if meant == role)


def _field(row: dict[str, Any], key: str, within: str = "", may_be_empty: bool = False) -> str:
    name = f"{within}: {key}" if within else key
    value = row.get(key)
    if value is None:
        raise _BadRowError(f"{name}: is missing; found: {', '.join(map(repr, row)) or 'nothing'}")
    if not isinstance(value, str):
        raise _BadRowError(f"{name}: must be text, not {_type(value)} ({value!r:.40})")
    if not may_be_empty and not value.strip():
        raise _BadRowError(f"{name}: is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _BadRowError(f"{name}: holds half a character (\\u{ord(value[error.start]):04x})") from None
    return value


_TYPES = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}


def _type(value: Any) -> str:
    return _TYPES.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _row(path: Path, index: int, line: int, value: Any) -> RawRow:
    if not isinstance(value, dict):
        raise DataError(f"{path}: row {index + 1} (line {line}): must be an object, not {_type(value)}")
    row = RawRow(value)
    row.line = line
    return row


def _begins_an_array(path: Path) -> bool:
    with open_text(path) as file:
        return next((line.lstrip().startswith("[") for line in file if line.strip()), False)


def _array(path: Path, text: str) -> list[dict[str, Any]]:
    """Parse a JSON array element by element, so that each row knows its line."""
    decoder, rows = json.JSONDecoder(), list[dict[str, Any]]()
    blank = lambda position: _BLANK.match(text, position).end()  # type: ignore[union-attr]  # noqa: E731 - always matches
    line, counted = 1, 0
    position = blank(text.index("[") + 1)
    try:
        while text[position : position + 1] != "]" or rows:
            line, counted = line + text.count("\n", counted, position), position
            value, position = decoder.raw_decode(text, position)
            rows.append(_row(path, len(rows), line, value))
            position = blank(position)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
            position = blank(position + 1)
        if blank(position + 1) != len(text):
            raise json.JSONDecodeError("Extra data after the array", text, blank(position + 1))
    except json.JSONDecodeError as error:
        raise _invalid(path, len(rows), error.lineno, error) from None
    return rows


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open_text(path) as file:
        full = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for index, (number, line) in enumerate(full):
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise _invalid(path, index, number, error) from None
            yield _row(path, index, number, value)


def _invalid(path: Path, index: int, line: int, error: json.JSONDecodeError) -> DataError:
    expected = "an array of objects, or one object a line" if path.suffix == ".json" else "one object a line"
    return DataError(
        f"{path}: row {index + 1} (line {line}): is not valid JSON: {error.msg} at column {error.colno}; "
        f"expected {expected}"
    )


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    index, line = 0, 1
    names: list[str] = []
    with open_text(path, newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            for fields in reader:
                if not names:
                    names = fields
                elif fields:
                    if len(fields) != len(names):
                        raise DataError(
                            f"{path}: row {index + 1} (line {line}): has {len(fields)} fields, not the {len(names)} "
                            f"that the first line names: {', '.join(names)}"
                        )
                    yield _row(path, index, line, dict(zip(names, fields, strict=True)))
                    index += 1
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}: row {index + 1} (line {line}): is not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for rows in file.iter_batches(batch_size=1024):
                yield from rows.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from None
