"""Where a task's rows lie and what their columns are called, in the ways of other tools; and what is said of them."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from holdfast.api.task import Stream, Turn
from holdfast.config.stream import DataConfig, StreamConfig
from holdfast.data.load import load_stream
from holdfast.errors import DataError
from support.command import holdfast as command
from support.tiny import tiny_config

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "go away"}]
ROWS = [{"prompt": f"What is {n}?", "answer": f"It is {n}."} for n in range(20)]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def task(folder: Path, train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text(lines(train))
    (folder / "test.jsonl").write_text(lines(test or train))
    return folder


def load(path: Path, output: Path | None = None, **options: Any) -> Stream:
    data = {key: options.pop(key) for key in list(options) if key in DataConfig.model_fields}
    return load_stream(StreamConfig(path=str(path), **options), DataConfig(**data), output=output)


def said(stream: Stream) -> str:
    return "\n".join(stream.tasks[0].notes)


@pytest.mark.parametrize("name", ["{}.JSONL", "{}.ndjson", "{}.jsonl.gz", "{}.jsonl.zst", "{}-00000-of-00001.jsonl"])
def test_names_of_files(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "tasks" / "numbers"
    folder.mkdir(parents=True)
    for split in ("train", "test", "val"):
        path, content = folder / name.format(split), lines(ROWS).encode()
        if path.suffix == ".gz":
            content = gzip.compress(content)
        if path.suffix == ".zst":
            content = pyarrow.compress(content, codec="zstd", asbytes=True)
        path.write_bytes(content)
    [found] = load(tmp_path / "tasks").tasks
    assert (found.name, len(found.train), len(found.test), len(found.eval)) == ("numbers", 20, 20, 20)


def test_shards_lie_in_the_folder_data_and_none_may_be_missing(tmp_path: Path) -> None:
    folder = tmp_path / "tasks" / "numbers" / "data"
    folder.mkdir(parents=True)
    for number in (1, 0):
        (folder / f"train-{number:05d}-of-00002.jsonl").write_text(lines(ROWS[number::2]))
    (folder / "test-00000-of-00001.jsonl").write_text(lines(ROWS[:3]))
    stream = load(tmp_path / "tasks")
    assert [found.name for found in stream.tasks] == ["numbers"]
    assert [example.answer for example in stream.tasks[0].train] == [row["answer"] for row in ROWS[0::2] + ROWS[1::2]]
    assert stream.tasks[0].train[10].file.endswith("train-00001-of-00002.jsonl") and stream.tasks[0].train[10].row == 0
    assert len(load(tmp_path / "tasks", train_rows=12).tasks[0].train) == 12
    (folder / "train-00001-of-00002.jsonl").unlink()
    with pytest.raises(DataError, match="of the 2 shards of train 00001 are missing"):
        load(tmp_path / "tasks")


def test_one_file_is_a_task_whose_test_split_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "numbers.jsonl"
    path.write_text(lines(ROWS))
    [found] = load(path).tasks
    assert found.name == "numbers" and len(found.train) + len(found.test) == 20 and 1 <= len(found.test) <= 5
    assert f"one file: {len(found.test)} of its 20 rows" in "\n".join(found.notes)
    asked = {example.question for example in found.test}
    path.write_text(lines([{"prompt": "New?", "answer": "new"}, *ROWS[::-1], *ROWS]))
    grown = load(path).tasks[0]
    assert asked <= {example.question for example in grown.test}
    assert not {example.question for example in grown.test} & {example.question for example in grown.train}
    assert len(load(path, hold_out=0.5).tasks[0].test) > len(grown.test)
    (tmp_path / "tasks" / "one").mkdir(parents=True)
    (tmp_path / "tasks" / "one" / "rows.jsonl").write_text(lines(ROWS))
    assert [found.name for found in load(tmp_path / "tasks").tasks] == ["one"]
    path.write_text(lines(ROWS[:1]))
    with pytest.raises(DataError, match="1 rows are too few to draw a test split from"):
        load(path)


def test_a_folder_of_splits_is_a_task_itself(tmp_path: Path) -> None:
    assert [found.name for found in load(task(tmp_path / "numbers", ROWS)).tasks] == ["numbers"]


@pytest.mark.parametrize(
    "names",
    [
        ("prompt", "completion"),
        ("prompt", "response"),
        ("question", "answer"),
        ("query", "response"),
        ("input", "output"),
    ],
)
def test_names_of_columns(tmp_path: Path, names: tuple[str, str]) -> None:
    question, answer = names
    stream = load(task(tmp_path / "t", [{question: "Who?", answer: "me", "id": 3}]))
    assert stream.tasks[0].train[0].turns == (Turn("user", "Who?", (0, 4)), Turn("assistant", "me"))
    assert "columns that are not used: id" in said(stream) and (
        question == "prompt" or f"{question}: prompt" in said(stream)
    )


def test_prompts_and_completions_of_turns(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Who?"}], "completion": [{"role": "assistant", "content": "me"}]}
    [found] = load(task(tmp_path / "t", [row])).tasks
    assert [(turn.role, turn.content) for turn in found.train[0].turns] == [("user", "Who?"), ("assistant", "me")]


def test_columns_of_a_path_are_renamed_or_left_out(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", [{"frage": "Who?", "antwort": "me", "label": True}])
    columns = {"frage": "prompt", "antwort": "answer"}
    with pytest.raises(DataError, match=r"there is no column 'fragen'; did you mean 'frage'"):
        load(folder, columns={"fragen": "prompt"})
    assert load(folder, columns=columns | {"label": None}).tasks[0].train[0].answer == "me"


def test_what_a_row_says_besides_is_used(tmp_path: Path) -> None:
    row = {
        "instruction": "And the dog?",
        "input": "",
        "output": "woof",
        "history": [["The cat?", "meow"]],
        "system": "Mimic.",
    }
    [found] = load(task(tmp_path / "t", [row])).tasks
    assert [(turn.role, turn.content) for turn in found.train[0].turns] == [
        ("system", "Mimic."),
        ("user", "The cat?"),
        ("assistant", "meow"),
        ("user", "And the dog?"),
        ("assistant", "woof"),
    ]


@pytest.mark.parametrize(
    ("row", "chosen", "answer"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "answer", "b"),
        ({"system": "s", "question": "a", "chosen": "b", "rejected": "c"}, "answer", "b"),
        ({"instruction": "a", "input": "", "chosen": "b", "rejected": "c"}, "output", "b"),
        ({"query": "a", "chosen": "b", "rejected": "c"}, "response", "b"),
        ({"input": "a", "chosen": "b", "rejected": "c"}, "output", "b"),
        ({"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[1:]}, "answer", "go away"),
        ({"prompt": "hi", "chosen": TALK, "rejected": TALK}, "messages", "go away"),
        ({"chosen": "all of it", "rejected": "c"}, "text", None),
    ],
)
def test_chosen_answers_are_trained_with_the_columns_that_the_message_gives(
    tmp_path: Path, row: dict[str, Any], chosen: str, answer: str | None
) -> None:
    folder = task(tmp_path / "t", [row])
    with pytest.raises(DataError, match=f"columns: {{chosen: {chosen}, rejected: null}} trains the chosen ones"):
        load(folder)
    [example] = load(folder, columns={"chosen": chosen, "rejected": None}).tasks[0].train
    assert example.text == "all of it" if answer is None else example.answer == answer


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TALK, "label": 0}, "label: 0 may say how good the answer is"),
        ({"messages": TALK, "kto_tag": 1.0}, "kto_tag: 1.0 may say how good"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen and rejected are preference pairs"),
        ({"prompt": "a", "answer": "b", "rejected": "c"}, "rejected: belongs to preference pairs"),
        ({"text": "dull film", "label": "neg"}, "looks like classification; columns: {text: sentence} asks"),
        ({"text": "dull film", "label": 0}, "columns: {text: sentence} with labels: [NAME OF 0, NAME OF 1, ...] asks"),
        ({"messages": TALK, "weight": 0}, "weight: rows are not weighted"),
        ({"messages": TALK, "images": ["a.png"]}, "images: 'a.png' cannot be read: No such file"),
        ({"messages": [{"role": "system", "content": "s"}, *TALK], "system": "t"}, "system: stands beside"),
        ({"prompt": "a", "answer": "b", "history": ["c"]}, "history: must be a list of pairs"),
    ],
)
def test_columns_that_change_what_a_row_means_are_refused(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as error:
        load(task(tmp_path / "t", [row]))
    assert reason in str(error.value) and "row 1" in str(error.value)


def test_answers_that_are_labelled_bad_are_left_out(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "label": False}, {"prompt": "a", "messages": TALK, "label": True}]
    stream = load(task(tmp_path / "t", rows))
    assert [example.row for example in stream.tasks[0].train] == [1]
    assert stream.tasks[0].notes == [
        "columns that are not used: prompt",
        "2 rows are left out, as their label says that the answer is bad",
    ]

    with pytest.raises(DataError, match="no row of the train split is left: 2 rows are left out, as their label"):
        load(task(tmp_path / "u", rows[:1]))


def test_texts_with_labels_can_be_trained_as_texts(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", [{"text": "dull film", "label": "neg"}])
    config = StreamConfig.model_validate({"tasks": [{"name": "t", "path": str(folder), "format": "text"}]})
    assert load_stream(config, DataConfig()).tasks[0].train[0].text == "dull film"


def test_a_sentence_that_is_asked_nothing_is_said(tmp_path: Path) -> None:
    folder = task(tmp_path / "tasks" / "SC" / "films", [{"sentence": "dull", "label": "bad"}])
    (folder / "labels.json").write_text('["bad", "good"]')
    note = said(load(tmp_path / "tasks"))
    assert "nothing tells the model what is asked" in note
    assert str(folder / "instruction.txt") in note and "group 'SC' of" in note
    (folder / "instruction.txt").write_text("Is it good?")
    assert not said(load(tmp_path / "tasks"))


def labelled(path: Path, labels: list[str] | None = None, **data: Any) -> list[str]:
    entry = {"name": "t", "path": str(path), "columns": {"text": "sentence"}, "labels": labels}
    stream = load_stream(StreamConfig.model_validate({"tasks": [entry]}), DataConfig(**data))
    return [example.answer for example in stream.tasks[0].train]


@pytest.mark.parametrize(
    ("labels", "numbers", "named"),
    [
        (["red", "blue", "green"], [0, 2, 1], ["red", "green", "blue"]),
        (["red", "blue"], ["1", "red", 0], ["blue", "red", "red"]),
        (["1", "2", "3"], [1, 3, "2"], ["1", "3", "2"]),
    ],
)
def test_a_label_that_is_a_number_is_an_index_of_the_labels_or_the_name_of_one(
    tmp_path: Path, labels: list[str], numbers: list[Any], named: list[str]
) -> None:
    folder = task(tmp_path / "t", [{"text": f"s{label}", "label": label} for label in numbers])
    assert labelled(folder, labels) == named
    (folder / "labels.json").write_text(json.dumps(labels))
    assert labelled(folder) == named


def test_numbers_without_names_and_numbers_beyond_the_labels_are_refused(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", [{"text": f"s{label}", "label": label} for label in (0, 3, 1, -1)])
    with pytest.raises(
        DataError, match=r"row 1 \(line 1\): label: is a number \(0\) .*labels: \[NAME OF 0, NAME OF 1, "
    ):
        labelled(folder)
    with pytest.raises(DataError) as error:
        labelled(folder, ["red", "blue"])
    assert "row 2 (line 2): label: 3 is none of the 2 labels (red, blue); it must be an index from 0 to 1" in str(
        error.value
    )
    assert "row 4 (line 4): label: -1 is none of" in str(error.value)
    assert labelled(folder, ["red", "blue"], on_bad_row="skip") == ["red", "blue"]
    with pytest.raises(DataError, match=r"row 1 .*label: 0 is none of the 2 labels \(1, 2\); it must be one of them"):
        labelled(folder, ["1", "2"])


def test_a_single_file_is_told_where_its_labels_belong(tmp_path: Path) -> None:
    path = tmp_path / "films.jsonl"
    path.write_text(lines([{"text": f"s{n}", "label": "bad"} for n in range(20)]))
    with pytest.raises(DataError, match=r"labels: are missing; .*for example labels: \[good, bad\]"):
        labelled(path)
    assert set(labelled(path, ["good", "bad"])) == {"bad"}


def test_a_label_that_is_false_is_no_verdict_on_the_row(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", [{"text": "s", "label": False}])
    with pytest.raises(DataError, match=r"row 1 .*label: must be text, not true or false"):
        labelled(folder, ["good", "bad"])


def test_bad_rows_are_told_in_the_order_of_the_file(tmp_path: Path) -> None:
    folder = task(tmp_path / "t", ROWS)
    (folder / "train.jsonl").write_text(
        '{"prompt": "a", "answer": null}\n{broken\n{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": 3}\n[1]\n'
    )
    with pytest.raises(DataError) as error:
        load(folder)
    assert [re.search(r"row \d", told)[0] for told in str(error.value).splitlines()[1:]] == [  # type: ignore[index]
        "row 1",
        "row 2",
        "row 4",
        "row 5",
    ]


def test_a_column_without_a_name_is_seen_among_those_that_are_not_used(tmp_path: Path) -> None:
    stream = load(task(tmp_path / "t", [row | {"": 1, "Created At": 2} for row in ROWS]))
    assert said(stream) == "columns that are not used: '', Created At"


def test_all_bad_rows_are_told_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"prompt": f"p{n}", "answer": " "} for n in range(30)]
    folder = task(tmp_path / "t", ROWS[:5] + bad + ROWS[5:], ROWS)
    with (folder / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError) as error:
        load(folder, output=tmp_path / "run")
    told = str(error.value)
    assert (
        told.startswith("31 rows cannot be used")
        and told.count("\n") == 21
        and "row 6 (line 6): answer: is empty" in told
    )
    every = Path(told.rpartition(" ")[2]).read_text().splitlines()
    assert len(every) == 31 and any("row 51 (line 51): is not valid JSON" in line for line in every)
    with caplog.at_level(logging.WARNING, "holdfast"):
        [found] = load(folder, on_bad_row="skip").tasks
    assert [example.row for example in found.train] == [*range(5), *range(35, 50)]
    assert "31 rows cannot be used and are left out" in caplog.text
    (folder / "train.jsonl").write_text(lines(bad))
    with pytest.raises(DataError, match="no row of a split can be used"):
        load(folder, on_bad_row="skip")


def test_check_names_columns_that_are_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path)
    folder = task(tmp_path / "t", [row | {"source": "a book"} for row in ROWS])
    config["stream"] = {"path": str(folder)}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert command("check", tmp_path / "run.yaml") == 0
    assert "columns that are not used: source" in "".join(capsys.readouterr())
