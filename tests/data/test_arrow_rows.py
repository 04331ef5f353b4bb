"""Rows of large splits in Arrow are those of lists, to the last token, from memory, a new file and one found again."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.api.task import Example, Stream, Task, Turn
from holdfast.config.run import RunConfig
from holdfast.data import arrow_rows
from holdfast.data.arrow_rows import ArrowRows, Facts, RowFile, as_batch, chunks
from holdfast.data.encode import Encoder
from holdfast.data.on_disk import OnDisk
from holdfast.errors import DataError
from holdfast.runner.rows import StageRows, encode_tasks
from support.tiny import tiny_tokenizer


def examples(count: int = 7, words: int = 12, longest: int = 20) -> list[Example]:
    """Questions in two files, every third of which is too long as it is, and one answer, too."""
    found = []
    for i in range(count):
        question = f"say {i} " + "word " * (words if i % 3 else 3 * words)
        turns = (
            Turn("user", question, cut=(6, len(question))),
            Turn("assistant", f"answer {i}" * (longest if i == 5 else 1)),
        )
        found.append(Example(f"{'ab'[i % 2]}.jsonl", i, turns))
    return found


def encoder(**options) -> Encoder:
    return Encoder(tiny_tokenizer(), max_length=100, long_answers="cut", **options)


def encoded(train: list[Example], cache: Path | None = None, skip: bool = False, **options):
    """The examples that are left, their rows, the limit of responses, and the counts of what was cut."""
    data = {"cache": None if cache is None else str(cache), "on_bad_row": "skip" if skip else "stop"}
    config = RunConfig.model_validate({"model": "m", "stream": {"path": "p"}, "output": "o", "data": data})
    own, task = encoder(**options), Task("t", "accuracy", list(train), examples(2))
    rows, limits = encode_tasks(Stream("s", [task]), own, config)
    return task.train, rows["t"], limits, (own.truncated, own.cut_answers)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "LARGE_ROWS", 5)
    monkeypatch.setattr(arrow_rows, "CHUNK", 3)


@pytest.fixture
def plain() -> tuple:
    found = encoded(examples())
    assert found[3][0] > 1 and found[3][1] == 1  # some are cut, and one loses a part of the answer
    return found


def assert_same(found: tuple, plain: tuple) -> None:
    assert isinstance(found[1], ArrowRows) and isinstance(plain[1], list)
    assert (found[0], list(found[1]), *found[2:]) == plain
    assert type(found[1][0]["input_ids"]) is list and type(found[1][0]["row"]) is int


def test_in_memory_and_in_a_file_rows_limits_and_counts_are_those_of_lists(plain, large, tmp_path: Path):
    assert_same(encoded(examples()), plain)
    assert not any(tmp_path.iterdir())
    assert_same(encoded(examples(), tmp_path / "cache"), plain)
    [file] = (tmp_path / "cache").iterdir()
    assert file.suffix == ".arrow"


def test_a_file_is_found_again_and_nothing_is_tokenised(plain, large, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encoded(examples(), tmp_path)
    monkeypatch.setattr(Encoder, "encode_all", None)
    assert_same(encoded(examples(), tmp_path), plain)


@pytest.mark.parametrize("damage", ["cut", "empty", "other"])
def test_a_damaged_file_is_made_anew(damage: str, plain, large, tmp_path: Path):
    encoded(examples(), tmp_path)
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"{}" * 100}[damage])
    assert_same(encoded(examples(), tmp_path), plain)
    assert file.read_bytes() == content and len(list(tmp_path.iterdir())) == 1


def test_a_file_of_which_any_byte_changed_is_made_anew(plain, large, tmp_path: Path):
    encoded(examples(), tmp_path)
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    for place in range(5, len(content), len(content) // 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert_same(encoded(examples(), tmp_path), plain)
        assert file.read_bytes() == content


def test_other_content_order_settings_tokenizer_or_code_is_another_file(tmp_path: Path):
    first, *rest = examples()
    said = (replace(first.turns[0], content="other"), first.turns[1])
    unmarked = (replace(first.turns[0], cut=None), first.turns[1])
    kinds = [
        RowFile(tmp_path, encoder(), [first, *rest]),
        RowFile(tmp_path, encoder(), [*rest, first]),
        RowFile(tmp_path, encoder(), [replace(first, row=9), *rest]),
        RowFile(tmp_path, encoder(), [replace(first, turns=said), *rest]),
        RowFile(tmp_path, encoder(), [replace(first, turns=unmarked), *rest]),
        RowFile(tmp_path, encoder(supervise="all"), [first, *rest]),
        RowFile(tmp_path, Encoder(tiny_tokenizer("§"), max_length=100, long_answers="cut"), [first, *rest]),
        RowFile(tmp_path, Encoder(tiny_tokenizer(), max_length=99, long_answers="cut"), [first, *rest]),
        RowFile(tmp_path, Encoder(tiny_tokenizer(), max_length=100), [first, *rest]),
    ]
    assert len({kind.path for kind in kinds}) == len(kinds)
    moved = [replace(example, file=f"elsewhere/{example.file}") for example in [first, *rest]]
    assert RowFile(tmp_path, encoder(), moved).path == kinds[0].path


def test_rows_that_cannot_be_used_are_left_out_as_of_lists_and_their_file_is_not_kept(
    large, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bad = examples(longest=3)
    bad[4] = replace(bad[4], turns=(Turn("user", "x" * 300), Turn("assistant", "y")))
    found = encoded(bad, tmp_path, skip=True)
    monkeypatch.setattr(arrow_rows, "LARGE_ROWS", 100)
    assert_same(found, encoded(bad, skip=True))
    assert len(found[0]) == 6 and found[2] == {"t": 3 * 8 + 1 + 8} and not any(tmp_path.iterdir())


def test_of_two_runs_that_write_at_once_the_first_file_stays(plain, large, tmp_path: Path):
    first, second = (RowFile(tmp_path, encoder(), examples()) for _ in range(2))
    rows = plain[1]
    with first.writing() as one, second.writing() as other:
        for writer in (one, other):
            writer.write(as_batch(rows), Facts([1], [], 3))
        assert list(one.finish(keep=True)) == rows
        inode = first.path.stat().st_ino
        assert list(other.finish(keep=True)) == rows
    assert [file.stat().st_ino for file in tmp_path.iterdir()] == [inode]
    found = second.read()
    assert found is not None and list(found[0]) == rows and found[1] == Facts([1], [], 3)


def test_an_interrupted_writer_leaves_nothing(large, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Encoder, "_row", lambda self, example, *_: {"row": 1 // (6 - example.row)})
    with pytest.raises(ZeroDivisionError):
        encoded(examples(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_told_with_its_key(large, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache: .*file: tokenised rows cannot be written: .*another folder"):
        encoded(examples(), tmp_path / "file")


def test_a_full_disk_is_told_with_the_key(large, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"data\.cache: .*No space left on device; free some space"):
        encoded(examples(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_chunks_hold_all_examples_in_order_and_a_large_one_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(arrow_rows, "CHUNK", 3)
    monkeypatch.setattr(arrow_rows, "LARGE_TEXT", 1000)
    texts = [Example("f", i, text="x" * size) for i, size in enumerate([1, 1, 5000, 1, 1, 1, 1])]
    for given in (texts, OnDisk(texts)):
        assert list(chunks(given)) == [range(3), range(3, 6), range(6, 7)]


def test_rows_of_many_batches_behave_as_a_list():
    rows = [
        {"input_ids": list(range(n)), "labels": [-100] * n, "encoder_ids": [n], "row": 10**10 + n} for n in range(8)
    ]
    stored = ArrowRows([as_batch(rows[:3]), as_batch(rows[3:4]), as_batch(rows[4:])])
    assert list(stored) == rows and len(stored) == 8 and stored[-1] == rows[-1] and stored[2:6:2] == rows[2:6:2]
    assert list(pickle.loads(pickle.dumps(stored))) == rows and not len(ArrowRows([]))
    for place in (8, -9):
        with pytest.raises(IndexError):
            stored[place]


def test_rows_of_a_stage_are_numbered_through_its_tasks():
    parts = [("a", [{"input_ids": [1], "row": 4}]), ("b", [{"input_ids": [2], "row": 0}, {"input_ids": [3], "row": 7}])]
    rows = StageRows(parts)
    assert list(rows) == [{"input_ids": [n + 1], "row": n} for n in range(3)] and rows[-1] == rows[2]
    assert [rows.origin(place) for place in range(3)] == [("a", 5), ("b", 1), ("b", 8)] and rows[1:] == list(rows)[1:]
    assert parts[0][1][0]["row"] == 4
