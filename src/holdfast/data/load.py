"""From a configuration to a stream: which tasks, in which order, from which files, and what is odd about them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from holdfast.api.scorer import Scorer
from holdfast.api.task import Counts, Example, Stream, Task
from holdfast.config.evaluation import EvaluationConfig
from holdfast.config.stream import DataConfig, StreamConfig, TaskConfig
from holdfast.data.benchmark import benchmark_source, group_instructions
from holdfast.data.files import SUFFIXES, in_file_order, stem, suffix, where
from holdfast.data.layout import INNER, is_task
from holdfast.data.on_disk import OnDisk, chosen
from holdfast.data.order import check_names, ordered
from holdfast.data.source import Source, StreamSource, check_scorable, load_task
from holdfast.data.survey import Survey, surveyed
from holdfast.data.task_file import TaskFile, task_file
from holdfast.engines.process import Process
from holdfast.errors import ConfigError, DataError, did_you_mean
from holdfast.scoring import build
from holdfast.system.files import write_text

logger = logging.getLogger("holdfast")
BAD_ROWS_TOLD = 20


def load_stream(
    config: StreamConfig,
    data: DataConfig,
    evaluation: EvaluationConfig | None = None,
    output: str | Path | None = None,
) -> Stream:
    """Load the tasks of a stream, in order; relative paths start at the current directory.

    Args:
        evaluation: the split that is measured on, and what metrics need beyond their name.
        output: as of :func:`refuse_bad_rows`.

    Raises:
        ConfigError: a name, an option, a path or a metric is unknown or lacks something; two tasks have one name.
        DataError: a split is missing or empty (eval too, where it is measured on); a row cannot be used;
            ``data.on_overlap`` is "error" and test rows stand in a train split.
    """
    evaluation = evaluation or EvaluationConfig()
    source = find_source(config)
    bad: list[str] = []
    stream = Stream(source.name, [], source.general, source.version)
    known, new = dict[str, str](), list[tuple[TaskFile, Task, Task]]()
    for one in source.tasks:
        file, wrong = task_file(one, data, evaluation), len(bad)
        if file is not None and (found := file.read()):
            task, known[one.name] = found
            check_scorable(task, bad)
        else:
            task = load_task(one, data, bad)
            if evaluation.split == "dev":
                _measure_on_dev(task, data, bad)
            if file is not None and isinstance(task.train, OnDisk) and len(bad) == wrong:
                new.append((file, replace(task, notes=list(task.notes)), task))
        stream.tasks.append(task)
    judge_bad_rows(bad, stream, data, output)
    complete(stream, data, evaluation, known)
    for file, as_loaded, task in new:
        file.write(as_loaded, task.fingerprint)
    return stream


def complete(
    stream: Stream, data: DataConfig, evaluation: EvaluationConfig, known: Mapping[str, str] | None = None
) -> Stream:
    """Count what is odd about the rows of a stream, choose the test rows that are measured, take the fingerprints of
    its tasks, and tell its version.

    Args:
        known: fingerprints of tasks, by name.

    Raises:
        DataError: ``data.on_overlap`` is "error" and test rows stand in a train split.
    """
    tasks = [task for task in stream.tasks if task.gone is None]
    surveys = list(map(_surveyed, tasks))
    _check_overlap(tasks, surveys, data)
    for task, survey in zip(tasks, surveys, strict=True):
        if evaluation.rows is not None and evaluation.rows < len(task.test):
            task.notes.append(f"{evaluation.rows:,} of its {len(task.test):,} test rows are measured (evaluation.rows)")
            task.test = even_sample(task.test, evaluation.rows)
        if known and task.name in known:
            task.fingerprint = known[task.name]
            continue
        left = _surveyed(task) if task.counts.dropped_train_rows else survey
        task.fingerprint = left.fingerprint.copy().add(task.eval).add(task.test).hexadecimal
    stream.version = _version(stream.version, stream.tasks, load_scorers(stream, evaluation))
    return stream


def even_sample(rows: Sequence[Example], count: int) -> list[Example]:
    """Rows at even distances, in order: the middle one of each of ``count`` parts of (nearly) equal size."""
    return [rows[(2 * i + 1) * len(rows) // (2 * count)] for i in range(count)]


def load_scorers(stream: Stream, evaluation: EvaluationConfig) -> dict[str, Scorer]:
    """The scorer of every metric of the stream's tasks, by name.

    Raises:
        ConfigError: ``evaluation`` does not say what a metric needs.
    """
    metrics = {metric for task in stream.tasks for metric in (task.metric, *task.beside)}
    return {metric: build(metric, evaluation) for metric in sorted(metrics)}


def first_tasks_version(stream: Stream, count: int, scorers: Mapping[str, Scorer]) -> str:
    """The version that a stream would have, had it only its first tasks."""
    return _version(stream.version.rpartition("-")[0], stream.tasks[:count], scorers)


def _version(definition: str, tasks: Sequence[Task], scorers: Mapping[str, Scorer]) -> str:
    """The definition's version, and twelve hexadecimal digits over what a run's scores depend on beside its rows:
    prompts, metrics and order."""
    facts = [
        (
            task.name,
            task.asked,
            task.labels,
            task.max_new_tokens,
            [scorers[metric].identity for metric in (task.metric, *task.beside)],
        )
        for task in tasks
    ]
    return f"{definition}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]}".removeprefix("-")


# --- where tasks come from ---


def find_source(config: StreamConfig) -> StreamSource:
    """Find the tasks of a stream of any kind: by name, below a folder, or composed by hand.

    Raises:
        ConfigError: a name, an option or a path is unknown or lacks something; two tasks have one name.
        DataError: a folder holds no task, or a file of a stream by name is missing.
    """
    if config.name is not None:
        return benchmark_source(config)
    if config.options:
        raise ConfigError("stream.options: only a stream that is made (stream.name) has options")
    if config.path is not None:
        source = StreamSource(Path(config.path).resolve().name, _folders(Path(config.path), config))
    else:
        source = StreamSource("tasks", _composed(config))
    check_names([task.name for task in source.tasks])
    return source


def _composed(config: StreamConfig) -> list[Source]:
    assert config.tasks is not None
    check_names([task.name for task in config.tasks])
    tasks = {task.name: task for task in config.tasks}
    return [
        Source(
            name,
            tasks[name],
            folder=None if (path := tasks[name].path) is None else Path(path),
            dataset=None if (dataset := tasks[name].dataset) is None else (dataset, tasks[name].subset),
        )
        for name in ordered(list(tasks), config.order)
    ]


def _folders(path: Path, config: StreamConfig) -> list[Source]:
    """Every folder below ``path`` that holds a train or test file, or those that ``order`` names; or ``path`` alone."""
    order = config.order
    if path.is_file() and suffix(path) in SUFFIXES:
        name = stem(path)
        ordered([name], order)
        return [
            Source(
                name, TaskConfig(name=name, path=str(path), columns=config.columns, images=config.images), folder=path
            )
        ]
    if not path.is_dir():
        raise ConfigError(f"stream.path: there is no folder or data file {str(path)!r} (looked from {Path.cwd()})")
    found = {
        f"./{folder.relative_to(path).as_posix()}": folder
        for folder in sorted(path.rglob("*"), key=lambda folder: (folder.name, folder))
        if folder.is_dir() and is_task(folder) and not (folder.name == INNER and is_task(folder.parent))
    }
    if not found and is_task(path):
        found = {f"./{path.resolve().name}": path}
    if not found:
        raise DataError(f"{path}: no folder below it holds a train or test file ({', '.join(SUFFIXES)})")
    if not isinstance(order, list):
        picked = ordered(list(found), order)
    else:
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
    instructions = group_instructions(path / "instruction_config.json")
    return [
        Source(
            name := folder_name if names.count(folder_name) == 1 else key[2:].replace("/", "-"),
            TaskConfig(name=name, path=str(found[key]), columns=config.columns, images=config.images),
            folder=found[key],
            instructions=path / "instruction_config.json",
            instruction=instructions.get(found[key].parent.resolve().name),
        )
        for key, folder_name in zip(picked, names, strict=True)
    ]


def judge_bad_rows(bad: list[str], stream: Stream, data: DataConfig, output: str | Path | None) -> None:
    """Stop for rows that cannot be used, all named at once, or say that they are left out."""
    if not bad:
        return
    told = refuse_bad_rows(bad, data, output)
    for task in stream.tasks:
        if not task.train or not task.test:
            raise DataError(f"task {task.name!r}: no row of a split can be used:\n  {told}")
    logger.warning("%s cannot be used and are left out (data.on_bad_row: skip):\n  %s", _rows(len(bad)), told)


def refuse_bad_rows(bad: list[str], data: DataConfig, output: str | Path | None = None) -> str:
    """Raise DataError for rows that cannot be used, or, where ``data.on_bad_row`` is "skip", return their list.

    Args:
        output: the run's directory, beside which a file lists them where they are too many for a message; None: the
            message alone tells of them.
    """
    bad = in_file_order(bad)
    told = "\n  ".join(bad[:BAD_ROWS_TOLD])
    if len(bad) > BAD_ROWS_TOLD:
        told += f"\n  and {len(bad) - BAD_ROWS_TOLD} more{_listed_beside(output, bad)}"
    if data.on_bad_row == "stop":
        if len(bad) == 1:
            raise DataError(bad[0])
        raise DataError(f"{_rows(len(bad))} cannot be used (data.on_bad_row: skip leaves them out):\n  {told}")
    return told


def _listed_beside(output: str | Path | None, bad: Sequence[str]) -> str:
    """Where all rows that cannot be used are listed; a process alone writes the file."""
    if output is None:
        return ""
    named = Path(output) if Path(output).name else Path(output).resolve()
    file = named.with_name(f"{named.name}.bad-rows.txt")
    try:
        if Process.this().main:
            write_text(file, "\n".join(bad) + "\n")
    except OSError as error:
        return f" ({file}, which would list them, cannot be written: {error.strerror})"
    return f"; all of them are in {file}"


def _rows(count: int) -> str:
    return f"{count} row{'s' * (count > 1)}"


def _measure_on_dev(task: Task, data: DataConfig, bad: list[str]) -> None:
    """Put the eval split in the test split's place."""
    if not task.eval:
        raise DataError(
            f"task {task.name!r}: has no eval split (eval, dev or validation), which evaluation.split: dev measures "
            "on; hold some train rows back in one"
        )
    task.test = list(task.eval[: data.test_rows])
    check_scorable(task, bad)


# --- duplicates and overlap ---


def _surveyed(task: Task) -> Survey:
    return task.train.survey if isinstance(task.train, OnDisk) else surveyed(task.train)


def _check_overlap(tasks: list[Task], surveys: list[Survey], data: DataConfig) -> None:
    """Count what is odd about the tasks' rows, and do what ``data.on_overlap`` says."""
    for task, own in zip(tasks, surveys, strict=True):
        tests = surveyed(task.test)
        overlap = own.asks(tests.prompts)
        elsewhere = sum([other.asks(tests.prompts) for other in surveys if other is not own], np.zeros(len(overlap)))
        task.counts = Counts(
            duplicate_train_rows=len(own.prompts) - own.different,
            contradicting_train_rows=own.different - len(own.asked) if task.kind == "sft" else 0,
            duplicate_test_rows=len(tests.prompts) - tests.different,
            test_rows_in_train=int(overlap.sum()),
            test_rows_in_other_tasks=int(np.count_nonzero(elsewhere)),
        )
        if overlap.any() and data.on_overlap == "drop":
            kept = chosen(task.train, np.flatnonzero(~tests.asks(own.prompts)).tolist())
            task.counts.dropped_train_rows = len(task.train) - len(kept)
            task.train = kept
            if not kept:
                raise DataError(
                    f"task {task.name!r}: every train row is asked in the test split; none is left to train on"
                )
        elif overlap.any():
            first = task.test[int(overlap.argmax())]
            message = (
                f"task {task.name!r}: {overlap.sum()} of {len(task.test)} test rows stand in the train split, "
                f"the first at {where(first.file, first.row)}"
            )
            if data.on_overlap == "error":
                raise DataError(f"{message}; remove them, or set data.on_overlap to drop or warn")
            logger.warning("%s; data.on_overlap=drop leaves them out of train", message)
