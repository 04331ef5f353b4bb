"""What a user gives: every kind of file, folders with and without splits, datasets; and the metric that fits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from holdfast.api.task import Example, Turn
from holdfast.config.stream import DataConfig, TaskConfig
from holdfast.data.fitting import asks_nothing, fitting
from holdfast.data.formats import to_examples
from holdfast.data.given import Given, files_fingerprint, given_files, given_name, read_given
from holdfast.data.layout import split_files
from holdfast.errors import ConfigError, DataError

ROWS = [{"question": f"what is {i}?", "response": f"it is {i}", "customer": f"c{i}"} for i in range(6)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    match "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix:
        case ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".csv.gz":
            lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def read(data: Path | str, **options: Any) -> Given:
    return read_given(str(data), TaskConfig(name="month", path=str(data), **options), DataConfig())


@pytest.mark.parametrize("name", ["rows.json", "Rows.JSONL.jsonl", "rows.csv.gz", "rows.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str):
    """With the columns that its format reads alone, so that nothing else of a customer is kept."""
    [rows] = read(write(tmp_path / name, ROWS)).rows.values()
    [expected] = read(write(tmp_path / "expected" / "rows.json", ROWS)).rows.values()
    assert [row.values for row in rows] == [{"prompt": r["question"], "answer": r["response"]} for r in ROWS]
    assert [(row.id, row.prompt) for row in rows] == [(row.id, row.prompt) for row in expected]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["a.jsonl", "b.json"], {"all": 12}),
        (["part/a.jsonl", "part/more/b.parquet"], {"all": 12}),
        (["train.jsonl", "train-2.json", "test.csv.gz"], {"train": 12, "test": 6}),
        (["train/1.jsonl", "train/2.jsonl", "validation/1.jsonl"], {"train": 12, "eval": 6}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": 12}),
        (["train.jsonl", ".hidden.jsonl", ".old/rows.jsonl", "README.md", "licence.txt"], {"train": 6}),
    ],
)
def test_a_folder_has_splits_where_names_say_so(tmp_path: Path, files: list[str], splits: dict[str, int]):
    for number, name in enumerate(files):
        write(tmp_path / name, [row | {"response": f"{row['response']} of {number}"} for row in ROWS])
    assert {split: len(rows) for split, rows in read(tmp_path).rows.items()} == splits


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train.jsonl", "more.jsonl"], r"more\.jsonl has no split's name, as train\.jsonl has.*train-more\.jsonl"),
        (["january.jsonl", "sub/train.jsonl"], r"january\.jsonl has no split's name, as sub/train\.jsonl has"),
        (["train.jsonl", "training_notes.csv.gz"], r"training_notes\.csv\.gz has no split's name"),
        (["a.json", "b.json", "test.json"], r"a\.json, b\.json have no split's name, as test\.json has"),
    ],
)
def test_a_data_file_without_a_split_beside_others_that_have_one_is_refused(tmp_path, files: list[str], told: str):
    for name in files:
        write(tmp_path / name, ROWS)
    with pytest.raises(DataError, match=told):
        given_files(str(tmp_path))


def test_a_mapping_of_columns_that_was_given_with_earlier_data_is_for_data_that_it_fits(tmp_path: Path):
    german = [{"Frage": row["question"], "Antwort": row["response"]} for row in ROWS]
    settings, mapping = DataConfig(), {"Frage": "prompt", "Antwort": "answer"}
    ids = []
    for number, rows in enumerate((ROWS, german)):
        file = write(tmp_path / f"{number}.jsonl", rows)
        given = read_given(str(file), TaskConfig(name="m", path=str(file), columns=mapping), settings, inherited=True)
        ids.append([row.id for row in given.rows["all"]])
        assert any("mapping of an earlier call (Frage: prompt, Antwort: answer)" in s for s in given.notes) != number
    assert ids[0] == ids[1]
    with pytest.raises(DataError, match=r"0\.jsonl: .*columns: there is no column 'Frage'.*known: customer"):
        read(tmp_path / "0.jsonl", columns=mapping)
    other = write(tmp_path / "other.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(DataError, match=r"(?s)no column 'Frage'.*earlier call \(learn\.json\).*'q', 'a' are no known"):
        read_given(str(other), TaskConfig(name="m", path=str(other), columns=mapping), settings, inherited=True)


def test_sentences_of_which_nothing_is_asked_are_told_with_where_an_instruction_would_lie(tmp_path: Path):
    write(tmp_path / "rows.jsonl", [{"sentence": f"s{i}", "label": "good"} for i in range(6)])
    [note] = read(tmp_path).notes
    assert "nothing tells the model what is asked" in note and str(tmp_path / "instruction.txt") in note
    assert not read(tmp_path, instruction="Is it good?").notes


def test_reasoning_that_is_not_trained_is_none_of_a_row(tmp_path: Path):
    answer = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
    rows = [{"messages": [{"role": "user", "content": f"2+2, {i}?"}, answer]} for i in range(4)]
    file = write(tmp_path / "rows.jsonl", rows)
    kept, dropped = (
        read_given(str(file), TaskConfig(name="m", path=str(file)), DataConfig(reasoning=way)).rows["all"]
        for way in ("template", "drop")
    )
    assert [row.example.turns[-1].reasoning for row in (kept[0], dropped[0])] == ["two and two", None]
    assert [row.id for row in kept] == [row.id for row in dropped]


def test_test_rows_alone_are_refused(tmp_path: Path):
    write(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(DataError, match="has test rows, but no train split"):
        read(tmp_path)


def test_sentences_take_labels_and_instruction_from_beside_them_or_from_the_rows(tmp_path: Path):
    rows = [{"sentence": f"s{i}", "label": "good" if i % 2 else "bad"} for i in range(6)]
    write(tmp_path / "rows.jsonl", rows)
    assert read(tmp_path / "rows.jsonl").options.labels == ["bad", "good"]
    (tmp_path / "labels.json").write_text('["good", "bad", "none"]', encoding="utf-8")
    (tmp_path / "instruction.txt").write_text("Is it good?\n", encoding="utf-8")
    options = read(tmp_path).options
    assert (options.labels, options.instruction) == (["good", "bad", "none"], "Is it good?")


def test_a_saved_dataset_of_hugging_face_is_read(tmp_path: Path):
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    given = read_given(str(tmp_path / "saved"), TaskConfig(name="m", dataset=str(tmp_path / "saved")), DataConfig())
    assert {split: len(rows) for split, rows in given.rows.items()} == {"all": 6}
    assert given_files(str(tmp_path / "saved")) is None


def test_names_follow_the_data(tmp_path: Path):
    write(tmp_path / "Tickets-2026-01.csv.gz", ROWS)
    assert given_name(str(tmp_path / "Tickets-2026-01.csv.gz")) == "Tickets-2026-01"
    assert given_name(str(tmp_path)) == tmp_path.name
    assert given_name("owner/tickets") == "tickets"


def test_a_fingerprint_is_of_content_whatever_files_are_called(tmp_path: Path):
    one, other = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS)
    assert files_fingerprint([one]) == files_fingerprint([other])
    write(other, ROWS[1:])
    assert files_fingerprint([one]) != files_fingerprint([other])


def test_a_path_that_is_not_there_is_told_with_a_near_name(tmp_path: Path):
    write(tmp_path / "tickets.jsonl", ROWS)
    with pytest.raises(ConfigError, match=r"DATA: .*did you mean 'tickets.jsonl'"):
        given_files(str(tmp_path / "ticket.jsonl"))


def test_a_link_to_nothing_is_no_file_that_may_be_passed_over(tmp_path: Path):
    write(tmp_path / "month" / "train.jsonl", ROWS)
    (tmp_path / "month" / "test.jsonl").symlink_to("gone")
    with pytest.raises(DataError, match=r"test\.jsonl: is a link to nothing"):
        given_files(str(tmp_path / "month"))
    with pytest.raises(DataError, match=r"test\.jsonl: is a link to nothing"):
        split_files(tmp_path / "month", "test")
    with pytest.raises(ConfigError, match=r"DATA: '.*test\.jsonl' is a link to nothing"):
        given_files(str(tmp_path / "month" / "test.jsonl"))


def test_an_answer_beside_the_given_labels_is_told_with_its_own_row(tmp_path: Path):
    write(tmp_path / "rows.jsonl", [{"prompt": "a", "answer": "yes"}, {"prompt": "b", "answer": "nein"}])
    with pytest.raises(DataError, match=r"^\S*rows\.jsonl: row 2 .*'nein' is not one of the labels"):
        read(tmp_path / "rows.jsonl", labels=["yes", "no"])


def test_bad_rows_are_all_told(tmp_path: Path):
    write(tmp_path / "rows.jsonl", [*ROWS, {"question": "", "response": "x"}, {"question": "x", "response": ""}])
    with pytest.raises(DataError, match=r"(?s)2 rows cannot be used.*row 7.*row 8"):
        read(tmp_path / "rows.jsonl")


def examples(answers: list[str]) -> list[Example]:
    return [Example("f", i, turns=(Turn("user", f"q{i}"), Turn("assistant", a))) for i, a in enumerate(answers)]


@pytest.mark.parametrize(
    ("answers", "metric", "beside", "labels"),
    [
        (["yes", "no"] * 6, "accuracy", [], ["no", "yes"]),
        (["yes", "no"], "loss", ["rouge_l", "accuracy"], None),
        ([f"the answer is {i}" for i in range(9)], "loss", ["rouge_l", "accuracy"], None),
        ([f"{'a long answer ' * 9}{i}" for i in range(9)], "loss", ["rouge_l"], None),
        (["the same long answer, word by word, in each of all these rows here"] * 9, "loss", ["rouge_l"], None),
    ],
    ids=["closed", "too few rows", "short", "long", "few but long"],
)
def test_the_metric_follows_the_answers(answers: list[str], metric: str, beside: list[str], labels: list[str] | None):
    fit = fitting(examples(answers))
    assert (fit.metric, fit.beside, fit.labels) == (metric, beside, labels)
    assert fitting(examples(answers), metric="macro_f1").metric == "macro_f1"


def test_texts_are_scored_by_their_loss():
    assert fitting([Example("f", 0, text="a text")]).metric == "loss"


@pytest.mark.parametrize(
    ("prompt", "nothing"),
    [
        ("{}", True),
        ("Name the queue of this ticket: {}", False),
        ("{}\n\nWhich queue is that for?", False),
        ("Re: {}", True),
    ],
)
def test_what_prompts_have_in_common_says_what_is_asked(prompt: str, nothing: bool):
    texts = ("my card is lost", "a new chair", "who pays for this", "the remote control does nothing")
    rows = [{"prompt": prompt.format(text), "answer": "queue"} for text in texts]
    assert asks_nothing(to_examples(rows, "prompt_answer", file="a.jsonl")) == nothing
