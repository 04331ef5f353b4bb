"""Streams by name: their definition applied to the user's copy of the data."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.api.task import Example, Stream
from holdfast.config.reading import validate
from holdfast.config.stream import StreamConfig, TaskOptions
from holdfast.data.files import SUFFIXES, read_json_file
from holdfast.data.layout import SPLITS, split_files
from holdfast.data.order import check_names, ordered
from holdfast.data.source import Source, StreamSource
from holdfast.data.streams.definition import Definition, TaskDefinition, find, maker, named
from holdfast.errors import ConfigError, DataError, did_you_mean
from holdfast.scoring import find as find_scorer


def benchmark_source(config: StreamConfig) -> StreamSource:
    """Find the tasks of a stream by name.

    Raises:
        ConfigError: there is no such stream, it lacks the path of its data, or an option is wrong.
        DataError: a file is missing, with where it is obtained; a row cannot be used.
    """
    assert config.name is not None
    definition = find(config.name)
    if definition.make is not None:
        return _made(config, definition)
    if config.options:
        raise ConfigError(f"stream.options: {config.name} has none")
    return StreamSource(config.name, _from_folders(config, definition), str(definition.version))


def measured(task: TaskDefinition, scoring: str) -> TaskOptions:
    """The metric that fills the score matrix, and those beside it: the strict one and the source's, either way round.

    One that needs more than holdfast's own dependencies stands beside no other.
    """
    names = [task.metric, *([task.source_metric] if task.source_metric else [])]
    if scoring == "source":
        names.reverse()
    beside = [name for name in [*names[1:], *task.beside] if name and not find_scorer(name).needs]
    return task.model_copy(update={"metric": names[0], "beside": list(dict.fromkeys(beside))})


def group_instructions(file: Path) -> dict[str, str]:
    """The zero-shot instruction of each group of tasks, as O-LoRA's benchmark states them; none without the file."""
    if not file.is_file():
        return {}
    values = read_json_file(file)
    try:
        chosen = {
            group: [entry["instruction"] for entry in entries if entry["instruction_type"] == "zero-shot"]
            for group, entries in values.items()
        }
    except (AttributeError, KeyError, TypeError):
        raise DataError(
            f'{file}: must map each group of tasks to [{{"instruction_type": "zero-shot", "instruction": "..."}}]'
        ) from None
    return {group: texts[0] for group, texts in chosen.items() if texts}


def _made(config: StreamConfig, definition: Definition) -> StreamSource:
    """A stream that a function makes, from options, or from files of a layout of its own."""
    make = maker(definition)
    known = [name for name in inspect.signature(make).parameters if name != "path"]
    for option in config.options:
        if option not in known:
            raise ConfigError(f"stream.options.{option}: {config.name} has no such option{did_you_mean(option, known)}")
    if config.images is not None:
        raise ConfigError(f"stream.images: {config.name} shows no pictures; leave it out")
    if config.paths:
        raise ConfigError(f"stream.paths: {config.name} does not lie in a folder a task; stream.path is enough")
    options: dict[str, Any] = dict(config.options)
    if definition.needs_path:
        options["path"] = _root(config, definition)
    elif config.path is not None:
        raise ConfigError(f"stream.path: {config.name} needs no data; leave it out")
    stream: Stream = make(**options)
    tasks = {task.name: task for task in stream.tasks}
    sources = []
    for name in ordered(list(tasks), config.order, definition.orders):
        values = {"name": name} | definition.defaults
        task = validate(TaskDefinition, values, f"stream {config.name}")
        # The path is where the function once lay. The version of a stream, which runs record, depends on it.
        tasks[name].asked = _frame(tasks[name].test[0]) or f"holdfast.data.{config.name}:{config.name}"
        sources.append(Source(name, measured(task, config.scoring), made=tasks[name]))
    return StreamSource(stream.name, sources, str(definition.version), stream.general)


def _frame(example: Example) -> str | None:
    """A prompt with {sentence} in the place of what it is about; None where it is about nothing in particular."""
    asked = example.turns[-2]
    if asked.cut is None:
        return None
    start, end = asked.cut
    return f"{asked.content[:start]}{{sentence}}{asked.content[end:]}"


def _from_folders(config: StreamConfig, definition: Definition) -> list[Source]:
    assert config.name is not None
    tasks = {task.name: task for task in definition.tasks}
    for name in config.paths:
        if name not in tasks:
            raise ConfigError(f"stream.paths.{name}: {config.name} has no such task{did_you_mean(name, tasks)}")
    names = ordered(list(tasks), config.order, definition.orders)
    check_names(names)
    root = _root(config, definition)
    folders = {} if definition.files else _task_folders(root)
    images = _images(config, definition, root)
    sources = []
    for name in names:
        obtained = f", or say where it lies (stream.paths.{name}); {config.name} is obtained from {definition.source}"
        task = measured(tasks[name], config.scoring).model_copy(update={"images": images})
        source = Source(name, task, obtained=obtained)
        if (asked := tasks[name].test_rows) is not None:
            source.test_rows = partial(named(asked), pictures=Path(images or root))
        places = {split: definition.places(tasks[name], split) for split in SPLITS}
        if name in config.paths:
            own = Path(config.paths[name])
            if tasks[name].test_rows is not None and own.is_dir():
                file_names = {split: [place.rpartition("/")[2] for place in found] for split, found in places.items()}
                source.files = _files(own, name, file_names, obtained)
            else:
                source.folder = own
        elif definition.files:
            source.files = _files(root, name, places, obtained)
        else:
            source.folder = _folder(root, name, folders.get(name, []), obtained)
        if tasks[name].group is not None and definition.instructions is not None:
            source.instruction = _instruction(root, source.folder, definition.instructions, str(tasks[name].group))
        sources.append(source)
    return sources


def general_samples(config: StreamConfig) -> str | None:
    """The file of general samples that a benchmark's methods rehearse, where it has such and the data hold it."""
    wanted = None if config.name is None else find(config.name).samples
    if wanted is None or config.path is None:
        return None
    folders = _task_folders(Path(config.path)).get(wanted, [])
    return next((str(file) for folder in folders for file in split_files(folder, "train")), None)


def _root(config: StreamConfig, definition: Definition) -> Path:
    """The folder of the stream's data."""
    if config.path is None:
        raise ConfigError(
            f"stream.path: {config.name} needs the folder of its data, which is obtained from {definition.source}"
        )
    root = Path(config.path)
    if not root.is_dir():
        raise ConfigError(
            f"stream.path: there is no folder {config.path!r} (looked from {Path.cwd()}); {config.name} is obtained "
            f"from {definition.source}"
        )
    return root


def _task_folders(root: Path) -> dict[str, list[Path]]:
    """The folders at or below the root that hold a train or test file, by their name."""
    found: dict[str, list[Path]] = {}
    for place, below, _ in os.walk(root):
        below.sort()
        folder = Path(place)
        if split_files(folder, "train") or split_files(folder, "test"):
            found.setdefault(folder.resolve().name, []).append(folder)
    return found


def _folder(root: Path, task: str, folders: list[Path], obtained: str) -> Path:
    if not folders:
        raise DataError(
            f"{root}: holds no folder {task!r} with a train or test file; leave the task out (stream.order){obtained}"
        )
    if len(folders) > 1:
        raise ConfigError(
            f"stream.path: task {task!r} could be {' or '.join(map(str, folders))}; say which (stream.paths.{task})"
        )
    return folders[0]


def _files(folder: Path, task: str, places: Mapping[str, Sequence[str]], obtained: str) -> dict[str, list[Path]]:
    """The file of each split, at the first of its places that holds one.

    Args:
        places: of each split, below the folder and without suffix.
    """
    found = {}
    for split, all_names in places.items():
        names = list(dict.fromkeys(all_names))
        files = [file for name in names for end in SUFFIXES if (file := folder / f"{name}{end}").is_file()]
        if files:
            found[split] = files[:1]
        elif split != "eval":
            looked = " or ".join(f"{name}{{{','.join(SUFFIXES)}}}" for name in names)
            raise DataError(
                f"{folder}: task {task!r} has no {split} split; looked for {looked}; add one of these, leave the task "
                f"out (stream.order){obtained}"
            )
    return found


def _images(config: StreamConfig, definition: Definition, root: Path) -> str | None:
    """The folder that the paths of pictures start from; None: that of the row's file.

    Raises:
        ConfigError: there is no such folder.
    """
    if config.images is None:
        return next((str(place) for name in definition.images if (place := root / name).is_dir()), None)
    if not Path(config.images).is_dir():
        raise ConfigError(f"stream.images: there is no folder {config.images!r} (looked from {Path.cwd()})")
    return config.images


def _instruction(root: Path, folder: Path | None, name: str, group: str) -> str | None:
    """The instruction of a group, from the nearest file of that name: above the task's folder, or below the root."""
    above = [] if folder is None else [place for place in folder.parents if place.is_relative_to(root)]
    for place in [*above, root, *sorted(path.parent for path in root.glob(f"*/{name}"))]:
        if group in (instructions := group_instructions(place / name)):
            return instructions[group]
    return None
