"""A run that is made again without a task or rows is the run that never had them, and no file of it holds them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.errors import ConfigError, RunDirectoryError
from holdfast.records.directory import open_directory
from holdfast.records.read import read_run
from holdfast.runner.rebuild import rebuild as rebuilding
from holdfast.runner.rebuild import swap
from holdfast.runner.rebuild.plan import plan, record_before
from holdfast.runner.rebuild.rows import all_said, matching, said_in
from holdfast.runner.run import run
from holdfast.system.files import read_json, write_json
from holdfast.system.manifest import STATISTICS
from holdfast.system.progress import Progress
from support.canary import CANARY, holding
from support.command import holdfast as command
from support.resumed import tensors
from support.tiny import tiny_config

QUIET = Progress(quiet=True)


def config(folder: Path, output: str = "run", **changes: Any) -> dict[str, Any]:
    """Replay and a general cache over three tasks, of which green has a canary in every row."""
    first = not (folder / "model").exists()
    values = tiny_config(folder, method={"name": "replay", "ratio": 0.5, "capacity": 9}, output=str(folder / output))
    if first:
        for split in ("train", "test"):
            file = folder / "tasks" / "green" / f"{split}.json"
            rows = json.loads(file.read_text())
            write_json(file, [row | {"prompt": f"{CANARY} {row['prompt']}"} for row in rows])
    values["training"] |= {"epochs": 2}
    values["evaluation"] |= {"every": 3}
    return values | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rebuild")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    run(config(folder, "finished"), QUIET)
    return folder / "finished"


@pytest.fixture(scope="module")
def never(folder: Path) -> Path:
    """A run that never had the task green."""
    values = config(folder, "never")
    run(values | {"stream": values["stream"] | {"order": ["red", "blue"]}}, QUIET)
    return folder / "never"


@pytest.fixture
def made(finished: Path, folder: Path, request: pytest.FixtureRequest) -> Any:
    """A copy of the finished run, beside its data."""
    copy = folder / request.node.name[:60]
    shutil.copytree(finished, copy)
    yield copy
    for place in (copy, swap.sibling(copy), swap.former(copy)):
        shutil.rmtree(place, ignore_errors=True)


def same(one: Path, two: Path) -> None:
    """Weights, memories, scores and responses of two runs are the same."""
    assert tensors(one) == tensors(two)
    assert read_json(one / "matrix.json") == read_json(two / "matrix.json")
    for directory, other in ((one, two), (two, one)):
        for file in sorted(directory.glob("stages/*/responses/**/*.jsonl")):
            assert file.read_bytes() == (other / file.relative_to(directory)).read_bytes()
    losses = [[e["loss"] for e in map(json.loads, (d / "events.jsonl").open())] for d in (one, two)]
    assert losses[0] == losses[1]


def test_without_a_task_a_run_is_the_one_that_never_had_it(made: Path, never: Path):
    found = holding(made)
    assert {"stages/02-green/method/replay.safetensors", "stages/00-start/responses/green.jsonl"} <= set(found)
    (made / "notes.txt").write_text("mine")
    files = [file for file in made.glob("stages/0[01]-*/**/*") if "green" not in file.name and file.name != STATISTICS]
    kept = {file: file.stat().st_ino for file in files}
    matrix = holdfast.rebuild(made, without="green", progress=QUIET)
    assert matrix == read_json(made / "matrix.json") and matrix["tasks"] == ["red", "blue"]
    same(made, never)
    assert holding(made) == []
    assert not swap.sibling(made).exists() and not swap.former(made).exists()
    assert all(file.stat().st_ino == number for file, number in kept.items() if file.is_file()), "linked, not copied"
    assert (made / "notes.txt").read_text() == "mine"
    record = read_json(made / "run.json")
    assert record["config"]["output"] == read_json(never.parent / "finished" / "run.json")["config"]["output"]
    assert [entry["tasks"] for entry in record["rebuilt"]] == [["green"]]
    assert "without green" in (made / "report.html").read_text()
    again = config(made.parent, output=str(made))
    assert run(again | {"stream": again["stream"] | {"order": ["red", "blue"]}}, QUIET) == matrix, "it goes on"


@pytest.mark.slow
def test_killed_anywhere_the_same_call_goes_on(made: Path, never: Path, monkeypatch: pytest.MonkeyPatch):
    """Before that, the old run is in its place; at the end, the numbers are those of an unbroken call."""

    class Killed(BaseException):
        pass

    def dying(*args: Any, **options: Any) -> Any:
        raise Killed

    before = tensors(made)
    rename, renamed = Path.rename, list[Path]()

    def dying_later(path: Path, target: Path) -> Path:
        renamed.append(path)
        if len(renamed) == 2:
            raise Killed
        return rename(path, target)

    for place, name, act in (
        (rebuilding, "copy_stages", dying),
        (rebuilding, "write_json", dying),
        (rebuilding, "go_on", dying),
        ("holdfast.runner.loop", "save_states", dying),
        ("holdfast.runner.loop", "write_matrix", dying),
        (rebuilding, "_finish", dying),
        (Path, "rename", dying_later),
        (swap.shutil, "rmtree", dying),
    ):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(f"{place}.{name}", act) if isinstance(place, str) else patch.setattr(place, name, act)
            holdfast.rebuild(made, without="green", progress=QUIET)
        if place is not Path and place is not swap.shutil:
            assert tensors(made) == before
    assert swap.former(made).exists()
    holdfast.rebuild(made, without="green", progress=QUIET)
    same(made, never)
    assert holding(made) == [] and not swap.former(made).exists() and not swap.sibling(made).exists()


def test_without_the_last_task_nothing_is_trained(made: Path, finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("holdfast.runner.loop.train_stage", None)
    assert command("rebuild", made, "--without", "blue") == 0
    kept = {name: values for name, values in tensors(finished).items() if not name.startswith("stages/03")}
    assert tensors(made) == kept and read_run(made).finished


def test_what_cannot_be_made_again_is_refused(made: Path, capsys: pytest.CaptureFixture[str]):
    for arguments, message in (
        (("--without", "gren"), "has no task 'gren'; did you mean 'green'?"),
        ((), "give the tasks that go"),
        (("--without", "red", "--without", "green", "--without", "blue"), "no task would be left"),
    ):
        assert command("rebuild", made, *arguments) == 2
        assert message in capsys.readouterr().err
    with open_directory(made):
        assert command("rebuild", made, "--without", "red") == 2
    assert "in use by another process" in capsys.readouterr().err
    assert not swap.sibling(made).exists()
    swap.sibling(made).mkdir()
    with pytest.raises(RunDirectoryError, match="is in the way"):
        holdfast.rebuild(made, without="red", progress=QUIET)
    other = {"ask": {"tasks": ["blue"], "rows": None}, "of": "", "note": {}, "steps": [], "finished": False}
    write_json(swap.sibling(made) / swap.STATE, other)
    with pytest.raises(ConfigError, match="is being made again without blue"):
        holdfast.rebuild(made, without="red", progress=QUIET)
    code = read_json(made / "run.json")["config"] | {"method": [{"name": "somebody/elses.py"}]}
    begun = {
        "ask": {"tasks": ["red"], "rows": None},
        "of": hashlib.sha256((made / "run.json").read_bytes()).hexdigest(),
    }
    write_json(swap.sibling(made) / swap.STATE, other | begun | {"steps": [{"tasks": [], "config": code}]})
    with pytest.raises(ConfigError, match=r"runs the Python file somebody/elses.py\n.*add --trust"):
        holdfast.rebuild(made, without="red", progress=QUIET)


@pytest.mark.slow
def test_rows_in_files_of_the_user_are_named_and_go_once_they_are_taken_out(tmp_path: Path):
    values = config(tmp_path)
    run(values, QUIET)
    made, train = tmp_path / "run", tmp_path / "tasks" / "green" / "train.json"
    rows = json.loads(train.read_text())
    gone = tmp_path / "gone.csv"
    gone.write_text("question,response\n" + "".join(f'"{r["prompt"]}",{r["answer"]}\n' for r in rows[2:4]))
    with pytest.raises(ConfigError, match=r"stand in files of yours.*\n.*green/train.json: row 3\b.*\n.*row 4\b"):
        holdfast.rebuild(made, without_rows=gone, progress=QUIET)
    wanted = all_said(said_in(gone))
    write_json(train, [row for n, row in enumerate(rows) if n not in matching(said_in(train), wanted)])
    before = tensors(made)
    found = holdfast.rebuild(made, without_rows=gone, progress=QUIET)["rows"]
    assert (found["given"], found["removed"], found["taken_out"]) == (2, 0, ["green"])
    run(values | {"output": str(tmp_path / "never")}, QUIET)
    same(made, tmp_path / "never")
    assert {n: v for n, v in tensors(made).items() if "01-red" in n} == {
        n: v for n, v in before.items() if "01-red" in n
    }
    assert read_json(made / "run.json")["rebuilt"][0]["rows_of"] == ["green"]
    with pytest.raises(ConfigError, match=r"no task of .* holds any row"):
        holdfast.rebuild(made, without_rows=gone, progress=QUIET)


@pytest.mark.slow
def test_a_run_that_grew_is_made_again_in_the_same_steps(tmp_path: Path):
    """Tasks that came later were not measured before, as in the run that never had the task."""

    def grown(output: str, *orders: list[str]) -> Path:
        for n, order in enumerate(orders, start=1):
            values = config(tmp_path, output)
            values["training"]["epochs"] = n
            run(values | {"stream": values["stream"] | {"order": order}}, QUIET)
        return tmp_path / output

    def tasks(path: Path) -> list[list[str]]:
        return [growth["tasks"] for growth in read_json(path / "run.json")["grown"]]

    made = grown("run", ["red"], ["red", "green"], ["red", "green", "blue"])
    values = config(tmp_path, "never")
    grown("never", ["red"])
    values["training"]["epochs"] = 3
    run(values | {"stream": values["stream"] | {"order": ["red", "blue"]}}, QUIET)
    assert read_json(made / "matrix.json")["scores"][0][2] is None
    holdfast.rebuild(made, without="green", progress=QUIET)
    same(made, tmp_path / "never")
    assert tasks(made) == tasks(tmp_path / "never") == [["blue"]]
    assert holding(made) == []


def test_a_row_is_the_same_in_every_format(tmp_path: Path):
    same_row = {
        "a.jsonl": {"prompt": "Who?", "answer": "I"},
        "b.json": {"instruction": "Who?", "input": "", "output": "I"},
        "c.jsonl": {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}]},
        "d.jsonl": {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I"}]},
    }
    for name, row in same_row.items():
        other = json.loads(json.dumps(row).replace("Who?", "What?"))
        (tmp_path / name).write_text(f"{json.dumps(other)}\n{json.dumps(row)}\n")
    wanted = set(said_in(tmp_path / "a.jsonl")[1])
    for name in same_row:
        assert matching(said_in(tmp_path / name), wanted) == [1], name


def record(**more: Any) -> dict[str, Any]:
    """run.json of a run that began with a and b, and to which c, and then d and e, were appended."""
    names = ["a", "b", "c", "d", "e"]
    stream = {"tasks": [{"name": name} for name in names], "order": None}
    training = {"epochs": 1.0}
    stages = [
        {"stage": t, "task": n, "config": {"training": {"epochs": float(t)}, "stream": stream}}
        for t, n in enumerate(names, start=1)
    ]
    return {
        "config": {"stream": stream, "training": training, "gate": None},
        "tasks": {name: {} for name in names},
        "grown": [{"after": 2, "tasks": ["c"]}, {"after": 3, "tasks": ["d", "e"]}],
        "stages": stages,
    } | more


def tasks_of(found: Any) -> list[list[str]]:
    for step in found.configs:
        assert [task["name"] for task in step["config"]["stream"]["tasks"]] == step["tasks"]
    return [step["tasks"] for step in found.configs]


def test_a_run_that_grew_grows_again():
    done = [0, 1, 2, 3, 4, 5]
    found = plan(record(), done, without=["b"], first=2, joint=False)
    assert tasks_of(found) == [["a"], ["a", "c"], ["a", "c", "d", "e"]] and found.known == ["a"]
    assert [step["config"]["training"]["epochs"] for step in found.configs] == [1.0, 3.0, 1.0]
    assert "grown" not in record_before(record(), found)
    found = plan(record(), done, without=["d"], first=4, joint=False)
    assert tasks_of(found) == [["a", "b", "c"], ["a", "b", "c", "e"]]
    before = record_before(record(), found)
    assert list(before["tasks"]) == ["a", "b", "c"] and before["grown"] == [{"after": 2, "tasks": ["c"]}]
    assert [stage["task"] for stage in before["stages"]] == ["a", "b", "c"]
    found = plan(record(), done, without=["a", "b"], first=1, joint=False)
    assert tasks_of(found) == [["c"], ["c", "d", "e"]] and "grown" not in record_before(record(), found)


def test_stages_that_were_undone_go_where_they_would_be_made_again():
    done = [0, 1, 2, 3, 4, 5]
    back = record(rollbacks=[{"after": 4, "to": 1, "at": "then"}])  # 5 was learned from 1
    found = plan(back, done, without=["c"], first=3, joint=False)
    assert (found.removed, found.undone) == (["c", "d"], ["d"]) and tasks_of(found) == [["a", "b"], ["a", "b", "e"]]
    assert record_before(back, found)["rollbacks"] == [{"after": 2, "to": 1, "at": "then"}]
    gate = [{"stage": 4, "current": 3, "scores": [1, 2, 3, 4]}, {"stage": 2, "current": 2, "scores": [1, 2]}]
    judged = record(gate=gate)
    found = plan(judged, done, without=["a"], first=1, joint=False)
    assert found.undone == [], "what the gate undid is judged again"
    found = plan(judged, done, without=["c"], first=3, joint=False)
    assert record_before(judged, found)["gate"] == [{"stage": 2, "current": 2, "scores": [1, 2]}]
