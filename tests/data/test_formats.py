"""Files to rows to examples: every shape is read as it stands, and every bad row is named with its reason."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from holdfast.api.task import Turn
from holdfast.data.conversation import Noticed
from holdfast.data.files import read_rows
from holdfast.data.formats import detect, to_examples
from holdfast.errors import ConfigError, DataError

ROWS = [{"prompt": "Wie heißt\ndas, bitte?", "answer": "Tür"}, {"prompt": '"two", please', "answer": "2"}]


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS = {
    "array.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1), encoding="utf-8"),
    "utf8.json": lambda path, rows: path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8"),
    "bom.json": lambda path, rows: path.write_text(json.dumps(rows), encoding="utf-8-sig"),
    "lines.json": lambda path, rows: path.write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8"),
    "rows.jsonl": lambda path, rows: path.write_text("\r\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8"),
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    assert read_rows(tmp_path / name) == ROWS


def test_a_line_separator_inside_a_json_string_is_no_new_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one\u2028two\u0085three"}\n{"text": "four"}\n', encoding="utf-8")
    assert [row["text"] for row in read_rows(path)] == ["one\u2028two\u0085three", "four"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b"", ["a.json", "no rows"]),
        ("a.json", b" [ ] ", ["a.json", "no rows"]),
        ("a.csv", b"prompt,answer\n", ["a.csv", "no rows"]),
        ("a.json", b'[\n{"a": 1},\n{"a": 2,}\n]', ["row 2 (line 3)", "not valid JSON"]),
        ("a.json", b'[\n{"a": 1}\n{"a": 2}\n]', ["row 2 (line 3)", "','"]),
        ("a.json", b'[{"a": 1},\n]', ["row 2 (line 2)", "not valid JSON"]),
        ("a.json", b'[{"a": 1},\n\n{"a": "cut off', ["row 2 (line 3)", "not valid JSON"]),
        ("a.json", b'[{"a": 1}] {"a": 2}', ["Extra data"]),
        ("a.json", b'[{"a": 1},\n\n 7]', ["row 2 (line 3)", "must be an object, not a number"]),
        ("a.json", b'{"a": 1}\n["b"]\n', ["row 2 (line 2)", "must be an object, not a list"]),
        ("a.json", b'{\n"a": 1\n}', ["row 1 (line 1)", "array of objects, or one object a line"]),
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', ["row 2 (line 3)", "not valid JSON", "column 7"]),
        ("a.json", b'[\n{"a": "caf\xe9"}]', ["not UTF-8", "byte 12 ", "line 2", "0xe9"]),
        ("a.csv", b"a,b\n1,2\n\xff,3\n", ["not UTF-8", "byte 8 ", "line 3"]),
        ("a.csv", b"a,b\n1,2\n3\n", ["row 2 (line 3)", "has 1 fields, not the 2", "a, b"]),
        ("a.csv", b'a,b\n"1\n",2\n\n3,4,5\n', ["row 2 (line 5)", "has 3 fields, not the 2"]),
        ("a.csv", b'a,b\n"1"x,2\n', ["row 1 (line 2)", "not valid CSV"]),
        ("a.csv", b"a;b\n1;2\n3;4;5\n", ["row 2 (line 3)", "has 3 fields, not the 2", "a, b; semicolons divide them"]),
        ("a.csv", b",a\n1,2\n3\n", ["row 2 (line 3)", "that the first line names: '', a"]),
        ("a.jsonl", b'{"a": "x", \n', ["row 1 (line 1)", "not valid JSON", "at column 11"]),
        ("a.jsonl", b'{"a": 1}\r\n{"a"\r\n', ["row 2 (line 2)", "not valid JSON", "at column 5"]),
        ("a.json", b'[{"a": 1, \n\n', ["row 1 (line 1)", "at column 10"]),
        ("a.parquet", b"PAR1 but not really", ["a.parquet", "parquet"]),
        ("a.tsv", b"a\tb\n", ["a.tsv", "no rows"]),
        ("a.csv", b"a,b,b\n1,2,3\n", ["line 1", "the column 'b' stands twice"]),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', ["row 2 (line 2)", "the name 'a' stands twice"]),
        ("a.json", b'[{"a": {"b": 1, "b": 2}}]', ["row 1 (line 1)", "the name 'b' stands twice"]),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"}", ["row 1 (line 1)", "nested too deeply"]),
        ("a.json", b'[{"a": ' + b"9" * 5000 + b"}]", ["row 1 (line 1)", "too many digits"]),
        ("a.xml", b"<a/>", ["'.xml'", ".jsonl", ".zst"]),
        ("a.jsonl.gz", b'{"a": 1}', ["cannot be decompressed"]),
        ("a.jsonl.zst", b'{"a": 1}', ["cannot be decompressed"]),
        ("a.jsonl.gz", gzip.compress(b"\xff" * 999, mtime=0)[:-9], ["cannot be decompressed"]),
    ],
)
def test_bad_files_are_named_with_place_and_reason(tmp_path: Path, name: str, content: bytes, said: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / name)
    assert all(part in str(error.value) for part in [name, *said]), error.value


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", "frage;antwort\n1,5?;ja, 1\n", [{"frage": "1,5?", "antwort": "ja, 1"}]),
        ("a.csv", '\n"frage, kurz";"ant\nwort"\r\n"a;b";c\r\n', [{"frage, kurz": "a;b", "ant\nwort": "c"}]),
        ("a.csv", "question,answer;more\na,b;c\n", [{"question": "a", "answer;more": "b;c"}]),
        ("a.csv", '"a;b"\nc\n', [{"a;b": "c"}]),
        ("a.csv", "text\na;b\n", [{"text": "a;b"}]),
        ("a.tsv", "a;b\tc\n1\t2\n", [{"a;b": "1", "c": "2"}]),
    ],
)
def test_semicolons_divide_a_csv_file_whose_first_line_has_no_comma(
    tmp_path: Path, name: str, content: str, rows: list[dict[str, str]]
) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
    assert read_rows(tmp_path / name) == rows


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder, where a data file is needed"):
        read_rows(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json"):
        read_rows(tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "p", "answer": "a", "text": "t"}, "prompt_answer"),
        ({"label": "l", "sentence": "s"}, "sentence_label"),
        ({"messages": []}, "messages"),
        ({"conversations": []}, "sharegpt"),
        ({"instruction": "i", "output": "o"}, "alpaca"),
        ({"instruction": "i", "input": "", "output": "o", "answer": "a"}, "alpaca"),
        ({"doc": "d", "block": 1, "text": "t"}, "text"),
    ],
)
def test_the_keys_tell_the_format(row: dict[str, Any], format: str) -> None:
    assert detect([row], "f") == (format, {})


def test_unknown_keys_are_listed_with_the_known_shapes() -> None:
    with pytest.raises(DataError) as error:
        detect([{"frage": "q", "antwort": "a"}], "data/x.json")
    for part in ("data/x.json", "'frage', 'antwort'", "prompt_answer {prompt, answer}", "sharegpt"):
        assert part in str(error.value)


def one(row: dict[str, Any], format: str, **options: Any) -> tuple[Turn, ...]:
    [example] = to_examples([row], format, file="f.json", **options)
    assert (example.file, example.row) == ("f.json", 0)
    return example.turns


def cut(turn: Turn) -> str | None:
    return None if turn.cut is None else turn.content[slice(*turn.cut)]


def test_prompt_answer() -> None:
    asked, answer = one({"prompt": " 1 + 1?\n", "answer": " 2\n"}, "prompt_answer")
    assert (asked.role, asked.content, cut(asked)) == ("user", " 1 + 1?\n", " 1 + 1?\n")
    assert answer == Turn("assistant", "2")


def test_sentence_label_is_asked_as_in_o_lora() -> None:
    row = {"sentence": "Title: x\nText: y\n", "label": "True "}
    asked, answer = one(row, "sentence_label", labels=["True", "False"], instruction="Is it so?\n")
    assert asked.content == "Is it so?\nOption: True, False\nTitle: x\nText: y\n\nAnswer:"
    assert cut(asked) == row["sentence"]
    assert answer.content == "True"
    asked, _ = one(row, "sentence_label", labels=["True", "False"])
    assert asked.content == "Title: x\nText: y\n\nAnswer:"
    assert cut(asked) == row["sentence"]


def test_alpaca_cuts_the_input_only() -> None:
    asked, answer = one({"instruction": "Translate.", "input": "Tür", "output": "door "}, "alpaca")
    assert (asked.content, cut(asked), answer.content) == ("Translate.\nTür", "Tür", "door")
    for row in ({"instruction": "Sing.", "input": "", "output": "la"}, {"instruction": "Sing.", "output": "la"}):
        asked, _ = one(row, "alpaca")
        assert (asked.content, asked.cut) == ("Sing.", None)


def test_conversations_stay_whole() -> None:
    said = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "1+1?"), ("assistant", "2")]
    turns = one({"messages": [{"role": r, "content": c} for r, c in said]}, "messages")
    assert [(turn.role, turn.content) for turn in turns] == said
    assert [cut(turn) for turn in turns] == [None, "Hi", None, "1+1?", None]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    assert turns == one({"conversations": [{"from": names[r], "value": c} for r, c in said]}, "sharegpt")


def test_an_empty_system_turn_says_nothing() -> None:
    said = [{"role": r, "content": c} for r, c in [("system", ""), ("user", "Hi"), ("assistant", "Hello")]]
    assert [turn.role for turn in one({"messages": said}, "messages")] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("right", "also"),
    [
        (None, ()),
        ([], ()),
        (["two", "2 ", "2", "two"], ("two", "2", "two")),  # its own is one of them, once
        (["two"], ("two",)),
    ],
)
def test_a_row_may_have_several_right_answers(right: Any, also: tuple[str, ...]) -> None:
    row = {"prompt": "How many?", "answer": "2", "right_answers": right}
    noticed = Noticed()
    [example] = to_examples([row], "prompt_answer", file="a.json", noticed=noticed)
    assert (example.answer, example.also_right) == ("2", also)
    assert not noticed.unused


def test_right_answers_are_those_to_the_last_question_of_a_conversation() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "How many?"},
            {"from": "gpt", "value": "2"},
            {"from": "human", "value": "And what?"},
            {"from": "gpt", "value": "dogs"},
        ],
        "right_answers": ["dogs", "puppies"],
    }
    first, last = to_examples([row], "sharegpt", file="a.json", each=True)
    assert (first.also_right, last.also_right) == ((), ("puppies",))


def test_text() -> None:
    [example] = to_examples([{"text": " as it is \n"}], "text", file="f")
    assert (example.text, example.turns) == (" as it is \n", ())


def messages(*said: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize(
    ("row", "format", "said"),
    [
        ({"prompt": "p", "answer": " \n"}, "prompt_answer", ["answer: is empty"]),
        ({"prompt": "p"}, "prompt_answer", ["answer: is missing", "'prompt'"]),
        ({"prompt": "p", "answer": None}, "prompt_answer", ["answer: is null"]),
        ({"prompt": [{"role": "user", "content": "a"}]}, "prompt_answer", ["answer: is missing", "'prompt'"]),
        ({"text": "t"}, "messages", ["messages: is missing; found: 'text'"]),
        ({"conversations": None}, "sharegpt", ["conversations: is null"]),
        ({"prompt": "", "answer": "a"}, "prompt_answer", ["prompt: is empty"]),
        ({"prompt": "p", "answer": 7}, "prompt_answer", ["answer: must be text, not a number", "7"]),
        ({"prompt": "p", "answer": True}, "prompt_answer", ["answer: must be text, not true or false"]),
        ({"prompt": ["p"], "answer": "a"}, "prompt_answer", ["prompt: must be text, not a list"]),
        ({"prompt": "p", "answer": "\ud83d"}, "prompt_answer", ["answer: holds half a character", "\\ud83d"]),
        (
            {"sentence": "s", "label": "postive"},
            "sentence_label",
            ["'postive'", "positive, negative", "mean 'positive'"],
        ),
        ({"sentence": "s", "label": "-"}, "sentence_label", ["'-' is not one of the labels (positive, negative)"]),
        ({"instruction": "i", "input": 3, "output": "o"}, "alpaca", ["input: must be text, not a number"]),
        (
            {"prompt": "p", "answer": "a", "right_answers": "a"},
            "prompt_answer",
            ["right_answers: must be a list of all texts that are right, not text ('a')"],
        ),
        (
            {"prompt": "p", "answer": "a", "right_answers": ["a", 3]},
            "prompt_answer",
            ["right_answers: number 2: must be text, not a number (3)"],
        ),
        ({"text": "\n"}, "text", ["text: is empty"]),
        ({"messages": "hi"}, "messages", ["messages: must be a list of turns, not text"]),
        ({"messages": ["hi"]}, "messages", ["messages, turn 1: must be an object with role and content, not text"]),
        ({"messages": []}, "messages", ["must end with an answer (role assistant)"]),
        (messages(("user", "a")), "messages", ["must end with an answer (role assistant)"]),
        (messages(("assistant", "a")), "messages", ["must begin with a question (role user)"]),
        (
            messages(("user", "a"), ("asistant", "b")),
            "messages",
            ["turn 2: unknown role 'asistant'", "mean 'assistant'"],
        ),
        (messages(("user", "a"), ("assistant", None)), "messages", ["turn 2: content: is null"]),
        (messages(("user", "a"), ("assistant", " ")), "messages", ["turn 2: content: is empty"]),
        (messages(("user", "a"), (3, "b")), "messages", ["turn 2: role: must be text"]),
        (
            {"conversations": [{"from": "human", "value": "a"}]},
            "sharegpt",
            ["conversations: must end with an answer (from gpt)"],
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gtp", "value": "b"}]},
            "sharegpt",
            ["turn 2: unknown from 'gtp'", "mean 'gpt'"],
        ),
    ],
)
def test_bad_rows_are_named_with_row_line_and_reason(
    tmp_path: Path, row: dict[str, Any], format: str, said: list[str]
) -> None:
    good = {
        "prompt_answer": {"prompt": "p", "answer": "a"},
        "sentence_label": {"sentence": "s", "label": "positive"},
        "alpaca": {"instruction": "i", "output": "o"},
        "text": {"text": "t"},
        "messages": messages(("user", "a"), ("assistant", "b")),
        "sharegpt": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    }[format]
    path = tmp_path / "train.jsonl"
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(DataError) as error:
        labels = ["positive", "negative"] if format == "sentence_label" else None
        to_examples(read_rows(path), format, file=path, labels=labels)
    assert all(part in str(error.value) for part in [f"{path}: row 2 (line 3): ", *said]), error.value


def test_an_unknown_format_is_refused_with_the_near_name() -> None:
    with pytest.raises(ConfigError, match="'share_gpt'; did you mean 'sharegpt'"):
        to_examples([{}], "share_gpt", file="f")


@pytest.mark.parametrize(
    ("columns", "prompt", "answer"),
    [
        (["Question?", "Answer!"], "Question?", "Answer!"),
        (["$(HOME)", "`ls`"], "$(HOME)", "`ls`"),
        (["it's", 'say "x"\n'], "it's", 'say "x"\n'),
        (["null", "1"], "null", "1"),
        ([" q", "{r}"], " q", "{r}"),
        (["antwort, kurz", "frage"], "frage", "antwort, kurz"),
        (["label", "review"], "review", "label"),
        (["id", "question_text", "answer_text", "category"], "question_text", "answer_text"),
        (["date", "ticket", "queue"], "ticket", "queue"),
    ],
)
def test_the_mapping_that_a_message_shows_is_right_when_it_is_typed(columns: list[str], prompt: str, answer: str):
    row = dict.fromkeys(columns, "some text") | {"": "an empty name", "blank": " "}
    with pytest.raises(DataError) as told:
        detect([row], "a.csv")
    typed = re.search(r" of a task, or (.*) after holdfast learn$", str(told.value), re.DOTALL)
    assert typed is not None
    [argument] = shlex.split(typed[1])
    assert yaml.safe_load(argument.removeprefix("task="))["columns"] == {prompt: "prompt", answer: "answer"}


def test_a_row_that_is_a_turn_is_told_as_one():
    with pytest.raises(DataError, match="a row is a whole conversation, such as messages"):
        detect([{"role": "user", "content": "Hello!"}], "a.jsonl")
