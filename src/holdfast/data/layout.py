"""Where the splits of a task lie: files of a folder named after their split, in one piece or in shards, or one file."""

from __future__ import annotations

import re
from pathlib import Path

from holdfast.data.files import SUFFIXES, is_data_file, stem, suffix
from holdfast.errors import DataError

SPLITS = {"train": ("train",), "eval": ("eval", "dev", "validation", "valid", "val"), "test": ("test",)}
BESIDE = ("labels", "instruction_config", "dataset_info", "dataset_infos")
"""Names of JSON files that lie beside data and hold none."""
INNER = "data"
"""The folder in which a dataset of Hugging Face keeps its files."""

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")


def data_files(folder: Path) -> list[Path]:
    """The data files in a folder itself, in the order of their names."""
    return sorted(
        file
        for file in folder.iterdir()
        if suffix(file) in SUFFIXES and stem(file) not in BESIDE and is_data_file(file)
    )


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a split in a folder, or in the folder ``data`` in it: one file, or all shards of it, in order.

    Raises:
        DataError: two files are named as the split, or shards are missing.
    """
    for place in (folder, folder / INNER):
        files = _named(place, split) if place.is_dir() else []
        if files:
            return files
    return []


def _named(folder: Path, split: str) -> list[Path]:
    whole: list[Path] = []
    shards: dict[int, list[Path]] = {}
    for file in data_files(folder):
        shard = _SHARD.fullmatch(stem(file))
        if (shard[1] if shard else stem(file)) not in SPLITS[split]:
            continue
        if shard:
            shards.setdefault(int(shard[3]), []).append(file)
        else:
            whole.append(file)
    if len(whole) + len(shards) > 1:
        files = whole + [files[0] for files in shards.values()]
        raise DataError(f"{folder}: has {' and '.join(file.name for file in files)}; only one may be there")
    for count, files in shards.items():
        there = {int(match[2]) for file in files if (match := _SHARD.fullmatch(stem(file)))}
        missing = sorted(set(range(count)) - there)
        if missing or len(files) != count:
            raise DataError(
                f"{folder}: of the {count} shards of {split} {', '.join(f'{number:05d}' for number in missing)} are "
                f"missing; there are {', '.join(file.name for file in files)}"
            )
        return files
    return whole


def is_task(folder: Path) -> bool:
    """Whether a folder holds a train or test file, or exactly one data file."""
    return bool(split_files(folder, "train") or split_files(folder, "test")) or alone(folder) is not None


def alone(folder: Path) -> Path | None:
    """The only data file of a folder, if it is not named as a split."""
    files = data_files(folder)
    if len(files) != 1 or any(stem(files[0]) in names for names in SPLITS.values()) or _SHARD.fullmatch(stem(files[0])):
        return None
    return files[0]
