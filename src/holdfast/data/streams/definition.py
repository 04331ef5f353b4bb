"""Streams by name: one short YAML each says its tasks, orders, prompts and metrics, and where its data are obtained."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from holdfast.config.reading import read_yaml, validate
from holdfast.config.section import Section, TaskName
from holdfast.config.stream import TaskOptions
from holdfast.errors import ConfigError, did_you_mean

FOLDER = Path(__file__).parent


class TaskDefinition(TaskOptions):
    """One task of a benchmark."""

    name: TaskName = Field(description="as the source calls it: the name of its folder")
    group: str | None = Field(None, description="whose instruction of the stream's instructions it is asked with")
    source_metric: str | None = Field(None, description="how the source scores it, where that differs")
    folders: list[str] = Field(default_factory=list, description="what else its folder is called")
    files: dict[str, list[str]] = Field(
        default_factory=dict, description="where splits of it may lie, where that differs from the stream's files"
    )
    test_rows: str | None = Field(
        None, description="module:function that makes rows of a format of those of its test file, where they have none"
    )


class Definition(Section):
    """What a stream is; files and labels come from the user's copy of the data."""

    about: str = Field(description="in a line: what it is, and the paper")
    version: int = Field(ge=1, description="raised with every change of prompts, metrics or orders")
    source: str = Field(description="where its data are obtained")
    include: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="streams whose tasks and orders belong to it, and what is different in it"
    )
    source_metrics: dict[str, str] = Field(
        default_factory=dict, description="how this source scores what the included ones score by another metric"
    )
    defaults: dict[str, Any] = Field(default_factory=dict, description="options of all its tasks")
    tasks: list[TaskDefinition] = Field(default_factory=list, description="in their first order")
    orders: dict[str, list[TaskName]] = Field(default_factory=dict, description="further orders by name")
    instructions: str | None = Field(None, description="file of instructions by group, above the folders of tasks")
    files: dict[str, list[str]] = Field(
        default_factory=dict,
        description="where each split of {task} may lie, without suffix; where absent, in a folder of the task's name",
    )
    within: list[str] = Field(default_factory=lambda: [""], description="folders in which these files are looked for")
    images: list[str] = Field(
        default_factory=list,
        description="folders that the paths of pictures may start from, the first that exists; where none is named, "
        "that of the row's file",
    )
    samples: str | None = Field(None, description="folder of general samples that its methods rehearse")
    make: str | None = Field(None, description="module:function that makes the tasks, where no folders hold them")

    @property
    def needs_path(self) -> bool:
        """Whether it reads data of the user's."""
        return self.make is None or "path" in inspect.signature(maker(self)).parameters

    def places(self, task: TaskDefinition, split: str) -> list[str]:
        """Where the split of a task may lie, without suffix, the likeliest first."""
        files = task.files.get(split, self.files.get(split, []))
        names = [task.name, *task.folders]
        return [f"{w}/{file}".lstrip("/").format(task=name) for w in self.within for name in names for file in files]

    @model_validator(mode="after")
    def _orders_name_tasks(self) -> Definition:
        names = [task.name for task in self.tasks]
        for order, tasks in self.orders.items():
            for task in tasks:
                if task not in names:
                    raise ValueError(f"orders.{order}: unknown task {task!r}{did_you_mean(task, names)}")
        return self


def maker(definition: Definition) -> Callable[..., Any]:
    """The function that makes the tasks of a stream that no folders hold."""
    return named(str(definition.make))


def named(name: str) -> Callable[..., Any]:
    """The function that a definition names as module:function."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def known() -> dict[str, Definition]:
    """All streams by name."""
    return {path.stem: find(path.stem) for path in sorted(FOLDER.glob("*.yaml"))}


@cache
def find(name: str) -> Definition:
    """The definition of a stream.

    Raises:
        ConfigError: there is no such stream.
    """
    path = FOLDER / f"{name}.yaml"
    names = [path.stem for path in FOLDER.glob("*.yaml")]
    if name not in names:
        raise ConfigError(f"stream.name: unknown stream {name!r}{did_you_mean(name, names)}")
    values = read_yaml(path)
    included: dict[str, Any] = {"tasks": [], "orders": {}}
    other_metrics = values.get("source_metrics", {})
    for other, changes in values.get("include", {}).items():
        for task in find(other).tasks:
            options = task.model_dump(exclude_unset=True) | changes
            if (metric := options.get("source_metric")) in other_metrics:
                options["source_metric"] = other_metrics[metric]
            included["tasks"].append(options)
        included["orders"] |= find(other).orders
    own = [
        values.get("defaults", {}) | (task if isinstance(task, dict) else {"name": task})
        for task in values.get("tasks", [])
    ]
    values["tasks"] = included["tasks"] + own
    values["orders"] = included["orders"] | values.get("orders", {})
    definition: Definition = validate(Definition, values, str(path))
    return definition
