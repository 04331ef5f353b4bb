"""Examples on disk are those that were given, and a task whose rows lie there is the one of lists."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields
from pathlib import Path

import pytest

from holdfast.api.task import Example, Turn, fingerprint
from holdfast.config.run import RunConfig
from holdfast.data import on_disk, source
from holdfast.data.on_disk import OnDisk, chosen, gathered
from holdfast.data.parts import Once, limited
from holdfast.errors import DataError
from holdfast.runner.data import load_data

TURN = Turn("assistant", "é\u2028 \\u0041", (0, 2), False, "so", ('{"name": "f"}',), "n")
FULL = Example("f.jsonl", 3, (Turn("user", "q"), TURN), None, 2, ("a", "b"), ("c",), "[]", True, None, False)
COLUMNS = Example("g", 1, (Turn("user", "q"), TURN), columns={"x": {1, 2}})
TEXT = Example("g", 2, text="long " * 50)
ALL = [FULL, COLUMNS, TEXT, FULL]


def test_examples_are_read_as_they_were_given() -> None:
    assert all(getattr(FULL, f.name) != f.default for f in fields(Example) if f.name not in ("text", "columns"))
    assert all(getattr(TURN, f.name) != f.default for f in fields(Turn) if f.name != "pictures")
    stored = OnDisk(iter(ALL))
    assert list(stored) == ALL and len(stored) == 4 and stored[-1] == FULL and stored[1] is COLUMNS
    assert type(stored[0].turns) is type(stored[0].turns[1].cut) is type(stored[0].choices) is tuple
    assert list(stored[1:]) == ALL[1:] and list(chosen(stored[1:], [2, 0])) == [FULL, COLUMNS]
    assert stored.files == {"f.jsonl", "g"} and stored[1:3].files == {"g"}
    assert pickle.loads(pickle.dumps(stored[2:])) == ALL[2:]
    for place in (4, -5):
        with pytest.raises(IndexError):
            stored[place]


@pytest.mark.parametrize(("together", "block"), [(1, 10), (3, 100), (3, 10**6), (256, 10**6)])
def test_examples_are_gone_through_in_blocks(together: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "TOGETHER", together)
    monkeypatch.setattr(on_disk, "BLOCK", block)
    stored = OnDisk(ALL * 3)
    assert list(stored) == ALL * 3 and list(chosen(stored, [7, 1, 2, 11])) == [FULL, COLUMNS, TEXT, FULL]


def test_the_first_rows_of_parts_are_as_many_as_asked_for() -> None:
    for limit, expected in ((0, [[], []]), (2, [[0, 1], []]), (4, [[0, 1, 2], [3]]), (9, [[0, 1, 2], [3, 4]])):
        parts = [[{"n": n} for n in of] for of in ((0, 1, 2), (3, 4))]
        for given in (parts, [Once(parts[0]), parts[1]], [parts[0], Once(parts[1])]):
            found = list(limited(given, limit))
            assert bool(found[0]) == bool(limit)
            assert [[row["n"] for row in rows] for rows in found] == expected


def test_few_small_items_are_a_list_and_others_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "LARGE_ROWS", 4)
    monkeypatch.setattr(on_disk, "LARGE_TEXT", 200)
    assert gathered(iter([FULL] * 1)) == [FULL]
    for items in ([TEXT], [COLUMNS] * 5):
        found = gathered(iter(items))
        assert isinstance(found, OnDisk) and list(found) == items


def test_a_fingerprint_is_that_of_one_json_text() -> None:
    import hashlib

    text = '[[[["user", "q\\u00e9"], ["assistant", "a"]], "t"], [], ["u"]]'
    train = [Example("f", 0, (Turn("user", "qé"), Turn("assistant", "a"))), Example("f", 1, text="t")]
    assert fingerprint(train, [], [Example("f", 0, text="u")]) == hashlib.sha256(text.encode()).hexdigest()


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("case", ["prompt_answer", "one file", "columns", "other names", "labels", "limits", "drop"])
def test_a_task_on_disk_is_the_one_of_lists(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data, stream = tmp_path / "task", {}, {}
    folder.mkdir()
    rows = [{"prompt": f"question {i % 17}", "answer": f"answer {i % 5}"} for i in range(40)]
    if case == "labels":
        (folder / "labels.json").write_text('["no", "yes"]')
        rows = [{"sentence": f"s {i}", "label": [i % 2, str(i % 2), "yes"][i % 3]} for i in range(40)]
    if case == "columns":
        rows = [{"p": row["prompt"], "answer": row["answer"]} for row in rows]
        stream["columns"] = {"p": "prompt"}
    if case == "other names":
        rows = [{"question": row["prompt"], "response": row["answer"]} for row in rows]
    if case == "limits":
        data["train_rows"] = 11
    if case == "drop":
        data |= {"on_overlap": "drop", "reasoning": "drop"}
    write(folder / ("data.jsonl" if case == "one file" else "train.jsonl"), rows)
    if case != "one file":
        write(folder / "test.jsonl", rows[4:6])
        write(folder / "dev.jsonl", rows[:9])
    values = {"model": "m", "stream": {"path": str(folder), **stream}, "output": "o", "data": data}

    def loaded() -> tuple:
        [task] = load_data(RunConfig.model_validate(values)).stream.tasks
        return type(task.train), *([list(s) for s in (task.train, task.eval, task.test)]), task.counts, task.fingerprint

    kind, *expected = loaded()
    monkeypatch.setattr(on_disk, "LARGE_ROWS", 4)
    monkeypatch.setattr(source, "LARGE_ROWS", 4)
    stored, *found = loaded()
    assert (kind, stored) == (list, OnDisk) and found == expected


def test_a_folder_that_cannot_be_written_to_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(on_disk.tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"folder for temporary files: No space left on device; .*TMPDIR"):
        OnDisk([FULL])
