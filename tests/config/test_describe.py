"""Differences between a recorded configuration and a new one."""

from __future__ import annotations

from typing import Any

from holdfast.config.describe import differences
from holdfast.config.run import RunConfig, load_config


def lines(recorded: dict[str, Any], now: RunConfig) -> list[str]:
    return [str(difference) for difference in differences(recorded, now)]


def config(**changes: Any) -> RunConfig:
    task = {"name": "red", "path": "tasks/red"}
    return load_config({"model": "m", "stream": {"tasks": [task]}, "output": "o"} | changes)


def test_each_key_that_differs_is_listed_but_those_that_change_no_result():
    recorded = config().model_dump(mode="json")
    assert lines(recorded, config()) == []
    assert lines(recorded, config(output="elsewhere", gate={"max_forgetting": 0.1})) == []
    assert lines(recorded, config(seed=3, training={"epochs": 2, "log_every": 1})) == [
        "training.epochs: 1.0 -> 2.0",
        "seed: 0 -> 3",
    ]


def test_a_key_that_an_older_version_did_not_know_has_its_default():
    recorded = config().model_dump(mode="json")
    del recorded["training"]["max_steps"], recorded["data"], recorded["stream"]["tasks"][0]["beside"]
    assert lines(recorded, config()) == []
    assert lines(recorded, config(training={"max_steps": 9})) == ["training.max_steps: null -> 9"]


def test_a_key_that_is_known_no_more_is_listed():
    recorded = config().model_dump(mode="json") | {"old": 1}
    assert lines(recorded, config()) == ["old: 1 -> (absent)"]


def test_only_what_the_user_changed_is_listed():
    recorded = config().model_dump(mode="json")
    kept = config(keep={"tasks": 0.2})
    assert lines(recorded, kept) == ['keep: null -> {"tasks": 0.2}']
    assert lines(kept.model_dump(mode="json"), config()) == ['keep: {"tasks": 0.2} -> null']
    assert lines(kept.model_dump(mode="json"), config(keep={"tasks": 0.3, "on_fail": "continue"})) == [
        "keep.tasks: 0.2 -> 0.3"
    ]
    tuned = config(tuner={"name": "lora", "rank": 8}).model_dump(mode="json")
    assert lines(tuned, config(tuner="full")) == ['tuner.name: "lora" -> "full"']


def test_a_long_value_is_cut_to_where_it_differs():
    tasks = [{"name": f"task{n}", "path": f"tasks/{n}"} for n in range(30)]
    recorded = config(stream={"tasks": tasks}).model_dump(mode="json")
    [line] = lines(recorded, config(stream={"tasks": [*tasks[:20], tasks[20] | {"path": "elsewhere"}]}))
    assert len(line) < 260 and "tasks/20" in line and "elsewhere" in line and line.count("…") == 3
