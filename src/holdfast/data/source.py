"""One task: from the files of a folder, or a dataset of Hugging Face, to checked examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from holdfast.api.task import Example, General, Task
from holdfast.config.stream import DataConfig, TaskConfig, TaskOptions
from holdfast.data.conversation import Noticed
from holdfast.data.files import SUFFIXES, iterate_rows, read_json_file, read_text, where
from holdfast.data.formats import asked, detect, iterate_examples, name_labels
from holdfast.data.layout import SPLITS, alone, split_files
from holdfast.data.on_disk import LARGE_ROWS, LARGE_TEXT, chosen, gathered
from holdfast.data.parts import Once, Part, alike, all_renamed, first_part, first_row, limited, renamed
from holdfast.data.preferences import kind_examples, paired
from holdfast.data.spill import without_bytes
from holdfast.errors import ConfigError, DataError
from holdfast.scoring import find
from holdfast.scoring.reward import PREFIX, reward_function
from holdfast.system.hub import unreachable

SAVED = ("dataset_dict.json", "state.json")
"""Files by which a folder is one that ``save_to_disk`` of Hugging Face's datasets wrote."""


@dataclass
class Source:
    """A task to load, from exactly one of folder, files, dataset and made.

    Attributes:
        folder: holds the files of each split, and labels.json or instruction.txt where the rows need them; or a file.
        files: the files of each split.
        dataset: hub name or local folder of a dataset of Hugging Face, and its configuration.
        made: the task as a function made it, with all its rows and without a metric.
        instruction: of the task's group, where the task brings none of its own.
        instructions: the file in which the instructions of groups are looked for.
        test_rows: makes rows of a format of the rows of a test file and its path, where they have none.
        obtained: where its data come from, for a message about what is missing.
        draws: a dataset without a test split is read as the split "all", from which one is drawn.
    """

    name: str
    options: TaskOptions
    folder: Path | None = None
    files: dict[str, list[Path]] = field(default_factory=dict)
    dataset: tuple[str, str | None] | None = None
    made: Task | None = None
    instruction: str | None = None
    instructions: Path | None = None
    test_rows: Callable[[list[dict[str, Any]], Path], list[dict[str, Any]]] | None = None
    obtained: str = ""
    draws: bool = False


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


def load_task(source: Source, data: DataConfig, bad: list[str] | None = None) -> Task:
    """Read and check the rows of a task.

    Args:
        bad: what is wrong with rows that cannot be used is added to it, and they are left out. None: the first raises.

    Raises:
        ConfigError: a path, a column, a metric or another option cannot be used.
        DataError: a split is missing or empty, or a row cannot be used.
    """
    options = source.options
    if source.made is not None:
        task = source.made
        task.train, task.test = task.train[: data.train_rows], task.test[: data.test_rows]
        return scored(task, options, bad=bad)
    splits, labels = read_parts(source, data, bad)
    if options.kind != "sft":
        return _of_kind(source, splits, data, bad)
    first = first_part(splits.get("train") or splits["all"])
    format, names = (options.format, {}) if options.format else detect([first_row(first.rows)], first.file)
    way = _way(source, format, labels, first)
    noticed = Noticed()

    def of_split(name: str, parts: list[Part]) -> Iterator[Example]:
        for part in parts:
            made = iterate_examples(
                (renamed(row, names, "") for row in part.rows) if names else part.rows,
                format,
                file=part.file,
                labels=way.labels,
                instruction=way.instruction,
                prompt=options.prompt if format == "sentence_label" else None,
                input=options.input,
                each=options.turns == "each" and name == "test",
                images=None if options.images is None else Path(options.images),
                bad=bad,
                noticed=noticed,
            )
            yield from map(without_reasoning, made) if data.reasoning == "drop" else made

    examples = {name: gathered(of_split(name, parts), survey=name == "train") for name, parts in splits.items()}
    notes = noticed.notes()
    if names:
        notes.append("columns are read as " + ", ".join(f"{name}: {meant}" for name, meant in names.items()))
    if way.unasked:
        notes.append(way.unasked)
    if "all" in examples:
        notes.append(_draw_test(examples, data.hold_out))
    for name in ("train", "test"):
        if not examples[name] and not bad:
            raise DataError(f"task {source.name!r}: no row of the {name} split is left: {'; '.join(notes)}")
    train, test = examples["train"], list(examples["test"])
    task = Task(source.name, "", train, test, examples.get("eval", []), way.labels, notes=notes)
    task.asked = asked(way.instruction, way.labels, options.prompt) if format == "sentence_label" else format
    return scored(task, options, default="loss" if format == "text" else "accuracy", bad=bad)


def _of_kind(source: Source, splits: dict[str, list[Part]], data: DataConfig, bad: list[str] | None) -> Task:
    """A task of a kind that TRL trains, from the rows of its splits."""
    options, noticed, kind = source.options, Noticed(), source.options.kind
    exact = options.reward == "exact_match"
    if options.reward is not None and not exact:
        reward_function(options.reward)
    examples: dict[str, Sequence[Example]] = {
        name: [
            example
            for part in parts
            for example in kind_examples(part.rows, kind, file=part.file, needs_answer=exact, bad=bad, noticed=noticed)
        ]
        for name, parts in splits.items()
    }
    notes = [*noticed.notes(), *([_draw_test(examples, data.hold_out)] if "all" in examples else [])]
    default = {"dpo": "preference", "kto": "judged_likelihood", "grpo": f"{PREFIX}{options.reward}"}[kind]
    default = "accuracy" if exact else default
    if kind == "kto" and options.metric in (None, "preference"):
        for name in ("test", "eval"):
            pairs = paired(examples.get(name, []))
            if name == "test" and not pairs:
                notes.append("no prompt of the test split has a good and a bad answer, so each is scored by itself")
                break
            default = "preference"
            if left := len(examples.get(name, [])) - 2 * len(pairs):
                notes.append(f"{left} rows of the {name} split are in no pair of a good and a bad answer to one prompt")
            examples[name] = pairs
    if data.reasoning == "drop":
        examples = {name: [without_reasoning(example) for example in split] for name, split in examples.items()}
    train, test = examples["train"], list(examples["test"])
    task = Task(source.name, "", train, test, examples.get("eval", []), notes=notes)
    task.kind, task.options, task.reward, task.asked = kind, dict(options.options), options.reward, kind
    return scored(task, options, default=default, bad=bad)


def check_asked(name: str, format: str, instruction: str | None, prompt: str | None) -> None:
    """Raise ConfigError if a task of another format is given what only sentences with labels are asked by."""
    for key, value in (("instruction", instruction), ("prompt", prompt)):
        if value is not None and format != "sentence_label":
            raise ConfigError(
                f"task {name!r}: {key}: belongs to sentence_label tasks; the rows of this one, {format}, hold their "
                "own; columns: {TEXT: sentence, ANSWER: label}, with the names of its columns, makes it one"
            )


@dataclass
class _Way:
    """How the rows of a task are asked; ``unasked`` says that nothing tells the model what is asked."""

    instruction: str | None = None
    labels: list[str] | None = None
    unasked: str = ""


def _way(source: Source, format: str, labels: list[str] | None, first: Part) -> _Way:
    """What is asked beside a row's own words.

    Raises:
        ConfigError: an option belongs to rows of another format.
        DataError: an instruction or labels are needed, and there are none.
    """
    options, own = source.options, isinstance(source.options, TaskConfig)
    instruction = options.instruction or _own_instruction(source)
    check_asked(source.name, format, instruction, options.prompt if own else None)
    if options.input is not None and format != "prompt_answer":
        raise ConfigError(f"task {source.name!r}: input: belongs to prompt_answer tasks; the rows of this are {format}")
    if format != "sentence_label":
        return _Way(labels=options.labels)
    instruction = instruction or source.instruction
    labels = options.labels or labels or _stated_labels(source, first)
    if instruction is None and "{instruction}" in (options.prompt or ""):
        raise DataError(f"task {source.name!r}: there is no instruction to ask its sentences with{source.obtained}")
    if instruction is not None or options.prompt is not None:
        return _Way(instruction, labels)
    looked = ["the key instruction"]
    if source.folder is not None:
        looked.append(str(source.folder / "instruction.txt"))
        if source.instructions is not None:
            looked.append(f"group {source.folder.resolve().parent.name!r} of {source.instructions}")
    unasked = (
        "nothing tells the model what is asked of a sentence: there is no instruction and no prompt "
        f"(looked for {', '.join(looked)})"
    )
    return _Way(None, labels, unasked)


def read_parts(
    source: Source, data: DataConfig, bad: list[str] | None
) -> tuple[dict[str, list[Part]], list[str] | None]:
    """The rows of each split, file by file, and the labels that stand beside them.

    Args:
        bad: as of :func:`load_task`.
    """
    options, labels = source.options, None
    limits = {"train": data.train_rows, "test": data.test_rows}
    if source.dataset is not None:
        splits, labels = _from_dataset(source, limits)
    else:
        files = _split_files(source)
        splits = {name: [Part(str(file), _file_rows(file, bad)) for file in paths] for name, paths in files.items()}
        if source.test_rows is not None:
            for part in splits["test"]:
                part.rows = source.test_rows(list(part.rows), Path(part.file))
        if source.folder is not None and (source.folder / "labels.json").exists():
            labels = read_labels(source.folder / "labels.json")
    for name, parts in splits.items():
        if (limit := limits.get(name)) is not None:
            for part, rows in zip(parts, limited([part.rows for part in parts], limit), strict=True):
                part.rows = rows
        for part in parts if options.columns else ():
            part.rows = alike(part.rows, all_renamed(part.rows, options.columns, part.file))
    first = next((part for parts in splits.values() for part in parts if part.rows), None)
    sft = first is not None and options.kind == "sft"
    if first is not None and sft and (options.format or _format(first)) == "sentence_label":
        for part in (part for parts in splits.values() for part in parts):
            part.rows = alike(part.rows, name_labels(part.rows, options.labels or labels, part.file, bad))
    for parts in splits.values():
        if not any(part.rows for part in parts):
            raise DataError(
                f"{parts[0].file}: no row can be used" + "".join(f"\n  {reason}" for reason in (bad or [])[:1])
            )
    return splits, labels


def _format(part: Part) -> str:
    return detect([first_row(part.rows)], part.file)[0]


def _file_rows(file: Path, bad: list[str] | None) -> list[dict[str, Any]] | Once:
    """The rows of a file, in a list while they are few and small."""
    rows = iterate_rows(file, bad)
    first = list(islice(rows, 1))
    if file.stat().st_size < LARGE_TEXT:
        first += islice(rows, LARGE_ROWS - 1)
    rest = Once(rows)
    return Once(chain(first, rest)) if rest else first


def _draw_test(examples: dict[str, Sequence[Example]], share: float) -> str:
    """Draw the test split of a task in one file by what its rows ask: as the file grows, a row stays in its split.

    Returns:
        What is said about it.
    """
    rows = examples.pop("all")
    if not rows:  # all of them are bad, which is said
        examples["train"] = examples["test"] = []
        return ""
    drawn = [_drawn_number(row) for row in rows]
    limit = max(share, min(drawn))  # at least one
    examples["test"] = chosen(rows, (place for place, number in enumerate(drawn) if number <= limit))
    examples["train"] = chosen(rows, (place for place, number in enumerate(drawn) if number > limit))
    if not examples["train"]:
        raise DataError(f"{rows[0].file}: {len(rows)} rows are too few to draw a test split from; add a test file")
    return (
        f"one file: {len(examples['test'])} of its {len(rows)} rows, drawn by what they ask, are the test split "
        f"(data.hold_out={share:g})"
    )


def _drawn_number(row: Example) -> float:
    """A number between 0 and 1 from what a row asks."""
    asked = row.text if row.text is not None else [[turn.role, turn.said, *turn.shown] for turn in row.turns[:-1]]
    return int(hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12], 16) / 16**12


def without_reasoning(example: Example) -> Example:
    """The example as a model answers it that does not think first."""
    return replace(example, turns=tuple(replace(turn, reasoning=None) for turn in example.turns))


def scored(task: Task, options: TaskOptions, default: str = "accuracy", bad: list[str] | None = None) -> Task:
    """Give a task its metrics, and make sure that its test examples can be scored so.

    Args:
        bad: as of :func:`load_task`.

    Raises:
        ConfigError: a metric is unknown, or needs answers where there are none.
        DataError: a test example cannot be scored so.
    """
    task.metric, task.beside = options.metric or default, options.beside
    task.labels, task.max_new_tokens = task.labels or options.labels, options.max_new_tokens
    for key, name in [("metric", task.metric), *(("beside", name) for name in task.beside)]:
        try:
            find(name)
        except ConfigError as error:
            raise ConfigError(f"task {task.name!r}: {key}: {error}") from None
    check_scorable(task, bad)
    return task


def check_scorable(task: Task, bad: list[str] | None = None) -> None:
    """Make sure that a task's metrics can score its test examples.

    Args:
        bad: what is wrong with examples that cannot be scored is added to it, and they are left out. None: the first
            raises.

    Raises:
        ConfigError: a metric needs answers where there are none.
        DataError: an example cannot be scored so.
    """
    for key, name in [("metric", task.metric), *(("beside", name) for name in task.beside)]:
        scorer = find(name)
        for example in list(task.test):
            if scorer.reads != "loss" and not example.turns:
                raise ConfigError(f"task {task.name!r}: {key}: {name} needs answers, and text has none; loss would do")
            if reason := scorer.refusal(example, task.labels):
                message = f"{where(example.file, example.row)}: metric {name}: {reason}"
                if bad is None:
                    raise DataError(message)
                bad.append(message)
                task.test.remove(example)


def _split_files(source: Source) -> dict[str, list[Path]]:
    return source.files if source.folder is None else _folder_files(source)


def source_files(source: Source) -> dict[str, list[Path]]:
    """The files that a task of a folder or of files is read from, by split and by their names."""
    folder = source.folder
    beside = [folder / name for name in ("labels.json", "instruction.txt")] if folder is not None else []
    return {**_split_files(source), "": [file for file in beside if file.is_file()]}


def _folder_files(source: Source) -> dict[str, list[Path]]:
    """The files of a task's splits in its folder; of a single file, or of the only one in it, as the split "all"."""
    folder = source.folder
    assert folder is not None
    if folder.is_file():
        return {"all": [folder]}
    if not folder.is_dir():
        raise ConfigError(
            f"task {source.name!r}: path: there is no folder or file {str(folder)!r} (looked from {Path.cwd()})"
        )
    if any((folder / name).is_file() for name in SAVED):
        raise ConfigError(
            f"task {source.name!r}: path: {str(folder)!r} is a dataset that save_to_disk wrote; write dataset: {folder}"
        )
    found = {split: files for split in SPLITS if (files := split_files(folder, split))}
    single = alone(folder)
    if not found and single is not None:
        return {"all": [single]}
    for split in ("train", "test"):
        if split not in found:
            looked = ", ".join(stem + suffix for stem in SPLITS[split] for suffix in SUFFIXES)
            raise DataError(
                f"{folder}: task {source.name!r} has no {split} split; looked for {looked}; "
                f"add one of these, or leave the task out (stream.order){source.obtained}"
            )
    return found


def _from_dataset(source: Source, limits: dict[str, int | None]) -> tuple[dict[str, list[Part]], list[str] | None]:
    """Load a Hugging Face dataset; class labels become their names."""
    from datasets import ClassLabel, DatasetDict, load_dataset, load_from_disk

    assert source.dataset is not None
    dataset, subset = source.dataset
    shown = f"{dataset}/{subset}" if subset else dataset
    saved = any(Path(dataset, name).is_file() for name in SAVED)
    offline = "" if Path(dataset).exists() else unreachable()
    try:
        found = load_from_disk(dataset) if saved else load_dataset(dataset, subset)
    except Exception as error:  # whatever a hub, a disk or a parser may raise
        raise DataError(f"task {source.name!r}: dataset: {shown!r} cannot be loaded: {error}{offline}") from None
    if not isinstance(found, DatasetDict):
        found = DatasetDict({"train": found})
    wanted = dict(SPLITS)
    if source.draws and not any(stem in found for split in ("test", "eval") for stem in SPLITS[split]):
        wanted = {"all": ("train",) if "train" in found else tuple(found)[:1]}
    splits, labels = {}, None
    for split, stems in wanted.items():
        stem = next((stem for stem in stems if stem in found), None)
        if stem is None:
            if split == "eval" or (source.draws and split == "test"):
                continue
            raise DataError(f"task {source.name!r}: dataset {shown!r} has no {split} split, but {', '.join(found)}")
        table = found[stem]
        rows = _rows(table.select(range(min(len(table), limits.get(split) or len(table)))))
        if not rows:
            raise DataError(f"task {source.name!r}: split {stem} of dataset {shown!r} holds no rows")
        for column, feature in table.features.items():
            if isinstance(feature, ClassLabel):
                for row in rows:
                    index = row[column]
                    row[column] = feature.names[index] if index is not None and index >= 0 else None
                if source.options.columns.get(column, column) == "label":
                    labels = [name.strip() for name in feature.names]
        splits[split] = [Part(f"{shown}[{stem}]", rows)]
    return splits, labels


def _rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a dataset; the bytes of pictures go to files, a row after the other."""
    from datasets import Image

    undecoded = table
    for column, feature in table.features.items():
        if "Image(" in repr(feature):
            undecoded = undecoded.cast_column(column, _undecoded(feature, Image))
    return table.to_list() if undecoded is table else [without_bytes(row) for row in undecoded]


def _undecoded(feature: Any, image: Any) -> Any:
    """A feature whose pictures are given as ``{bytes, path}``."""
    if isinstance(feature, image):
        return image(decode=False)
    if isinstance(feature, dict):
        return {key: _undecoded(one, image) for key, one in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(one, image) for one in feature]
    if hasattr(feature, "feature"):
        return type(feature)(_undecoded(feature.feature, image))
    return feature


def _stated_labels(source: Source, train: Part) -> list[str] | None:
    """Labels where none are declared: a dataset's are those of its train split; others must declare them."""
    if source.folder is not None and source.folder.is_file():
        raise DataError(
            f"{source.folder}: task {source.name!r}: labels: are missing; a sentence_label task needs all that there "
            "are, for example labels: [good, bad]"
        )
    if source.dataset is None:
        file = Path(train.file).parent / "labels.json"
        raise DataError(
            f'{file}: is missing; a sentence_label task needs an array of its labels, for example ["good", "bad"]'
        )
    return sorted({row["label"].strip() for row in train.rows if isinstance(row.get("label"), str)}) or None


def _own_instruction(source: Source) -> str | None:
    file = None if source.folder is None else source.folder / "instruction.txt"
    return read_text(file).strip() or None if file is not None and file.exists() else None


def read_labels(file: Path) -> list[str]:
    values = read_json_file(file)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise DataError(f'{file}: must be an array of labels, for example ["good", "bad"]')
    labels = [value.strip() for value in values]
    for label in labels:
        if labels.count(label) > 1:
            raise DataError(f"{file}: the label {label!r} stands in it twice")
    return labels
