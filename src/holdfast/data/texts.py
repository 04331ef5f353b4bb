"""Documents from text files, data files and datasets of Hugging Face, read one at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from holdfast.api.task import Example
from holdfast.data.files import (
    SUFFIXES,
    RawRow,
    half_character,
    is_data_file,
    iterate_rows,
    no_file,
    open_text,
    suffix,
    where,
)
from holdfast.data.formats import all_said, detect, to_examples
from holdfast.data.row_pictures import shows_pictures
from holdfast.errors import ConfigError, DataError, did_you_mean
from holdfast.system.hub import unreachable

TEXT_SUFFIXES = (".txt", *SUFFIXES)


def read_texts(
    source: str | Path, *, column: str = "text", subset: str | None = None, split: str | None = None
) -> Iterator[str]:
    """Read the documents of a source in order. Whether there is such a source is found at once, the rest while reading.

    Args:
        source: a .txt file (one document a line), a .jsonl, .json, .csv or .parquet file, a folder of such files, or
            else the name of a Hugging Face dataset, which is streamed. With ``subset`` or ``split`` a folder is a
            dataset too.
        column: where a row of a file or dataset has its text.
        subset: configuration name of the dataset.
        split: split of the dataset; train where absent.

    Raises:
        ConfigError: there is no such file or folder, and its name is none of a dataset; what only datasets have is
            wanted of a file.
        DataError: a file or dataset cannot be read, or a row lacks the column or has no text in it.
    """
    path = Path(source)
    if path.is_file() and (subset is not None or split is not None):
        raise ConfigError(f"{'split' if subset is None else 'subset'}: {path} is a file; only a dataset has them")
    if path.is_file() and suffix(path) == ".txt" and column != "text":
        raise ConfigError(f"column: {path} has none: each line is a text; leave {column!r} out")
    if path.is_file() or (path.is_dir() and subset is None and split is None):
        return chain.from_iterable(file_texts(file, column) for file in text_files(path))
    if path.is_dir() or is_hub_name(source):
        return dataset_texts(str(source), subset, split or "train", column)
    raise no_path(path)


_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def is_hub_name(source: str | Path) -> bool:
    """Whether what is no file or folder may be a dataset's name: NAME, or OWNER/NAME if there is no folder OWNER."""
    name = str(source)
    owner, slash, rest = name.partition("/")
    is_path = not _HUB_NAME.fullmatch(name) or "/" in rest or suffix(Path(name)) in TEXT_SUFFIXES
    return not is_path and not (slash and Path(owner).is_dir())


def no_path(path: Path) -> ConfigError:
    """There is no such file or folder; the nearest name beside it is told."""
    if os.path.lexists(path):
        return ConfigError(f"{str(path)!r} {no_file(path)}")
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, beside)
    return ConfigError(
        f"there is no file or folder {str(path)!r} (looked from {Path.cwd()})"
        + (near if near.startswith("; did") else "")
    )


def text_files(path: Path) -> list[Path]:
    """The text and data files of a path: itself, or those in the folder and below it, in the order of their names.

    Raises:
        ConfigError: there is no such path.
        DataError: the file is of another kind, or the folder holds none.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if suffix(file) in TEXT_SUFFIXES and is_data_file(file))
        if not files:
            raise DataError(f"{path}: no file in this folder is one of texts ({', '.join(TEXT_SUFFIXES)})")
        return files
    if not path.is_file():
        raise no_path(path)
    if suffix(path) not in TEXT_SUFFIXES:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; known: {', '.join(TEXT_SUFFIXES)}")
    return [path]


def file_texts(file: Path, column: str) -> Iterator[str]:
    """Read the documents of a file: the lines of a .txt file, the column of any other.

    Rows of a task, which have no column "text", give all that they say, turn by turn, on lines of their own.

    Raises:
        DataError: the file cannot be read, or a row lacks the column or has no text in it.
    """
    if suffix(file) == ".txt":
        with open_text(file) as lines:
            for line in lines:
                yield line.removesuffix("\n").removesuffix("\r")
    else:
        for index, row in enumerate(iterate_rows(file)):
            said = all_said(row, file, index) if column == "text" and column not in row else None
            yield row_text(row, column, where(file, index, row)) if said is None else said


class SeenRow(NamedTuple):
    """A row of a task that shows pictures, which are not read yet; their paths are relative to its file."""

    row: dict[str, Any]
    file: Path
    place: int


def file_documents(file: Path, column: str) -> Iterator[str | SeenRow]:
    """Read a file as :func:`file_texts`, but rows of a task that show pictures as they are; raises as it does."""
    if suffix(file) == ".txt" or column != "text":
        yield from file_texts(file, column)
        return
    for index, row in enumerate(iterate_rows(file)):
        if column not in row and shows_pictures(row):
            yield SeenRow(row, file, index)
            continue
        said = None if column in row else all_said(row, file, index)
        yield row_text(row, column, where(file, index, row)) if said is None else said


def task_examples(row: dict[str, Any], file: Path, index: int) -> list[Example]:
    """A row of a task as an example, in the format that its keys tell; none, if it says that its answer is bad.

    Args:
        index: its number in the file, from 0.

    Raises:
        DataError: it cannot be used.
    """
    format, names = detect([row], file)
    named = RawRow({names.get(key, key): value for key, value in row.items()})
    named.line, named.index = getattr(row, "line", None), index
    return to_examples([named], format, file=file)


def dataset_texts(dataset: str, subset: str | None, split: str, column: str) -> Iterator[str]:
    """Stream the column of a Hugging Face dataset, by hub name or local folder.

    Raises:
        DataError: the dataset cannot be read, or a row lacks the column or has no text in it.
    """
    from datasets import load_dataset

    name = f"{dataset}/{subset}[{split}]" if subset else f"{dataset}[{split}]"
    offline = "" if Path(dataset).exists() else unreachable()
    try:
        for index, row in enumerate(load_dataset(dataset, subset, split=split, streaming=True)):
            yield row_text(row, column, where(name, index, row))
    except DataError:
        raise
    except Exception as error:  # whatever a hub, a disk or a parser may raise
        raise DataError(f"dataset {name!r} cannot be read: {error}{offline}") from None


def row_text(row: Mapping[str, Any], column: str, place: str) -> str:
    """The text of a row; an absent one, null, is as good as empty.

    Args:
        place: of the row, for messages.

    Raises:
        DataError: the row lacks the column, or what stands in it is no text.
    """
    if column not in row:
        raise DataError(f"{place}: column: there is no column {column!r}{did_you_mean(column, row)}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: {column}: must be text, not {value!r:.40}")
    if (wrong := half_character(value)) is not None:
        raise DataError(f"{place}: {column}: {wrong}")
    return value
