"""Checksums: what was written is what is read, after any kill; anything else is named."""

from __future__ import annotations

import pytest

from holdfast.errors import RunDirectoryError
from holdfast.system.files import json_file, read_appended, write_text
from holdfast.system.manifest import MANIFEST, check, folder_facts, note, read_json, text_facts, write_noted


def put(root, value):
    write_noted(root, root / "a.json", json_file(value))


def test_what_was_written_is_read(tmp_path):
    for value in ({"a": 1}, {"a": "ä"}, {"a": 3}):
        put(tmp_path, value)
        assert read_json(tmp_path / "a.json") == value


@pytest.mark.parametrize("spoil", [b'{\n "a": 3\n}\n', b"", b'{"a": 12345}', b"\xff"])
def test_another_content_is_damage(spoil, tmp_path):
    put(tmp_path, {"a": 1})
    put(tmp_path, {"a": 2})
    (tmp_path / "a.json").write_bytes(spoil)
    with pytest.raises(RunDirectoryError, match=r"a\.json: is damaged: .*manifest\.jsonl.*; restore it from a copy"):
        read_json(tmp_path / "a.json")


def test_a_kill_between_the_note_and_the_file_is_no_damage(tmp_path):
    put(tmp_path, {"a": 1})
    note(tmp_path, tmp_path / "a.json", {"": text_facts(json_file({"a": 2}))})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    write_text(tmp_path / "a.json", json_file({"a": 2}))
    assert read_json(tmp_path / "a.json") == {"a": 2}


def test_several_kills_in_a_row_at_that_point_are_no_damage(tmp_path):
    put(tmp_path, {"a": 0})
    put(tmp_path, {"a": 1})
    for value in (2, 3, 4):
        note(tmp_path, tmp_path / "a.json", {"": text_facts(json_file({"a": value}))})
        assert read_json(tmp_path / "a.json") == {"a": 1}
    write_text(tmp_path / "a.json", json_file({"a": 0}))
    with pytest.raises(RunDirectoryError, match="is damaged"):
        read_json(tmp_path / "a.json")


def test_another_s_file_of_that_name_is_left_alone(tmp_path):
    (tmp_path / MANIFEST).write_text('{"audio_filepath": "a.wav"}\nno JSON\n')
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json") == [1]


def test_a_manifest_that_is_damaged_itself_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    put(tmp_path, [1])
    content = (tmp_path / MANIFEST).read_bytes()
    (tmp_path / MANIFEST).write_bytes(b"[" + content[1:])
    with pytest.raises(RunDirectoryError, match=r"manifest\.jsonl: line 1 is damaged"):
        read_json(tmp_path / "a.json")


def test_a_kill_within_the_note_is_no_damage(tmp_path):
    put(tmp_path, {"a": 1})
    with (tmp_path / MANIFEST).open("ab") as file:
        file.write(b'{"path": "a.json", "files": {"": {"byt')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    put(tmp_path, {"a": 2})
    assert read_json(tmp_path / "a.json") == {"a": 2}
    assert len(read_appended(tmp_path / MANIFEST)) == 2


def test_without_a_manifest_nothing_is_compared_and_what_is_no_json_is_named(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert read_json(tmp_path / "a.json") == [1]
    (tmp_path / "a.json").write_text("[1")
    with pytest.raises(RunDirectoryError, match=r"a\.json: is damaged"):
        read_json(tmp_path / "a.json")


def test_a_folder_is_what_it_was_and_may_hold_more(tmp_path):
    folder = tmp_path / "stages" / "01-a" / "adapter"
    (folder / "deep").mkdir(parents=True)
    (folder / "weights").write_bytes(b"0" * 1000)
    (folder / "deep" / "more").write_bytes(b"1")
    note(tmp_path, folder, folder_facts(folder))
    (folder / "mine.txt").touch()
    check(folder)
    (folder / "deep" / "more").unlink()
    with pytest.raises(
        RunDirectoryError, match=r"more: is damaged: it is missing .* delete .*01-a and the stages after"
    ):
        check(folder)


def test_a_damaged_line_of_a_log_is_named_and_a_torn_last_one_is_passed_over(tmp_path):
    log = tmp_path / "events.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 2}\n{"ste\xc3')
    assert read_appended(log) == [{"step": 1}, {"step": 2}]
    log.write_bytes(b'{"step": 1}\n{"ste\xc3\n{"step": 3}\n')
    with pytest.raises(RunDirectoryError, match=r"events\.jsonl: line 2 is damaged"):
        read_appended(log)
