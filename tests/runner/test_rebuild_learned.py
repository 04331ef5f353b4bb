"""A run that learned month after month is made again without one of them, or without rows, from its own copies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import ConfigError
from holdfast.runner.rebuild.swap import sibling
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.canary import CANARY, holding
from support.resumed import tensors
from support.tiny import write_model

pytestmark = pytest.mark.slow

QUIET = Progress(quiet=True)
FAST = ["training.max_steps=2", "evaluation.bootstrap=20", "evaluation.max_new_tokens=3", "training.learning_rate=1e-2"]


def month(folder: Path, name: str, canaries: int) -> Path:
    """Rows of a month, of which the first have a canary in prompt and answer."""
    rows = []
    for n in range(40):
        mark = f"{CANARY} " if n < canaries else ""
        rows.append({"prompt": f"{mark}{name} {chr(97 + n % 26)}{n}?", "answer": f"{mark}{name[0] if n % 3 else 'x'}"})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{name}.jsonl"


def learned(folder: Path, output: str, *names: str) -> Path:
    for name in names:
        first = {"model": folder / "model", "overrides": FAST} if not (folder / output).exists() else {}
        holdfast.learn(folder / f"{name}.jsonl", folder / output, progress=QUIET, **first)
    return folder / output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("months")
    write_model(folder / "model")
    for name, canaries in (("red", 40), ("green", 0), ("blue", 0), ("grey", 4)):
        month(folder, name, canaries)
    return folder


@pytest.fixture(scope="module")
def three(folder: Path) -> Path:
    return learned(folder, "three", "red", "green", "blue")


def test_without_the_first_month(folder: Path, three: Path):
    made = Path(shutil.copytree(three, folder / "without"))
    assert {"data/01-red/train.jsonl", "stages/01-red/method/replay.safetensors"} <= set(holding(made))
    holdfast.rebuild(made, without="red", progress=QUIET)
    assert holding(made) == []
    never = learned(folder, "never", "green", "blue")
    assert tensors(made) == tensors(never)
    assert read_json(made / "matrix.json") == read_json(never / "matrix.json")
    for name in ("data/rows.jsonl", "data/01-green/train.jsonl", "data/02-blue/test.jsonl"):
        assert (made / name).read_bytes() == (never / name).read_bytes()
    assert sorted(p.name for p in (made / "data").iterdir()) == sorted(p.name for p in (never / "data").iterdir())
    for run in (made, never):
        holdfast.learn(folder / "grey.jsonl", run, progress=QUIET)
    assert tensors(made) == tensors(never), "and it learns on"


def test_without_rows_of_a_month(folder: Path, monkeypatch: pytest.MonkeyPatch):
    made = learned(folder, "rows", "green", "grey")
    rows = read_jsonl(folder / "grey.jsonl")[:4]
    rows = [*rows[:2], {"prompt": "nobody's", "answer": "x"}, *rows[2:], {"prompt": "last", "answer": "nothing"}]
    gone = folder / "gone.csv"
    gone.write_text("question,response\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows))
    assert {"learn.json", "run.json", "data/02-grey/train.jsonl"} <= set(holding(made))
    before, hashes = tensors(made), read_jsonl(made / "data" / "rows.jsonl")
    said: list[str] = []
    monkeypatch.setattr(QUIET, "line", said.append)
    found = holdfast.rebuild(made, without_rows=gone, progress=QUIET)
    counts = {"given": 6, "removed": 4, "not_found": [f"{gone}: row 3", f"{gone}: row 6"]}
    assert found["rows"] == counts == read_json(made / "run.json")["rebuilt"][0]["rows"]
    told = f"not found: {gone}: row 3, {gone}: row 6"
    assert f"4 of 6 rows found; {told}" in said and said[-1] == f"4 of 6 rows found and removed; {told}"
    assert said[0].startswith(f"{made}: stage 1 is kept, grey made again in ")
    assert [line for line in said if "report.html" in line] == [f"report: {made / 'report.html'}"], "where it lies then"
    assert holding(made) == [], "not even as one of the answers that there may be"
    after = tensors(made)
    assert all(after[name] == values for name, values in before.items() if "02-grey" not in name)
    assert any(after[name] != values for name, values in before.items() if "02-grey/" in name)
    left = read_jsonl(made / "data" / "rows.jsonl")
    assert len(left) == len(hashes) - 4 and all(line in hashes for line in left)
    task = read_json(made / "learn.json")["tasks"][1]
    assert task["train"] + task["test"] == 36
    for side in ("train", "test"):
        assert len(read_jsonl(made / "data" / "02-grey" / f"{side}.jsonl")) == task[side]


def test_a_run_that_keeps_no_rows_cannot_be_made_again(folder: Path):
    holdfast.learn(
        folder / "green.jsonl", folder / "none", folder / "model", memory="none", overrides=FAST, progress=QUIET
    )
    with pytest.raises(ConfigError, match="keeps no rows"):
        holdfast.rebuild(folder / "none", without="green", progress=QUIET)
    assert not sibling(folder / "none").exists()
