"""What of a run is made again where tasks go or rows change; nothing here reads or writes a file."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ConfigError
from holdfast.records.directory import current_stage, learned_stages

Record = Mapping[str, Any]
COST = ("finished", "seconds", "tokens", "peak_memory_gib")


@dataclass(frozen=True)
class Plan:
    """How a run is made again.

    Attributes:
        removed: the tasks that go, in order: what was asked for, and what its user had undone since.
        undone: those of them that its user had undone.
        first: the first stage that is made again; those before it are kept, and so is the start.
        known: the tasks that the run had when it began that stage.
        configs: what the run goes on with, one after another, as it grew: ``tasks`` (names) and ``config``.
    """

    removed: list[str]
    undone: list[str]
    first: int
    known: list[str]
    configs: list[dict[str, Any]]

    def kept(self, names: Sequence[str]) -> list[str]:
        """The names without those of the tasks that go."""
        return [name for name in names if name not in self.removed]


def plan(record: Record, done: Sequence[int], *, without: Collection[str], first: int, joint: bool) -> Plan:
    """Plan a rebuilding.

    A stage that the gate undid is made again, and judged again. One that the user undid goes with its task, where it
    would have to be made again.

    Args:
        record: run.json.
        done: the numbers of the complete stages, from 0.
        without: the tasks that go.
        first: the first stage that their rows took part in.
        joint: whether one stage learned all tasks.

    Raises:
        ConfigError: no task would be left.
    """
    names = list(record["tasks"])
    learned = learned_stages(record, done[-1])
    gated = {key: value for key, value in record.items() if key != "rollbacks"}
    undone = [
        names[t - 1]
        for t in done
        if not joint
        and t >= first
        and t not in learned
        and current_stage(gated, t) == t
        and names[t - 1] not in without
    ]
    removed = [name for name in names if name in without or name in undone]
    groups = [[name for name in group if name not in removed] for group in _groups(record)]
    if not any(groups):
        also = f" ({', '.join(undone)} were undone)" if undone else ""
        raise ConfigError(f"no task would be left{also}; delete the directory, and the run is gone with its data")
    begun = 0 if joint or first < 2 else next(g for g, group in enumerate(_groups(record)) if names[first - 2] in group)
    while not any(groups[: begun + 1]):
        begun += 1
    configs: list[dict[str, Any]] = []
    for g in range(begun, len(groups)):
        tasks = [name for group in groups[: g + 1] for name in group]
        if groups[g] or g == begun:
            config = _config(record, names, tasks, _group_training(record, g), joint)
            configs.append({"tasks": tasks, "config": config})
    return Plan(removed, undone, first, [name for group in groups[: begun + 1] for name in group], configs)


def _groups(record: Record) -> list[list[str]]:
    """The tasks that the run began with, and those that were appended, each time together."""
    names, grown = list(record["tasks"]), [growth["tasks"] for growth in record.get("grown", [])]
    return [names[: len(names) - sum(map(len, grown))], *grown]


def _group_training(record: Record, g: int) -> dict[str, Any]:
    """The settings of training that the stages of a group began with."""
    groups = _groups(record)
    entries = [stage for stage in record.get("stages", []) if stage["task"] in groups[g]]
    last = g == len(groups) - 1
    return record["config"]["training"] if last or not entries else entries[0]["config"]["training"]


def _config(
    record: Record, names: Sequence[str], tasks: Sequence[str], training: Mapping[str, Any], joint: bool
) -> dict[str, Any]:
    """The configuration of a run of some of its tasks."""
    config = copy.deepcopy(dict(record["config"]))
    epochs = config["training"].get("epochs")
    config["training"] = dict(training)
    if isinstance(epochs, list) and not joint:
        config["training"]["epochs"] = [value for name, value in zip(names, epochs, strict=True) if name in tasks]
    if len(tasks) < len(names):
        config["stream"] = _of_tasks(config["stream"], names, tasks)
    if config.get("gate") and config["gate"].get("on_fail", "stop") == "stop":
        config["gate"]["on_fail"] = "continue"  # what must go goes, and the verdict is told at the end
    return config


def _of_tasks(stream: dict[str, Any], names: Sequence[str], tasks: Sequence[str]) -> dict[str, Any]:
    """A stream of some of its tasks, in their order."""
    order = stream.get("order")
    if isinstance(order, list):
        order = [entry for name, entry in zip(names, order, strict=False) if name in tasks]
    elif stream.get("tasks") is None or order is not None:
        order = list(tasks)
    listed = stream.get("tasks")
    return stream | {"order": order, "tasks": listed and [task for task in listed if task["name"] in tasks]}


def record_before(record: Record, made: Plan) -> dict[str, Any]:
    """run.json as it stood before the first stage that is made again, had the removed tasks never been there."""
    names, first = list(record["tasks"]), made.first
    found = {key: value for key, value in record.items() if key not in (*COST, "gate", "rollbacks", "grown", "stages")}
    found |= {
        "config": made.configs[0]["config"],
        "finished": None,
        "tasks": {n: record["tasks"][n] for n in made.known},
    }
    if "stages" in record:
        found["stages"] = [_without(stage, names, made) for stage in record["stages"] if stage["stage"] < first]
    if gate := [
        decision | {"scores": [s for n, s in zip(names, decision["scores"], strict=False) if n not in made.removed]}
        for decision in record.get("gate", [])
        if decision["stage"] < first
    ]:
        found["gate"] = gate
    if rollbacks := _rollbacks(record, first):
        found["rollbacks"] = rollbacks
    groups = [[name for name in group if name in made.known] for group in _groups(record)]
    start = next(g for g, group in enumerate(groups) if group)
    grown = [
        growth | {"tasks": group}
        for g, (growth, group) in enumerate(zip(record.get("grown", []), groups[1:], strict=True), start=1)
        if g > start and group
    ]
    return found | ({"grown": grown} if grown else {})


def _rollbacks(record: Record, first: int) -> list[dict[str, Any]]:
    """The rollbacks before a stage, and the one by which that stage began with the weights that it began with."""
    rollbacks = [back for back in record.get("rollbacks", []) if back["after"] < first]
    last = max((stage["after"] for stage in record.get("rollbacks", [])), default=0)
    held = max((t for t in learned_stages(record, max(last, first)) if t < first), default=0)
    if last >= first and held != current_stage(record, first - 1):
        at = next(back["at"] for back in reversed(record["rollbacks"]) if back["after"] >= first)
        rollbacks.append({"after": first - 1, "to": held, "at": at})
    return rollbacks


def _without(stage: Mapping[str, Any], names: Sequence[str], made: Plan) -> dict[str, Any]:
    """What is noted of a stage, its stream without the removed tasks."""
    stream = stage["config"]["stream"]
    listed, order = stream.get("tasks"), stream.get("order")
    if listed is not None:
        listed = [task for task in listed if task["name"] not in made.removed]
    if isinstance(order, list):
        order = [entry for name, entry in zip(names, order, strict=False) if name not in made.removed]
    return dict(stage) | {"config": stage["config"] | {"stream": stream | {"tasks": listed, "order": order}}}
