"""A run that is killed at any moment ends with the same numbers as one that was never interrupted."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time

import pytest
from filelock import FileLock

from support import forked
from support.resumed import finish, results, start
from support.tiny import tiny_config

CASES = {
    # every epoch and checkpoint boundary of a stage with rehearsal and penalty: 3 stages of 18 steps, saved every 4
    "full": (
        {"method": ["replay", {"name": "ewc", "samples": 4}]},
        [
            ("response", 2), ("step", 5), ("checkpoint", 2), ("manifest", 1), ("weights", 1),
            ("response", 1), ("answers", 2), ("matrix", 2), ("step", 3), ("after_stage", 1), ("report", 1),
        ],
    ),
    # dropout makes the weights depend on the state of the random number generators
    "lora": (
        {"method": "a_gem", "tuner": {"name": "lora", "r": 4, "lora_dropout": 0.3}},
        [("step", 3), ("checkpoint", 5), ("weights", 1), ("manifest", 1), ("answers", 2)],
    ),
    # the teacher is the model at the start, which later processes have only in the cache
    "gere": (
        {"method": [{"name": "gere_kl", "path": "GENERAL"}, "lwf", {"name": "der", "capacity": 6}]},
        [("step", 5), ("weights", 1), ("step", 5)],
    ),
    # multipliers, measurements, samples that are held out, and the weights that a stage began with
    "keep": (
        {
            "method": [{"name": "replay", "ratio": 1.0}, {"name": "gere_ce", "path": "GENERAL"}],
            "keep": {"general": "5%", "tasks": 0.1, "every": 3, "on_fail": "continue"},
        },
        [("step", 6), ("weights", 1), ("step", 9), ("manifest", 3)],
    ),
}  # fmt: skip


# test_guards kills every method, test_tuners every tuner
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in ("lora", "gere") else c for c in CASES]
)
def test_killed_at_every_kind_of_point(case, tmp_path):
    changes, points = CASES[case]
    (tmp_path / "general.txt").write_text("red and green\nblue is not red\na tide comes\n" * 8)
    changes = json.loads(json.dumps(changes).replace("GENERAL", str(tmp_path / "general.txt")))
    config = tiny_config(tmp_path, **changes)
    config["training"]["save_every"] = 4
    whole, broken = (tmp_path / f"{kind}.json" for kind in ("whole", "broken"))
    whole.write_text(json.dumps(config | {"output": str(tmp_path / "whole")}))
    broken.write_text(json.dumps(config | {"output": str(tmp_path / "broken")}))
    unbroken = start(whole)
    for point in points:
        assert finish(start(broken, *point)) == -signal.SIGKILL, f"{point} was never reached"
    assert finish(start(broken)) == 0
    assert finish(unbroken) == 0
    one, two = results(tmp_path / "whole"), results(tmp_path / "broken")
    models = [str(weights) for path, weights in one["weights"].items() if "/method/" not in path]
    assert len(models) == len(set(models)) == 3, "nothing was learned"
    for key in one:
        assert one[key] == two[key], key
    assert not list((tmp_path / "broken").rglob("*.partial"))


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    config = tiny_config(tmp_path, method=["replay", "ewc"])
    config["training"]["save_every"] = 4
    whole, broken = (tmp_path / f"{kind}.json" for kind in ("whole", "broken"))
    whole.write_text(json.dumps(config | {"output": str(tmp_path / "whole")}))
    broken.write_text(json.dumps(config | {"output": str(tmp_path / "broken")}))
    begun = time.monotonic()
    assert finish(start(whole)) == 0
    whole_time = time.monotonic() - begun
    chance, kills = random.Random(0), 0
    for _ in range(200):
        process = start(broken)
        try:
            process.wait(timeout=chance.uniform(0.4, 1.0) * whole_time)
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        if finish(process) == 0:
            break
    assert kills >= 1
    assert results(tmp_path / "whole") == results(tmp_path / "broken")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_continue(number, tmp_path):
    config = tiny_config(tmp_path)
    config["training"] |= {"epochs": 400, "save_every": 1000}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    process = forked.start("-m", "holdfast", "run", file)
    events = tmp_path / "run" / "events.jsonl"
    while not events.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert "stopped in stage 1/3 red after step" in errors and f"Continue with: holdfast run {file}" in errors
    assert "Traceback" not in errors
    [checkpoint] = (tmp_path / "run" / "stages" / "01-red" / "checkpoint").iterdir()
    last = json.loads(events.read_text().splitlines()[-1])
    assert checkpoint.name == f"checkpoint-{last['step']}"


def test_a_second_process_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config))
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        second = forked.run("-m", "holdfast", "run", file)
    assert second.returncode == 2
    assert "in use by another process" in second.stderr and "Traceback" not in second.stderr
