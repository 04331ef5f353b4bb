"""Tasks of lm-evaluation-harness as general abilities, in this process, on the model in memory."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from holdfast.api.method import Method
from holdfast.api.task import General, HarnessTask
from holdfast.engines.process import Process
from holdfast.errors import ConfigError, DataError, did_you_mean
from holdfast.models.generation import evaluating

if TYPE_CHECKING:
    from holdfast.evaluation.at_test import ModelEvaluation

logger = logging.getLogger("holdfast")


def check_tasks(names: Sequence[str], include_path: str | None) -> None:
    """ConfigError if the library is not installed, or has no task, group or tag of such a name."""
    tasks = task_manager(include_path, tuple(names)).all_tasks
    for name in names:
        if name not in tasks:
            raise ConfigError(f"evaluation.general: lm_eval knows no task {name!r}{did_you_mean(name, tasks)}")


@cache
def task_manager(include_path: str | None, names: tuple[str, ...]) -> Any:
    """The library's task manager, with the user's tasks only if they include all names: the others take long to list.

    Raises:
        ConfigError: the library is not installed, or there is no such folder.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("evaluation.general: kind lm_eval needs pip install 'holdfast[eval]'") from None
    try:
        if include_path is not None:
            custom = TaskManager(include_path=include_path, include_defaults=False)
            if set(names) <= set(custom.all_tasks):
                return custom
        return TaskManager(include_path=include_path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"evaluation.general: include_path: {include_path!r} cannot be read: {error}") from None


def harness_statistics(
    evaluation: ModelEvaluation, measure: General, on_batch: Callable[[int, int], None] | None = None
) -> NDArray[np.float64]:
    """Measure one task or group, without the methods that act at test time. No global random state is seeded.

    Returns:
        [examples, 2]: the score of each example and 1; for a perplexity its nats and their tokens, words or bytes. The
        examples of a group's tasks come one after another.

    Raises:
        ConfigError: the metric is none of the task's, lower is better and it is no perplexity, or the task's value is
            not the mean over its examples.
        DataError: the task or its data cannot be loaded.
    """
    task = measure.harness
    assert task is not None
    question = ["lm_eval", asdict(task), _definitions(task.include_path)]
    statistics = None if evaluation.answers is None else evaluation.answers.find(question)
    if statistics is None:
        results = _results(evaluation, task)
        statistics = Process.this().broadcast(None if results is None else _statistics(results, task))
        if evaluation.answers is not None:
            evaluation.answers.add(question, statistics)
    if on_batch is not None:
        on_batch(len(statistics), len(statistics))
    return np.array(statistics, dtype=np.float64)


def _definitions(include_path: str | None) -> list[str]:
    """The library's version, and a digest of the user's task definitions: saved values depend on both."""
    files = sorted(path for path in Path(include_path).rglob("*") if path.is_file()) if include_path else []
    digest = hashlib.sha256()
    for path in files:
        digest.update(repr((path.name, path.read_bytes())).encode())
    return [version("lm_eval"), digest.hexdigest()]


def _results(evaluation: ModelEvaluation, task: HarnessTask) -> dict[str, Any] | None:
    """The library's results in the main process; None in the others."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    for method in evaluation.methods:
        if type(method).at_test is not Method.at_test:
            logger.warning("lm_eval: method %r acts on the model at test time, which is not done there", method.name)
    encoder = evaluation.encoder
    with _quiet(), evaluating(evaluation.model):
        model = HFLM(
            pretrained=evaluation.model,
            tokenizer=copy.deepcopy(encoder.tokenizer),
            batch_size=evaluation.batch_size,
            max_length=encoder.max_length,
        )
        try:
            return lm_eval.simple_evaluate(
                model,
                tasks=[task.task],
                task_manager=task_manager(task.include_path, task.tasks),
                num_fewshot=task.num_fewshot,
                limit=task.limit,
                apply_chat_template=task.apply_chat_template,
                bootstrap_iters=0,
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        except (OSError, ValueError, KeyError) as error:
            missing = (
                f"its data have no split or column {error}; look at test_split, validation_split, fewshot_split and "
                "the columns that its definition names"
            )
            reason = missing if isinstance(error, KeyError) else error
            raise DataError(f"evaluation.general: lm_eval task {task.task!r} cannot be measured: {reason}") from None


def _statistics(results: Mapping[str, Any], task: HarnessTask) -> list[tuple[float, float]]:
    """The statistics of every example of a task, or of a group's tasks."""
    return [pair for leaf in _leaves(results, task.task) for pair in _of_task(results, leaf, task.metric)]


def _leaves(results: Mapping[str, Any], name: str) -> Iterator[str]:
    """The tasks of a task, group or tag."""
    if name in results["samples"]:
        yield name
    elif name in results["group_subtasks"]:
        for below in results["group_subtasks"][name]:
            yield from _leaves(results, below)
    else:  # a tag
        yield from results["samples"]


def _of_task(results: Mapping[str, Any], task: str, chosen: str | None) -> list[tuple[float, float]]:
    """The statistics of a task's examples by the chosen metric, or by the task's first one."""
    samples, values = results["samples"][task], results["results"][task]
    first = f"{samples[0]['metrics'][0]},{samples[0]['filter']}"
    metrics = [key for key in values if "," in key and "_stderr," not in key]
    key = next((key for key in metrics if chosen in (key, key.partition(",")[0])), None) if chosen else first
    where = f"evaluation.general: lm_eval task {task!r}"
    if key is None:
        raise ConfigError(f"{where}: metric: has none called {chosen!r}{did_you_mean(str(chosen), metrics)}")
    name, _, filtered = key.partition(",")
    scores = [sample[name] for sample in samples if sample["filter"] == filtered and name in sample]
    if not results["higher_is_better"][task].get(name, True) and "perplexity" not in name:
        raise ConfigError(f"{where}: metric: of {name} lower is better; choose another: {', '.join(metrics)}")
    if "perplexity" in name:
        if chosen is None:
            raise ConfigError(f"{where}: is measured by a perplexity; say so: metric: {name}")
        pairs = [(-score[0], score[1]) if isinstance(score, tuple | list) else (-score, 1.0) for score in scores]
    else:
        pairs = [(score if isinstance(score, int | float) else math.nan, 1.0) for score in scores]
    total = np.array(pairs, dtype=np.float64).reshape(-1, 2).sum(axis=0)
    value = total[0] / total[1] if pairs else math.nan
    if not math.isclose(math.exp(value) if "perplexity" in name else value, values[key], rel_tol=1e-6, abs_tol=1e-9):
        raise ConfigError(f"{where}: metric: {name} is no mean over examples; choose another: {', '.join(metrics)}")
    return [(float(score), float(count)) for score, count in pairs]


@contextmanager
def _quiet() -> Iterator[None]:
    """Show the library's errors only, not its notices."""
    library = logging.getLogger("lm_eval")
    before = library.level
    library.setLevel(logging.ERROR)
    try:
        yield
    finally:
        library.setLevel(before)
