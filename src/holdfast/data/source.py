"""One task: from the files of a folder, or a dataset of Hugging Face, to checked examples."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.api.task import General, Task
from holdfast.config.stream import DataConfig, TaskConfig, TaskOptions
from holdfast.data.formats import SUFFIXES, RawRow, asked, detect, read_rows, read_text, to_examples, where
from holdfast.errors import ConfigError, DataError, did_you_mean
from holdfast.scoring import find

SPLITS = {"train": ("train",), "eval": ("eval", "dev", "validation"), "test": ("test",)}


@dataclass
class Source:
    """A task to load, from exactly one of folder, files, dataset and made.

    Attributes:
        folder: holds a file for each split, and labels.json or instruction.txt where the rows need them.
        files: the file of each split.
        dataset: hub name or local folder of a dataset of Hugging Face, and its configuration.
        made: the task as a function made it, with all its rows and without a metric.
        instruction: of the task's group, where the task brings none of its own.
        obtained: where its data come from, for a message about what is missing.
    """

    name: str
    options: TaskOptions
    folder: Path | None = None
    files: dict[str, Path] = field(default_factory=dict)
    dataset: tuple[str, str | None] | None = None
    made: Task | None = None
    instruction: str | None = None
    obtained: str = ""


@dataclass
class StreamSource:
    """A stream to load: its tasks in order.

    Attributes:
        version: number of a benchmark's definition.
        general: the stream's own measures of general ability.
    """

    name: str
    tasks: list[Source]
    version: str = ""
    general: list[General] = field(default_factory=list)


def load_task(source: Source, data: DataConfig) -> Task:
    """Read and check the rows of a task.

    Raises:
        ConfigError: a path, a column, a metric or another option cannot be used.
        DataError: a split is missing or empty, or a row cannot be used.
    """
    options, own = source.options, isinstance(source.options, TaskConfig)
    if source.made is not None:
        task = source.made
        task.train, task.test = task.train[: data.train_rows], task.test[: data.test_rows]
        return scored(task, options)
    limits = {"train": data.train_rows, "test": data.test_rows}
    labels: list[str] | None = None
    if source.dataset is not None:
        splits, labels = _from_dataset(source, limits)
    else:
        files = source.files if source.folder is None else _folder_files(source)
        splits = {name: _Split(str(file), read_rows(file)) for name, file in files.items()}
        if source.folder is not None and (source.folder / "labels.json").exists():
            labels = _labels(source.folder / "labels.json")
    for name, split in splits.items():
        split.rows = split.rows[: limits.get(name)]
        if options.columns:
            split.rows = [_renamed(row, options.columns, where(split.file, i, row)) for i, row in enumerate(split.rows)]

    format = options.format or detect(splits["train"].rows, splits["train"].file)
    instruction = options.instruction or _own_instruction(source)
    for key, value in (("instruction", instruction), ("prompt", options.prompt if own else None)):
        if value is not None and format != "sentence_label":
            raise ConfigError(
                f"task {source.name!r}: {key}: belongs to sentence_label tasks; the rows of this one, {format}, hold "
                "their own"
            )
    if options.input is not None and format != "prompt_answer":
        raise ConfigError(f"task {source.name!r}: input: belongs to prompt_answer tasks; the rows of this are {format}")
    if format == "sentence_label":
        instruction = instruction or source.instruction
        labels = options.labels or labels or _stated_labels(source, splits["train"])
        if instruction is None and "{instruction}" in (options.prompt or ""):
            raise DataError(f"task {source.name!r}: there is no instruction to ask its sentences with{source.obtained}")
    else:
        labels = options.labels

    examples = {
        name: to_examples(
            split.rows,
            format,
            file=split.file,
            labels=labels,
            instruction=instruction,
            prompt=options.prompt if format == "sentence_label" else None,
            input=options.input,
            each=options.turns == "each" and name == "test",
        )
        for name, split in splits.items()
    }
    task = Task(source.name, "", examples["train"], examples["test"], examples.get("eval", []), labels)
    task.asked = asked(instruction, labels, options.prompt) if format == "sentence_label" else format
    return scored(task, options, default="loss" if format == "text" else "accuracy")


def scored(task: Task, options: TaskOptions, default: str = "accuracy") -> Task:
    """Give a task its metrics, and make sure that its test examples can be scored so.

    Raises:
        ConfigError: a metric is unknown, needs something else of the model than the one before it, or needs answers
            where there are none.
        DataError: a test example cannot be scored so.
    """
    task.metric, task.beside = options.metric or default, options.beside
    task.labels, task.max_new_tokens = task.labels or options.labels, options.max_new_tokens
    for key, name in [("metric", task.metric), *(("beside", name) for name in task.beside)]:
        try:
            reads, first = find(name).reads, find(task.metric).reads
        except ConfigError as error:
            raise ConfigError(f"task {task.name!r}: {key}: {error}") from None
        if reads != first:
            raise ConfigError(
                f"task {task.name!r}: beside: {name} scores another thing ({reads}) than {task.metric} ({first}), so "
                "one evaluation does not give both"
            )
    check_scorable(task)
    return task


def check_scorable(task: Task) -> None:
    """Make sure that a task's metrics can score its test examples.

    Raises:
        ConfigError: a metric needs answers where there are none.
        DataError: an example cannot be scored so.
    """
    for key, name in [("metric", task.metric), *(("beside", name) for name in task.beside)]:
        scorer = find(name)
        for example in task.test:
            if scorer.reads != "loss" and not example.turns:
                raise ConfigError(f"task {task.name!r}: {key}: {name} needs answers, and text has none; loss would do")
            if reason := scorer.refusal(example, task.labels):
                raise DataError(f"{where(example.file, example.row)}: metric {name}: {reason}")


@dataclass
class _Split:
    file: str
    rows: list[dict[str, Any]]


def _folder_files(source: Source) -> dict[str, Path]:
    folder = source.folder
    assert folder is not None
    if not folder.is_dir():
        raise ConfigError(f"task {source.name!r}: path: there is no folder {str(folder)!r} (looked from {Path.cwd()})")
    found = {}
    for split, stems in SPLITS.items():
        files = split_files(folder, split)
        if len(files) > 1:
            raise DataError(f"{folder}: has {' and '.join(file.name for file in files)}; only one may be there")
        if files:
            found[split] = files[0]
        elif split != "eval":
            looked = ", ".join(stem + suffix for stem in stems for suffix in SUFFIXES)
            raise DataError(
                f"{folder}: task {source.name!r} has no {split} split; looked for {looked}; "
                f"add one of these, or leave the task out (stream.order){source.obtained}"
            )
    return found


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that are named as a split is."""
    return [file for stem in SPLITS[split] for suffix in SUFFIXES if (file := folder / (stem + suffix)).is_file()]


def _from_dataset(source: Source, limits: dict[str, int | None]) -> tuple[dict[str, _Split], list[str] | None]:
    """Load a Hugging Face dataset; class labels become their names."""
    from datasets import ClassLabel, DatasetDict, load_dataset

    assert source.dataset is not None
    dataset, subset = source.dataset
    shown = f"{dataset}/{subset}" if subset else dataset
    try:
        found = load_dataset(dataset, subset)
    except Exception as error:  # whatever a hub, a disk or a parser may raise
        raise DataError(f"task {source.name!r}: dataset: {shown!r} cannot be loaded: {error}") from None
    assert isinstance(found, DatasetDict)
    splits, labels = {}, None
    for split, stems in SPLITS.items():
        stem = next((stem for stem in stems if stem in found), None)
        if stem is None:
            if split == "eval":
                continue
            raise DataError(f"task {source.name!r}: dataset {shown!r} has no {split} split, but {', '.join(found)}")
        table = found[stem]
        rows = table.select(range(min(len(table), limits.get(split) or len(table)))).to_list()
        if not rows:
            raise DataError(f"task {source.name!r}: split {stem} of dataset {shown!r} holds no rows")
        for column, feature in table.features.items():
            if isinstance(feature, ClassLabel):
                for row in rows:
                    index = row[column]
                    row[column] = feature.names[index] if index is not None and index >= 0 else None
                if source.options.columns.get(column, column) == "label":
                    labels = [name.strip() for name in feature.names]
        splits[split] = _Split(f"{shown}[{stem}]", rows)
    return splits, labels


def _stated_labels(source: Source, train: _Split) -> list[str] | None:
    """Labels where none are declared: a folder must declare them; a dataset's are those of its train split."""
    if source.dataset is None:
        file = Path(train.file).parent / "labels.json"
        raise DataError(
            f'{file}: is missing; a sentence_label task needs an array of its labels, for example ["good", "bad"]'
        )
    return sorted({row["label"].strip() for row in train.rows if isinstance(row.get("label"), str)}) or None


def _renamed(row: dict[str, Any], columns: dict[str, str], place: str) -> dict[str, Any]:
    if not columns:
        return row
    for column in columns:
        if column not in row:
            raise DataError(f"{place}: columns: there is no column {column!r}{did_you_mean(column, row)}")
    renamed = RawRow({columns.get(key, key): value for key, value in row.items()})
    renamed.line = getattr(row, "line", None)
    if len(renamed) < len(row):
        taken = next(new for old, new in columns.items() if new in row and new not in columns and new != old)
        raise DataError(f"{place}: columns: there is a column {taken!r} already; rename that one too")
    return renamed


def _own_instruction(source: Source) -> str | None:
    file = None if source.folder is None else source.folder / "instruction.txt"
    return read_text(file).strip() or None if file is not None and file.exists() else None


def _labels(file: Path) -> list[str]:
    values = read_json_file(file)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise DataError(f'{file}: must be an array of labels, for example ["good", "bad"]')
    labels = [value.strip() for value in values]
    for label in labels:
        if labels.count(label) > 1:
            raise DataError(f"{file}: the label {label!r} stands in it twice")
    return labels


def read_json_file(file: Path) -> Any:
    """Read a JSON file; DataError, with the line, if it is not UTF-8 or not JSON."""
    try:
        return json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: is not valid JSON: {error.msg}") from None
