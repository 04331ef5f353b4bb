"""Data that a user gives to learn: a file, a folder or a dataset, row by row, each with hashes that know it again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.api.task import Example, fingerprint
from holdfast.config.stream import DataConfig, TaskConfig
from holdfast.data.conversation import Noticed
from holdfast.data.files import COMPRESSED, SUFFIXES, RawRow, is_data_file, read_text, suffix, where
from holdfast.data.formats import USED, detect, to_examples
from holdfast.data.layout import BESIDE, INNER, SPLITS
from holdfast.data.load import refuse_bad_rows
from holdfast.data.parts import Part, first_part, first_row, renamed
from holdfast.data.row_pictures import COLUMNS, with_kept_pictures
from holdfast.data.source import SAVED, Source, check_asked, read_labels, read_parts, without_reasoning
from holdfast.data.texts import is_hub_name, no_path
from holdfast.errors import ColumnsError, ConfigError, DataError
from holdfast.system.files import json_text

DIGITS = 32
"""Hexadecimal digits of the hashes of rows and prompts: 128 bits."""

_NOT_IN_NAMES = re.compile(r"[/\\\0]+")
_SPLIT = re.compile(rf"({'|'.join(name for names in SPLITS.values() for name in names)})(?![a-z]).*")


@dataclass(frozen=True)
class GivenRow:
    """A row that can be learned.

    Attributes:
        values: the columns that its format reads, by the format's own names.
        id: a hash of all that it says.
        prompt: a hash of what it asks, whatever the white space in it; of a text, of the text.
    """

    values: dict[str, Any]
    example: Example
    id: str
    prompt: str

    @property
    def number(self) -> float:
        """A number between 0 and 1 that follows from what it asks."""
        return int(self.prompt[:12], 16) / 16**12


@dataclass
class Given:
    """What a user gives.

    Attributes:
        options: how its rows are read, with their format, labels and instruction.
        rows: by split: train, test and eval as far as they are there, or "all" where there is no split.
        notes: what is said of how it was read.
    """

    name: str
    options: TaskConfig
    rows: dict[str, list[GivenRow]]
    notes: list[str] = field(default_factory=list)


def given_name(data: str) -> str:
    """What a task is called after its data: the stem of a file, the name of a folder, the last part of a hub name."""
    path = Path(data)
    name = path.name if path.exists() else data.rstrip("/").rpartition("/")[2]
    if not path.is_dir():
        for ending in (*COMPRESSED, *SUFFIXES):
            name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return _NOT_IN_NAMES.sub("-", name or path.resolve().name).strip(". ") or "task"


def given_files(data: str) -> dict[str, list[Path]] | None:
    """The data files of a path by split, or as the split "all"; None where it is a dataset of Hugging Face.

    In a folder, a file or a folder belongs to the split that its name begins with: ``train.jsonl``, ``train-2.csv``,
    ``test/part-1.jsonl``. Where no name does, all data files together are the split "all".

    Raises:
        ConfigError: there is no such path, and its name is none of a dataset.
        DataError: the folder holds no data, test rows alone, data files without a split beside others that have one, or
            a link to nothing in a file's place.
    """
    path = Path(data)
    if path.is_file():
        return {"all": [path]}
    if not path.is_dir():
        if is_hub_name(data):
            return None
        raise ConfigError(f"DATA: {no_path(path)}")
    if any((path / name).is_file() for name in SAVED):
        return None
    files = [
        file
        for file in sorted(path.rglob("*"))
        if suffix(file) in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and file.name.lower().partition(".")[0] not in BESIDE
        and is_data_file(file)
    ]
    found: dict[str, list[Path]] = {}
    for file in files:
        found.setdefault(_split_of(file.relative_to(path)), []).append(file)
    if not files:
        raise DataError(f"{path}: holds no data file ({', '.join(SUFFIXES)})")
    without = found.pop("", [])
    if not found:
        return {"all": files}
    if without:
        names = [file.relative_to(path).as_posix() for file in without]
        split = next(file for file in files if file not in without).relative_to(path).as_posix()
        raise DataError(
            f"{path}: {_listed(names)} {'have' if len(names) > 1 else 'has'} no split's name, as {split} has, and "
            f"would not be read; begin the name with train, validation or test (train-{without[0].name}), or move "
            "what is not to be learned out of the folder"
        )
    if "train" not in found:
        raise DataError(f"{path}: has {' and '.join(found)} rows, but no train split")
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _split_of(file: Path) -> str:
    """The split that a part of a path is named after; empty if none is."""
    for part in (file.parts[0] if file.parts[0] != INNER else "", *file.parts[1:]):
        if match := _SPLIT.fullmatch(part.lower()):
            return next(split for split, names in SPLITS.items() if match[1] in names)
    return ""


def files_fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 (hexadecimal) over the content of files, in any order."""
    digests = []
    for file in files:
        try:
            with file.open("rb") as content:
                digests.append(hashlib.file_digest(content, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def read_given(
    data: str,
    options: TaskConfig,
    settings: DataConfig,
    inherited: bool = False,
    output: Path | None = None,
) -> Given:
    """Read and check all rows.

    Args:
        options: how rows are read, and the dataset's configuration; its name is what the task is called.
        settings: what is done with rows that cannot be used, and with reasoning.
        inherited: the mapping of columns was given with earlier data. If it does not fit, it is not applied.
        output: the run's directory, beside which rows that cannot be used are listed where they are many; None: a
            message alone tells of them.

    Raises:
        ConfigError: there are no such data, or an option does not suit them.
        DataError: a file or a row cannot be used.
    """
    if options.kind != "sft":
        raise ConfigError(
            f"task.kind: `holdfast learn` trains on answers; a task of kind {options.kind} goes into a stream of "
            "`holdfast run` (stream.tasks)"
        )
    try:
        return _read(data, options, settings, output)
    except ColumnsError as error:
        if not inherited:
            raise
        reason = error
    try:
        given = _read(data, options.model_copy(update={"columns": {}}), settings, output)
    except DataError as error:
        raise DataError(
            f"{reason}\nThis mapping comes from an earlier call (learn.json), and without it: {error}\nGive these data "
            "a mapping of their own, such as 'task={columns: {question: prompt, reply: answer}}'"
        ) from None
    given.notes.insert(0, f"columns: the mapping of an earlier call ({_mapping(options.columns)}) is not applied")
    return given


def _mapping(columns: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name}: {meant or 'null'}" for name, meant in columns.items())


def _read(data: str, options: TaskConfig, settings: DataConfig, output: Path | None) -> Given:
    files = given_files(data)
    source = Source(options.name, options, draws=True)
    if files is None:
        source.dataset = (data, options.subset)
    else:
        source.files = files
        options = source.options = _with_what_lies_beside(Path(data), options)
    bad: list[str] = []
    splits, labels = read_parts(source, DataConfig(), bad)
    first = first_part(next(iter(splits.values())))
    format, names = (options.format, {}) if options.format else detect([first_row(first.rows)], first.file)
    check_asked(options.name, format, options.instruction, options.prompt)
    noticed = Noticed()
    rows = {split: _rows(parts, format, names, options, bad, noticed) for split, parts in splits.items()}
    if settings.reasoning == "drop":
        rows = {
            split: [replace(row, example=without_reasoning(row.example)) for row in part]
            for split, part in rows.items()
        }
    notes = noticed.notes()
    if names:
        notes.append(f"columns are read as {_mapping(names)}")
    if format == "sentence_label" and options.instruction is None and options.prompt is None:
        looked = f", nor {Path(data) / 'instruction.txt'}" if Path(data).is_dir() else ""
        notes.append(
            "nothing tells the model what is asked of a sentence: there is no task.instruction and no task.prompt"
            + looked
        )
    if bad:
        notes.append(f"{len(bad)} rows cannot be used and are left out:\n  {refuse_bad_rows(bad, settings, output)}")
    if not any(rows.values()):
        raise DataError(f"{data}: no row is left to learn: {'; '.join(notes)}")
    changes: dict[str, Any] = {"format": format}
    if format == "sentence_label":
        stated = sorted({row.example.answer for split in rows.values() for row in split})
        changes["labels"] = options.labels or labels or stated
    return Given(options.name, options.model_copy(update=changes), rows, notes)


def _with_what_lies_beside(path: Path, options: TaskConfig) -> TaskConfig:
    """The options with the labels and the instruction that lie in the folder."""
    changes: dict[str, Any] = {}
    if path.is_dir() and (file := path / "labels.json").is_file() and options.labels is None:
        changes["labels"] = read_labels(file)
    if path.is_dir() and (file := path / "instruction.txt").is_file() and options.instruction is None:
        changes["instruction"] = read_text(file).strip() or None
    return options.model_copy(update=changes)


def _rows(
    parts: list[Part], format: str, names: dict[str, str], options: TaskConfig, bad: list[str], noticed: Noticed
) -> list[GivenRow]:
    """The rows of a split that can be used."""
    rows = []
    for part in parts:
        for index, raw in enumerate(part.rows):
            row = RawRow(renamed(raw, names, ""))
            row.line, row.index = getattr(raw, "line", None), getattr(raw, "index", index)
            examples = to_examples(
                [row],
                format,
                file=part.file,
                labels=options.labels,
                instruction=options.instruction,
                prompt=options.prompt if format == "sentence_label" else None,
                input=options.input,
                images=None if options.images is None else Path(options.images),
                bad=bad,
                noticed=noticed,
            )
            values = _kept(row, format, examples, Path(part.file).parent if options.images is None else options.images)
            try:
                json_text(values)
            except (TypeError, ValueError) as error:
                bad.append(f"{where(part.file, row.index, row)}: cannot be kept as JSON: {error}")
                continue
            rows += [GivenRow(values, example, *hashes(example, format)) for example in examples]
    return rows


def _kept(row: RawRow, format: str, examples: list[Example], folder: str | Path) -> dict[str, Any]:
    """The columns of a row that its format reads; in the places of pictures, their paths in the run's own folder."""
    values = {key: row[key] for key in row if key in USED[format] and row[key] is not None}
    if not any(example.pictures for example in examples):
        return values
    return with_kept_pictures(values | {key: row[key] for key in COLUMNS if row.get(key)}, Path(folder))


def hashes(example: Example, format: str) -> tuple[str, str]:
    """The hash of all that a row says, and that of what it asks.

    What is asked about a sentence does not count: the labels that it names differ from month to month.
    """
    if example.text is not None:
        return _hash(example.text), _hash(_squeezed(example.text))
    if format == "sentence_label":
        shown = [picture.number for picture in example.pictures]
        asked_of = [_squeezed(example.input), *shown] if shown else _squeezed(example.input)
        return _hash([example.input, example.answer, *shown]), _hash(asked_of)
    asked = [[turn.role, _squeezed(turn.said), *turn.shown] for turn in example.turns[:-1]]
    return fingerprint([example], [], [])[:DIGITS], _hash([asked, example.tools])


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:DIGITS]
