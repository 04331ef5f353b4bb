"""From a configuration to a stream: which tasks, in which order, from which files, and what is odd about them."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.config import DataConfig, GeneralConfig, StreamConfig, TaskConfig
from holdfast.data.formats import SUFFIXES, Row, detect, read_rows, read_text, to_examples, where
from holdfast.data.task import Counts, Example, General, Stream, Task, fingerprint
from holdfast.errors import ConfigError, DataError, did_you_mean

# Built-in streams: the module whose function of the stream's name makes it.
BUILT_IN = {"chronicle": "holdfast.data.chronicle"}
METRICS = ("accuracy", "rouge_l", "loss")
SPLITS = {"train": ("train",), "eval": ("eval", "dev", "validation"), "test": ("test",)}

logger = logging.getLogger("holdfast")


def load_stream(config: StreamConfig, data: DataConfig) -> Stream:
    """Load the tasks of a stream, in order; relative paths start at the current directory.

    Raises:
        ConfigError: a name, an option, a path or a metric is unknown; two tasks have one name.
        DataError: a split is missing or empty; a row cannot be used; ``data.on_overlap`` is "error" and test rows
            stand in a train split.
    """
    if config.name is not None:
        stream = _built_in(config.name, config.options)
        tasks = _in_order(stream.tasks, config.order)
        loaded, name, general = [_limited(task, data) for task in tasks], stream.name, stream.general
    else:
        if config.options:
            raise ConfigError("stream.options: only a built-in stream (stream.name) has options")
        if config.path is not None:
            sources, name = _folders(Path(config.path), config.order), Path(config.path).resolve().name
        else:
            assert config.tasks is not None
            sources, name = [_Source(task) for task in _in_order(config.tasks, config.order)], "tasks"
        _check_names([source.config.name for source in sources])
        loaded, general = [_load(source, data) for source in sources], []
    return Stream(name, [_checked(task, data) for task in loaded], general)


def load_general(configs: list[GeneralConfig] | None, stream: Stream) -> list[General]:
    """Load the measures of general ability; None: those that the stream brings.

    Raises:
        ConfigError: two measures have one name.
        DataError: a file or row cannot be used.
    """
    if configs is None:
        return stream.general
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"evaluation.general: two measures are called {name!r}")
    return [_general(config) for config in configs]


# --- where tasks come from ---


@dataclass
class _Source:
    """A task to load; ``group_instruction`` is used where a sentence_label task brings no instruction of its own."""

    config: TaskConfig
    group_instruction: str | None = None


def _built_in(name: str, options: dict[str, Any]) -> Stream:
    if name not in BUILT_IN:
        raise ConfigError(f"stream.name: unknown stream {name!r}{did_you_mean(name, BUILT_IN)}")
    make: Callable[..., Stream] = getattr(importlib.import_module(BUILT_IN[name]), name)
    known = inspect.signature(make).parameters
    for option in options:
        if option not in known:
            raise ConfigError(f"stream.options.{option}: {name} has no such option{did_you_mean(option, known)}")
    return make(**options)


def _in_order(tasks: list[Any], order: list[str] | None) -> list[Any]:
    names = [task.name for task in tasks]
    _check_names(names)
    for name in order or []:
        if name not in names:
            raise ConfigError(f"stream.order: unknown task {name!r}{did_you_mean(name, names)}")
    return tasks if order is None else [tasks[names.index(name)] for name in order]


def _check_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"stream: two tasks are called {name!r}; each needs a name of its own")
        if not name.strip(". ") or any(character in name for character in "/\\\0"):
            raise ConfigError(f"stream: a task cannot be called {name!r}: its name must be good for a file's name too")


def _folders(path: Path, order: list[str] | None) -> list[_Source]:
    """Every folder below ``path`` that holds a train or test file, or those that ``order`` names."""
    if not path.is_dir():
        raise ConfigError(f"stream.path: there is no folder {str(path)!r} (looked from {Path.cwd()})")
    found = {
        f"./{folder.relative_to(path).as_posix()}": folder
        for folder in sorted(path.rglob("*"), key=lambda folder: (folder.name, folder))
        if folder.is_dir() and (_split_files(folder, "train") or _split_files(folder, "test"))
    }
    if not found:
        raise DataError(f"{path}: no folder below it holds a train or test file ({', '.join(SUFFIXES)})")
    picked = list(found)
    if order is not None:
        picked = []
        for entry in order:
            matches = [key for key in found if key == entry or key.endswith(f"/{entry}")]
            if not matches:
                near = did_you_mean(entry, [folder.name for folder in found.values()])
                raise ConfigError(f"stream.order: {path} holds no task {entry!r}{near}")
            if len(matches) > 1:
                raise ConfigError(f"stream.order: {entry!r} could be {' or '.join(matches)}; write which")
            picked += matches
    names = [found[key].name for key in picked]
    instructions = _group_instructions(path)
    return [
        _Source(
            TaskConfig.model_validate(
                {"name": name if names.count(name) == 1 else key[2:].replace("/", "-"), "path": str(found[key])}
            ),
            instructions.get(found[key].parent.resolve().name),
        )
        for key, name in zip(picked, names, strict=True)
    ]


def _group_instructions(path: Path) -> dict[str, str]:
    """The zero-shot instruction of each group of tasks, as O-LoRA's benchmark states them."""
    file = path / "instruction_config.json"
    if not file.exists():
        return {}
    values = _json(file)
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


# --- one task ---


@dataclass
class _Split:
    file: str
    rows: list[dict[str, Any]]


def _load(source: _Source, data: DataConfig) -> Task:
    config = source.config
    limits = {"train": data.train_rows, "test": data.test_rows}
    if config.path is None:
        splits, labels = _from_dataset(config, limits)
    else:
        splits, labels = _from_folder(Path(config.path), config.name)
    for name, split in splits.items():
        split.rows = split.rows[: limits.get(name)]
        if config.columns:
            split.rows = [_renamed(row, config.columns, where(split.file, i, row)) for i, row in enumerate(split.rows)]

    format = config.format or detect(splits["train"].rows, splits["train"].file)
    instruction = config.instruction or _own_instruction(config)
    if instruction is not None and format != "sentence_label":
        raise ConfigError(
            f"task {config.name!r}: instruction: belongs to sentence_label tasks; the rows of this one, {format}, "
            "hold their own"
        )
    if format == "sentence_label":
        instruction = instruction or source.group_instruction
        labels = labels or _stated_labels(config, splits["train"])
    else:
        labels = None
    metric = config.metric or ("loss" if format == "text" else "accuracy")
    if metric not in METRICS:
        raise ConfigError(f"task {config.name!r}: metric: unknown metric {metric!r}{did_you_mean(metric, METRICS)}")
    if format == "text" and metric != "loss":
        raise ConfigError(f"task {config.name!r}: metric: {metric} needs answers, and text has none; loss would do")

    examples = {
        name: to_examples(split.rows, format, file=split.file, labels=labels, instruction=instruction)
        for name, split in splits.items()
    }
    return Task(config.name, metric, examples["train"], examples["test"], examples.get("eval", []), labels)


def _from_folder(folder: Path, task: str) -> tuple[dict[str, _Split], list[str] | None]:
    if not folder.is_dir():
        raise ConfigError(f"task {task!r}: path: there is no folder {str(folder)!r} (looked from {Path.cwd()})")
    splits = {}
    for split, stems in SPLITS.items():
        files = _split_files(folder, split)
        if len(files) > 1:
            raise DataError(f"{folder}: has {' and '.join(file.name for file in files)}; only one may be there")
        if files:
            splits[split] = _Split(str(files[0]), read_rows(files[0]))
        elif split != "eval":
            looked = ", ".join(stem + suffix for stem in stems for suffix in SUFFIXES)
            raise DataError(
                f"{folder}: task {task!r} has no {split} split; looked for {looked}; "
                "add one of these, or leave the task out (stream.order)"
            )
    file = folder / "labels.json"
    return splits, _labels(file) if file.exists() else None


def _split_files(folder: Path, split: str) -> list[Path]:
    return [file for stem in SPLITS[split] for suffix in SUFFIXES if (file := folder / (stem + suffix)).is_file()]


def _from_dataset(config: TaskConfig, limits: dict[str, int | None]) -> tuple[dict[str, _Split], list[str] | None]:
    """Load a Hugging Face dataset; class labels become their names."""
    from datasets import ClassLabel, DatasetDict, load_dataset

    source = f"{config.dataset}/{config.subset}" if config.subset else str(config.dataset)
    try:
        found = load_dataset(config.dataset, config.subset)
    except Exception as error:  # whatever a hub, a disk or a parser may raise
        raise DataError(f"task {config.name!r}: dataset: {source!r} cannot be loaded: {error}") from None
    assert isinstance(found, DatasetDict)
    splits, labels = {}, None
    for split, stems in SPLITS.items():
        stem = next((stem for stem in stems if stem in found), None)
        if stem is None:
            if split == "eval":
                continue
            raise DataError(f"task {config.name!r}: dataset {source!r} has no {split} split, but {', '.join(found)}")
        table = found[stem]
        rows = table.select(range(min(len(table), limits.get(split) or len(table)))).to_list()
        if not rows:
            raise DataError(f"task {config.name!r}: split {stem} of dataset {source!r} holds no rows")
        for column, feature in table.features.items():
            if isinstance(feature, ClassLabel):
                for row in rows:
                    index = row[column]
                    row[column] = feature.names[index] if index is not None and index >= 0 else None
                if config.columns.get(column, column) == "label":
                    labels = [name.strip() for name in feature.names]
        splits[split] = _Split(f"{source}[{stem}]", rows)
    return splits, labels


def _stated_labels(config: TaskConfig, train: _Split) -> list[str] | None:
    """Labels where none are declared: a folder must declare them; a dataset's are those of its train split."""
    if config.path is not None:
        raise DataError(
            f"{Path(config.path) / 'labels.json'}: is missing; a sentence_label task needs an array of its labels, "
            'for example ["good", "bad"]'
        )
    return sorted({row["label"].strip() for row in train.rows if isinstance(row.get("label"), str)}) or None


def _renamed(row: dict[str, Any], columns: dict[str, str], place: str) -> dict[str, Any]:
    if not columns:
        return row
    for column in columns:
        if column not in row:
            raise DataError(f"{place}: columns: there is no column {column!r}{did_you_mean(column, row)}")
    renamed = Row({columns.get(key, key): value for key, value in row.items()})
    renamed.line = getattr(row, "line", None)
    if len(renamed) < len(row):
        taken = next(new for old, new in columns.items() if new in row and new not in columns and new != old)
        raise DataError(f"{place}: columns: there is a column {taken!r} already; rename that one too")
    return renamed


def _own_instruction(config: TaskConfig) -> str | None:
    file = Path(config.path) / "instruction.txt" if config.path is not None else None
    return read_text(file).strip() or None if file is not None and file.exists() else None


def _labels(file: Path) -> list[str]:
    values = _json(file)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise DataError(f'{file}: must be an array of labels, for example ["good", "bad"]')
    labels = [value.strip() for value in values]
    for label in labels:
        if labels.count(label) > 1:
            raise DataError(f"{file}: the label {label!r} stands in it twice")
    return labels


def _json(file: Path) -> Any:
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: is not valid JSON: {error.msg}") from None


def _limited(task: Task, data: DataConfig) -> Task:
    task.train, task.test = task.train[: data.train_rows], task.test[: data.test_rows]
    return task


# --- duplicates and overlap ---


def _checked(task: Task, data: DataConfig) -> Task:
    """Count duplicates and overlap, do what ``data.on_overlap`` says, and take the fingerprint."""
    tested = {_prompt(example) for example in task.test}
    trained = {_prompt(example) for example in task.train}
    overlap = [example for example in task.test if _prompt(example) in trained]
    task.counts = Counts(
        duplicate_train_rows=len(task.train) - len({(_prompt(example), example.answer) for example in task.train}),
        test_rows_in_train=len(overlap),
    )
    if overlap and data.on_overlap == "drop":
        kept = [example for example in task.train if _prompt(example) not in tested]
        task.counts.dropped_train_rows = len(task.train) - len(kept)
        task.train = kept
        if not kept:
            raise DataError(f"task {task.name!r}: every train row is asked in the test split; none is left to train on")
    elif overlap:
        message = (
            f"task {task.name!r}: {len(overlap)} of {len(task.test)} test rows stand in the train split, "
            f"the first at {where(overlap[0].file, overlap[0].row)}"
        )
        if data.on_overlap == "error":
            raise DataError(f"{message}; remove them, or set data.on_overlap to drop or warn")
        logger.warning("%s; data.on_overlap=drop leaves them out of train", message)
    task.fingerprint = fingerprint(task.train, task.eval, task.test)
    return task


def _prompt(example: Example) -> Any:
    return example.text or tuple((turn.role, turn.content) for turn in example.turns[:-1])


# --- general ability ---


def _general(config: GeneralConfig) -> General:
    path = Path(config.path)
    if config.kind == "perplexity" and path.suffix == ".txt":
        texts = [line for line in read_text(path).splitlines() if line.strip()]
        if not texts:
            raise DataError(f"{path}: holds no text")
        return General(config.name, "perplexity", texts=texts[: config.rows])
    rows = read_rows(path)[: config.rows]
    if config.kind == "perplexity":
        examples = to_examples(rows, "text", file=path)
        return General(config.name, "perplexity", texts=[example.text or "" for example in examples])
    return General(config.name, "choices", questions=[_choices(row, where(path, i, row)) for i, row in enumerate(rows)])


def _choices(row: dict[str, Any], place: str) -> tuple[str, list[str], int]:
    question = row.get("question", row.get("question_sentence"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{place}: question: must be text; found the keys {', '.join(map(repr, row))}")
    choices = row.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{place}: choices: must be a list of texts, not {choices!r}")
    right = _right(row.get("answer"), choices, place)
    kept = [i for i, choice in enumerate(choices) if choice.strip()]  # tables of questions pad short lists with blanks
    if len(kept) < 2 or right not in kept:
        raise DataError(f"{place}: choices: must be at least two texts, the right one among them, not {choices!r}")
    return question, [choices[i] for i in kept], kept.index(right)


def _right(answer: Any, choices: list[str], place: str) -> int:
    """Which choice ``answer`` means: an index, [an index], a letter, or the text of the choice."""
    meant: set[int] = set()
    if isinstance(answer, list) and len(answer) == 1 and str(answer[0]).isdecimal():
        answer = int(answer[0])
    if type(answer) is int:
        meant = {answer} & set(range(len(choices)))
    elif isinstance(answer, str):
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        meant = {
            i
            for i, choice in enumerate(choices)
            if answer.strip() in (choice.strip(), str(i)) or answer.strip().upper() == letters[i : i + 1]
        }
    if len(meant) != 1:
        raise DataError(
            f"{place}: answer: {answer!r} {'names no choice' if not meant else 'could be two choices'}; it must be an "
            f"index from 0 to {len(choices) - 1}, a letter, or the text of one of {choices!r}"
        )
    return meant.pop()
