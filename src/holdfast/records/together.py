"""Whether run.json and matrix.json of a directory belong together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from holdfast.records.shapes import damaged

NEEDED = (
    "model", "training.batch_size", "training.max_steps", "training.epochs", "evaluation.bootstrap",
    "evaluation.general", "stream", "data",
)  # fmt: skip
"""Keys of a run's configuration that are read without its being loaded."""


def check_matrix(path: Path, record: dict[str, Any], matrix: dict[str, Any]) -> None:
    """Check that run.json and matrix.json in a directory belong together.

    Raises:
        RunDirectoryError: tasks, rows or columns are missing.
    """
    tasks, file = matrix["tasks"], path / "matrix.json"
    rows = len(tasks) + 1
    if "tasks" not in record or not record["config"].get("method"):
        raise damaged(path / "run.json", "it is of no run of tasks")
    configs = {"config": record["config"]}
    configs |= {f"stages.{n}.config": stage["config"] for n, stage in enumerate(record.get("stages", []))}
    for place, config in configs.items():
        if lacking := [key for key in NEEDED if not _has(config, *key.split("."))]:
            raise damaged(path / "run.json", f"{place}.{lacking[0]} is missing")
    if not tasks or len(set(tasks)) < len(tasks):
        raise damaged(file, "tasks must be names, each once")
    for name, where in ((name, where) for where in (matrix["metrics"], record["tasks"]) for name in tasks):
        if name not in where:
            raise damaged(file, f"task {name!r} is not in metrics, or not in run.json")
    for stage in record.get("stages", []):
        epochs = stage["config"]["training"]["epochs"]
        if isinstance(epochs, list) and not 0 < stage["stage"] <= len(epochs):
            raise damaged(path / "run.json", f"stages: there are no epochs of stage {stage['stage']}")
    for decision in record.get("gate", []):
        if not 0 <= decision["current"] <= decision["stage"] < rows:
            raise damaged(path / "run.json", f"gate: stage {decision['stage']} cannot go on from {decision['current']}")
    for rollback in record.get("rollbacks", []):
        if not 0 <= rollback["to"] <= rollback["after"] < rows:
            raise damaged(
                path / "run.json", f"rollbacks: after stage {rollback['after']} there is no way to {rollback['to']}"
            )
    columns = {"joint": [matrix["joint"]] if matrix["joint"] else []} | {
        f"by_task.{key}": [values] for key, values in matrix.get("by_task", {}).items()
    }
    columns["scores"] = matrix["scores"]
    if len(matrix["scores"]) != rows or any(len(row) != len(tasks) for all_ in columns.values() for row in all_):
        raise damaged(file, f"scores must have {rows} rows of {len(tasks)} tasks, and joint and by_task as many tasks")
    lists: Iterable[tuple[str, list[Any]]] = [
        *matrix["general"].items(),
        *((task, values) for task, found in matrix.get("beside", {}).items() for values in found.values()),
    ]
    for name, values in lists:
        if len(values) != rows:
            raise damaged(file, f"{name!r} has {len(values)} values, not {rows}")
    for name, ends in matrix["intervals"].items():
        if ends is not None and len(ends) != 2:
            raise damaged(file, f"intervals.{name} must be two numbers")
    for name, curve in matrix.get("curves", {}).items():
        if name not in tasks or len(curve["steps"]) != len(curve["scores"]):
            raise damaged(file, f"curves.{name} must have a score a step, and be of a task")


def _has(config: Any, *keys: str) -> bool:
    """Whether a configuration has a section, and a key in it."""
    for key in keys:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True
