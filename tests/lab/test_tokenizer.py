"""Training a tokenizer: it loses nothing, repeats itself, and has a token for each domain."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer

from holdfast.data.streams.chronicle.stream import general_text
from holdfast.data.tokens.domains import domain_ids
from holdfast.errors import ConfigError, DataError
from holdfast.lab.tokenizer import SMALLEST, train_tokenizer


@pytest.fixture(scope="module")
def texts():
    return general_text(4)[:300]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400, model_max_length=32)


@pytest.mark.parametrize(
    "text",
    [
        "The mayor of Velmora.",
        " two  spaces ",
        "naïve 漢字 🌊\n\ttab",
        "don't [x] .,",
        "</s",
        "Привет, мир!\u2028ё",
        "",
    ],
)
def test_any_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids[1:]


def test_training_is_deterministic_and_keeps_to_its_size(texts, tokenizer):
    again = train_tokenizer(iter(texts), 400, model_max_length=32)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert len(tokenizer) == 400
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_merges_shorten_the_text_they_come_from(texts, tokenizer):
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert tokens < sum(len(text.encode()) for text in texts) / 2


def test_texts_are_taken_as_they_are_needed(texts):
    """Endless texts would never return from a reader that keeps them: few are ahead of the trainer."""
    taken = 0

    def read() -> Iterator[str]:
        nonlocal taken
        for text in itertools.cycle(texts):
            taken += 1
            if taken == 2000:
                raise DataError("row 2000 is bad")
            yield text

    with pytest.raises(DataError, match="row 2000 is bad"):
        train_tokenizer(read(), 400)
    assert taken == 2000


def test_domain_and_reserved_tokens_have_the_first_ids_and_survive_saving(texts, tokenizer, tmp_path):
    made = train_tokenizer(texts, 400, domains=["eng", "spa"], reserved=2)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert domain_ids(loaded) == {"eng": 3, "spa": 4, "reserved_0": 5, "reserved_1": 6}
    assert loaded.convert_ids_to_tokens(list(range(7))) == [
        *("<s>", "</s>", "<pad>", "<|eng|>", "<|spa|>", "<|reserved_0|>", "<|reserved_1|>")
    ]
    assert len(loaded) == 400
    assert loaded("<|spa|>hola", add_special_tokens=False)["input_ids"][0] == 4
    assert (
        loaded.decode([4, *loaded("hola", add_special_tokens=False)["input_ids"]], skip_special_tokens=True) == "hola"
    )
    assert domain_ids(tokenizer) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": SMALLEST - 1}, f"at least {SMALLEST} "),
        ({"vocab_size": SMALLEST + 2, "domains": ["eng"], "reserved": 2}, f"at least {SMALLEST + 3} .*6 special"),
        ({"domains": ["eng", "spa", "eng"]}, "'eng' is given twice"),
        ({"domains": ["reserved_0"], "reserved": 1}, "name of a reserved token"),
        ({"domains": ["old english"]}, "'old english' must be made of letters"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        train_tokenizer(["text"], **{"vocab_size": 400} | options)


def test_the_command_reads_every_kind_of_source(texts, tmp_path, monkeypatch, capsys, cli):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(texts[:100]), encoding="utf-8")
    (tmp_path / "more").mkdir()
    rows = [json.dumps({"text": text}) for text in texts[100:]]
    (tmp_path / "more" / "b.jsonl").write_text("\n".join(rows[:100]), encoding="utf-8")
    (tmp_path / "more" / "c.json").write_text(f"[{','.join(rows[100:])}]", encoding="utf-8")
    command = ("lab", "tokenizer", "a.txt", "more", "--out", "out", "--vocab-size", 400, "--domain", "eng")
    assert cli(*command, "--reserved", 1, "--max-length", 64) == 0
    made = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert cli(*command) == 2, "the second replaces nothing"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == made
    assert capsys.readouterr().out == "out: 400 tokens\n"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = train_tokenizer(texts, 400, domains=["eng"], reserved=1)
    assert loaded.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert loaded.model_max_length == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text.txt", "--vocab-size", 9), "vocab_size must be at least 259"),
        (("tex.txt",), "no file or folder 'tex.txt'.*did you mean 'text.txt'"),
        (("rows.jsonl",), r"rows.jsonl: row 2 \(line 3\): is not valid JSON"),
        (("rows.jsonl", "--column", "txt"), r"rows.jsonl: row 1 \(line 1\): .*no column 'txt'; did you mean 'text'"),
        (("text.txt", "--out", "."), "exists already"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, monkeypatch, capsys, cli, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n\n{"text": \n', encoding="utf-8")
    assert cli("lab", "tokenizer", "--out", "out", *arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()
