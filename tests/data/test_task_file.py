"""A large task that is found again in ``data.cache`` is the one that was read, and is read anew if anything differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from holdfast.api.task import Task
from holdfast.config.run import RunConfig
from holdfast.data import load, on_disk, source
from holdfast.data.arrow_rows import digest_of
from holdfast.data.on_disk import OnDisk
from holdfast.errors import DataError
from holdfast.runner.data import load_data

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one file": {},
    "drop": {"data": {"on_overlap": "drop"}},
    "limits": {"data": {"train_rows": 11, "test_rows": 3}},
    "sample": {"evaluation": {"rows": 2}},
    "dev": {"evaluation": {"split": "dev"}},
    "labels": {},
}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (on_disk, source):
        monkeypatch.setattr(module, "LARGE_ROWS", 8)


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made(folder: Path, case: str = "plain") -> Path:
    rows = [{"prompt": f"question {i % 17}", "answer": f"answer {i % 5}", "unused": 1} for i in range(40)]
    if case == "labels":
        rows = [{"sentence": f"s {i}", "label": i % 2} for i in range(40)]
    write(folder / ("data.jsonl" if case == "one file" else "train.jsonl"), rows)
    if case == "labels":
        (folder / "labels.json").write_text('["no", "yes"]')
    if case != "one file":
        write(folder / "test.jsonl", [*rows[4:12], rows[0] | {next(iter(rows[0])): "another?"}])
        write(folder / "dev.jsonl", rows[:9])
    return folder


def loaded(folder: Path, cache: Path | None, **settings: Any) -> Task:
    values = {"model": "m", "stream": {"path": str(folder)}, "output": "o"} | settings
    values["data"] = values.get("data", {}) | {"cache": None if cache is None else str(cache)}
    [task] = load_data(RunConfig.model_validate(values)).stream.tasks
    return task


def facts(task: Task) -> dict[str, Any]:
    assert isinstance(task.train, OnDisk)
    splits = {name: list(getattr(task, name)) for name in ("train", "eval", "test")}
    return vars(task) | splits | {"eval on disk": isinstance(task.eval, OnDisk), "files": task.train.files}


@pytest.mark.parametrize("case", CASES)
def test_a_task_is_found_again_as_it_was_read(case: str, large, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, cache, settings = made(tmp_path / "task", case), tmp_path / "cache", CASES[case]
    expected = facts(read := loaded(folder, None, **settings))
    assert facts(loaded(folder, cache, **settings)) == expected
    [file] = cache.iterdir()
    monkeypatch.setattr(load, "load_task", None)
    found = loaded(folder, cache, **settings)
    assert (
        facts(found) == expected and list(cache.iterdir()) == [file] and digest_of(found.train) == digest_of(read.train)
    )


def test_other_files_and_settings_are_another_task(large, tmp_path: Path):
    folder, cache = made(tmp_path / "task"), tmp_path / "cache"
    loaded(folder, cache)
    for count, case in enumerate(("drop", "limits", "sample", "dev"), 2):
        loaded(folder, cache, **CASES[case])
        assert len(list(cache.iterdir())) == count
    content = (folder / "train.jsonl").read_text()
    for name, text in (("train.jsonl", content.replace("answer 3", "answer 4", 1)), ("test.jsonl", content)):
        (folder / name).write_text(text)
        assert facts(loaded(folder, cache)) == facts(loaded(folder, None))
    assert len(list(cache.iterdir())) == 7


def test_a_damaged_file_is_made_anew(large, tmp_path: Path):
    folder, cache = made(tmp_path / "task"), tmp_path / "cache"
    expected = facts(loaded(folder, cache))
    [file] = cache.iterdir()
    content = file.read_bytes()
    for place in range(5, len(content), len(content) // 5):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert facts(loaded(folder, cache)) == expected and file.read_bytes() == content


def test_a_task_with_bad_rows_is_not_kept(large, tmp_path: Path):
    folder, cache = made(tmp_path / "task"), tmp_path / "cache"
    with (folder / "train.jsonl").open("a") as file:
        file.write("{\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"row 41 .*is not valid JSON"):
            loaded(folder, cache)
        assert len(loaded(folder, cache, data={"on_bad_row": "skip"}).train) == 40
    assert not cache.exists()
