"""General samples and self-generated corpora: which texts, which tokens, and what is said about bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from holdfast.errors import ConfigError, DataError
from holdfast.rehearsal.samples import corpus_rows, general_rows, rows_fingerprint
from support.paths import SHARED
from support.tiny import tiny_tokenizer

WORDS = ["alpha", "bravo charlie", "delta", "echo foxtrot golf", "hotel", "india", "juliett", "kilo"]


def with_bos() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def decoded(rows: list[dict[str, Any]]) -> list[str]:
    return [tiny_tokenizer().decode(row["input_ids"]) for row in rows]


def ids(text: str) -> list[int]:
    return tiny_tokenizer()(text)["input_ids"]


# --- general samples ---


def test_rows_hold_the_first_tokens_all_supervised() -> None:
    [row] = general_rows(tiny_tokenizer(), texts=["the first tokens"], max_tokens=9)
    assert row == {"input_ids": ids("the first"), "labels": ids("the first")}
    [whole] = general_rows(tiny_tokenizer(), texts=["the first tokens"])
    assert whole["input_ids"] == ids("the first tokens")


def test_a_beginning_token_counts_and_an_end_token_is_not_made_up() -> None:
    [row] = general_rows(with_bos(), texts=["abcdef"], max_tokens=4)
    assert row == {"input_ids": [1, *ids("abc")], "labels": [-100, *ids("abc")]}


def test_the_tokenizer_stays_as_it_is() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer(["a b c"], truncation=True, max_length=2)
    tokenizer.padding_side = "left"
    before = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length, tokenizer.pad_token_id)
    general_rows(tokenizer, texts=["x" * 1000])
    after = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length, tokenizer.pad_token_id)
    assert after == before
    assert general_rows(tokenizer, texts=["x" * 1000])[0]["input_ids"] == ids("x" * 563)


def test_the_choice_follows_the_seed_and_keeps_the_order() -> None:
    chosen = {tuple(decoded(general_rows(tiny_tokenizer(), texts=WORDS, samples=3, seed=seed))) for seed in range(20)}
    assert len(chosen) > 5
    assert {len(texts) for texts in chosen} == {3}
    assert {word for texts in chosen for word in texts} == set(WORDS)
    for texts in chosen:
        assert sorted(texts, key=WORDS.index) == list(texts)
    again = general_rows(tiny_tokenizer(), texts=iter(WORDS), samples=3, seed=4)
    assert again == general_rows(tiny_tokenizer(), texts=WORDS, samples=3, seed=4)


def test_fewer_texts_than_asked_for_are_all_taken_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "holdfast"):
        rows = general_rows(tiny_tokenizer(), texts=["", *WORDS, " \n", "x"], samples=100, seed=3)
    assert decoded(rows) == WORDS
    assert "8 general samples (100 asked for)" in caplog.text
    assert rows == general_rows(tiny_tokenizer(), texts=WORDS, samples=100, seed=4)


def test_texts_that_are_too_short_do_not_use_up_samples() -> None:
    texts = ["x"] * 50 + ["ab", "cd"] + ["y"] * 50
    assert decoded(general_rows(tiny_tokenizer(), texts=texts, samples=2)) == ["ab", "cd"]
    assert decoded(general_rows(with_bos(), texts=["x", "y"], samples=2)) == ["<s>x", "<s>y"]


def test_files_of_every_kind_give_the_same_rows(tmp_path: Path) -> None:
    expected = general_rows(tiny_tokenizer(), texts=WORDS)
    (tmp_path / "a.txt").write_text("\n".join(["", *WORDS, ""]))
    write_jsonl(tmp_path / "a.jsonl", [{"body": word, "n": 1} for word in WORDS])
    (tmp_path / "a.json").write_text(json.dumps([{"body": word} for word in [*WORDS, "", None]]))
    pyarrow.parquet.write_table(pyarrow.table({"body": WORDS}), tmp_path / "a.parquet")
    for suffix in ("txt", "jsonl", "json", "parquet"):
        assert general_rows(tiny_tokenizer(), path=str(tmp_path / f"a.{suffix}"), column="body") == expected
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "LICENSE").write_text("none of the texts")
    (tmp_path / "folder" / "b.txt").write_text("\r\n".join(WORDS[4:]))
    write_jsonl(tmp_path / "folder" / "a.jsonl", [{"text": word} for word in WORDS[:2]])
    write_jsonl(tmp_path / "folder" / "deep" / "c.jsonl", [{"text": word} for word in WORDS[2:4]])
    found = general_rows(tiny_tokenizer(), path=str(tmp_path / "folder"))
    assert decoded(found) == WORDS[:2] + WORDS[4:] + WORDS[2:4]


def test_rows_of_a_task_give_all_that_they_say(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
    for row in (
        {"prompt": "who?", "answer": "me"},
        {"instruction": "who?", "output": "me"},
        {"messages": turns},
    ):
        write_jsonl(tmp_path / "a.jsonl", [row])
        assert decoded(general_rows(tiny_tokenizer(), path=str(tmp_path / "a.jsonl"))) == ["who?\nme"]
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "who?", "answer": ""}])
    with pytest.raises(DataError, match=r"a\.jsonl: row 1 \(line 1\): answer: is empty"):
        general_rows(tiny_tokenizer(), path=str(tmp_path / "a.jsonl"))


def test_a_line_of_text_ends_at_newlines_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\u2028two\x0cthree\nfour\n", encoding="utf-8")
    assert [len(row["input_ids"]) for row in general_rows(tiny_tokenizer(), path=str(tmp_path / "a.txt"))] == [13, 4]


def test_a_local_dataset_is_streamed_and_read_only_as_far_as_needed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"body": f"text {n}"} for n in range(100)])
    rows = general_rows(tiny_tokenizer(), dataset=str(tmp_path), column="body", samples=2)
    numbers = [int(text.split()[1]) for text in decoded(rows)]
    assert len(numbers) == 2
    assert max(numbers) < 20
    assert decoded(general_rows(tiny_tokenizer(), dataset=str(tmp_path), column="body", samples=100))[99] == "text 99"
    with pytest.raises(DataError, match=r"\[train\]: row 1: column: there is no column 'bdy'; did you mean 'body'"):
        general_rows(tiny_tokenizer(), dataset=str(tmp_path), column="bdy")
    with pytest.raises(DataError, match=r"cannot be read: Bad split: tset"):
        general_rows(tiny_tokenizer(), dataset=str(tmp_path), split="tset")


def test_exactly_one_source_is_given() -> None:
    with pytest.raises(ConfigError, match="give one of path"):
        general_rows(tiny_tokenizer())
    with pytest.raises(ConfigError, match="give one of path"):
        general_rows(tiny_tokenizer(), path="a.txt", texts=["a"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "a.txt: holds no text"),
        ("a.txt", " \n\n", "a.txt: holds no text"),
        ("a.txt", "a\nb\n", "a.txt: each of its 2 texts is shorter than two tokens"),
        ("a.md", "text", "a.md: unknown kind of file '.md'; known: .txt"),
        ("a.jsonl", '{"text": "ab"}\n\n{"txt": "ab"}\n', r"row 2 \(line 3\): column: .* 'text'; did you mean 'txt'"),
        ("a.jsonl", '{"text": 5}\n', r"row 1 \(line 1\): text: must be text, not 5"),
        ("a.jsonl", '{"text": "a\\ud800"}\n', r"row 1 \(line 1\): text: holds half a character"),
        ("a.jsonl", "", "holds no rows"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        general_rows(tiny_tokenizer(), path=str(tmp_path / name))


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file or folder"):
        general_rows(tiny_tokenizer(), path=str(tmp_path / "gone"))
    with pytest.raises(DataError, match="no file in this folder"):
        general_rows(tiny_tokenizer(), path=str(tmp_path))


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="../shared/data is absent")
def test_real_web_text_with_a_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "data/tokenizers/gpt2")
    path = SHARED / "data/general/c4_demo.jsonl"
    rows = general_rows(tokenizer, path=str(path))
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(texts) == 300
    assert max(len(row["input_ids"]) for row in rows) == 563
    for row, text in zip(rows, texts, strict=True):
        assert text.startswith(tokenizer.decode(row["input_ids"]).rstrip("\ufffd"))
    wiki = general_rows(tokenizer, path=str(SHARED / "data/general/wiki_demo.txt"), samples=10)
    assert len(wiki) == 10
    assert 2 <= min(len(row["input_ids"]) for row in wiki) <= max(len(row["input_ids"]) for row in wiki) <= 563


# --- self-generated corpora ---


def test_a_corpus_is_taken_whole(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "c.jsonl",
        [{"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"text": "x" * 600}],
    )
    rows = corpus_rows(path, with_bos())
    assert rows[0] == {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    assert rows[1] == {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    assert rows[2] == {"input_ids": [1, *ids("x" * 600)], "labels": [-100, *ids("x" * 600)]}
    with pytest.raises(ConfigError, match="a tokenizer is needed"):
        corpus_rows(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, "2"]}, r"row 2 \(line 2\): input_ids: must be a list of token numbers"),
        ({"input_ids": [1, -100]}, "input_ids: must be a list of token numbers"),
        ({"input_ids": "12"}, "input_ids: must be a list of token numbers"),
        ({"input_ids": [1, 2], "labels": [1, -5]}, "labels: must be a list of token numbers"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: has 1 entries, but input_ids 2"),
        ({"input_ids": [1]}, "nothing to predict"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "nothing to predict"),
        ({"text": ""}, "nothing to predict"),
        ({"ids": [1, 2]}, "must have input_ids .* its keys: 'ids'"),
    ],
)
def test_bad_rows_of_a_corpus_are_refused_with_the_place(tmp_path: Path, row: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"input_ids": [1, 2]}, row])
    with pytest.raises(DataError, match=message) as error:
        corpus_rows(path, tiny_tokenizer())
    assert "row 2 (line 2)" in str(error.value)


def test_a_corpus_that_is_absent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        corpus_rows(tmp_path / "gone.jsonl")


# --- fingerprint ---


def test_a_sample_beyond_the_context_is_not_the_models_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "own.jsonl", [{"text": "short"}, {"text": "rather long"}])
    assert len(corpus_rows(path, tiny_tokenizer(), context=11)) == 2
    with pytest.raises(DataError, match=r"own.jsonl: row 2.*has 11 tokens, more than the model's context of 10"):
        corpus_rows(path, tiny_tokenizer(), context=10)


def test_the_fingerprint_tells_rows_apart() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    variants = [
        rows,
        rows[::-1],
        rows[:1],
        [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5], "labels": [3, 4, 5]}],
        [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, rows[1]],
        [{"input_ids": [1, 2, 9], "labels": [1, 2, 3]}, rows[1]],
    ]
    assert len({rows_fingerprint(variant) for variant in variants}) == len(variants)
    assert rows_fingerprint([dict(row, row=7) for row in rows]) == rows_fingerprint(rows)
