"""A file of a run that is not what holdfast wrote is refused with its name and key, where no checksum tells."""

from __future__ import annotations

import json
import shutil

import pytest

from holdfast.errors import RunDirectoryError
from holdfast.records.directory import file_name, slug
from holdfast.records.read import read_run
from holdfast.records.shapes import read_appended, read_json, read_jsonl
from support.paths import GOLDEN


@pytest.fixture
def run(tmp_path):
    """A finished run of version 0.1.0, which has no checksums."""
    shutil.copytree(GOLDEN / "old_runs" / "full-ewc" / "run", tmp_path / "run")
    return tmp_path / "run"


def test_what_0_1_0_wrote_has_these_shapes(run):
    read_run(run)
    for file in run.rglob("*.json*"):
        if file.parent.name not in ("model", "method"):
            (read_json if file.suffix == ".json" else read_jsonl if "responses" in file.parts else read_appended)(file)


DAMAGES = {
    "no config": ("run.json", lambda v: v.pop("config"), "config: field required"),
    "a method without a name": ("run.json", lambda v: v["config"]["method"][0].pop("name"), "config.method.0.name"),
    "hardware": ("run.json", lambda v: v["hardware"].pop("cpu"), "hardware.cpu: field required"),
    "a stage on a later one": ("run.json", lambda v: v["gate"][0].update(current=2), "cannot go on from 2"),
    "a task is gone": ("run.json", lambda v: v["tasks"].pop("red"), "task 'red' is not in"),
    "a row is gone": ("matrix.json", lambda v: v["scores"].pop(), "scores must have 3 rows of 2 tasks"),
    "a score is text": ("matrix.json", lambda v: v["scores"][0].__setitem__(0, "x"), "scores.0.0: .*, not 'x'"),
    "a task twice": ("matrix.json", lambda v: v["tasks"].__setitem__(0, "green"), "each once"),
    "no summary": ("matrix.json", lambda v: v["summary"].pop("forgetting"), "summary.forgetting: field required"),
    "half an interval": ("matrix.json", lambda v: v["intervals"]["average"].pop(), "intervals.average"),
    "no perplexity": (
        "matrix.json",
        lambda v: v["general"]["perplexity/sea"].__setitem__(1, 0.0),
        "general: value error, perplexity/sea must be above 0",
    ),
    "half a general ability": ("matrix.json", lambda v: v["general"]["perplexity/sea"].pop(), "has 2 values, not 3"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_named_with_its_key(case, run):
    name, damage, said = DAMAGES[case]
    value = json.loads((run / name).read_text())
    damage(value)
    (run / name).write_text(json.dumps(value))
    with pytest.raises(RunDirectoryError, match=rf"is damaged: .*{said}"):
        read_run(run)


def test_a_line_is_named(run):
    events = run / "events.jsonl"
    events.write_text(events.read_text() + '{"stage": 1}\n')
    with pytest.raises(RunDirectoryError, match=r"events.jsonl: is damaged: line \d+: step: field required"):
        _ = read_run(run).events
    rows = run / "stages" / "01-red" / "responses" / "red.jsonl"
    _, rest = rows.read_text().split("\n", 1)
    rows.write_text(json.dumps({"row": 0, "score": 1.0}) + "\n" + rest)
    with pytest.raises(RunDirectoryError, match="line 1 lacks answer, prompt, response, which other lines have"):
        read_jsonl(rows)


def test_each_name_has_a_file_of_its_own():
    names = ["a/b", "a_b", "c/d", "x" * 300, "x" * 300 + "y"]
    found = [file_name(name, names) for name in names]
    assert len(set(found)) == 5 and all(len(name) < 240 and "/" not in name for name in found)
    assert found[:3] == ["a_b", "a_b-2", "c_d"] and file_name("a/b", ["a/b", "c"]) == slug("a/b") == "a_b"
