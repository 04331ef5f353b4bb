"""Token files: the tokens are the texts', whatever happens while they are built, and bad files are refused."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from holdfast.data.tokens import build
from holdfast.data.tokens.domains import domain_ids
from holdfast.data.tokens.encode import Encoder, encode
from holdfast.data.tokens.file import TokenFile, build_tokens
from holdfast.errors import ConfigError, DataError, Interrupted, RunDirectoryError
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.models.pretrained import tokenizer_fingerprint
from holdfast.system import files
from support.lab_runs import language
from support.paths import DOCS

TEXTS = language("north", 24, 5)
JAPANESE = ["".join(chr(0x3041 + (7 * i * j) % 80) for j in range(30)) for i in range(1, 9)]
CYRILLIC = [" ".join(chr(0x430 + (i * j) % 32) * (j % 4 + 1) for j in range(12)) for i in range(1, 9)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 270, domains=["eng", "spa"], reserved=1)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(build, "PART", 200)


@pytest.fixture
def file(tokenizer, source, tmp_path):
    return build_tokens([source], tmp_path / "file", tokenizer, domain="eng")


def tokens(folder: Path) -> list[int]:
    dtype = {"uint16": "<u2", "uint32": "<u4"}[json.loads((folder / "manifest.json").read_text())["dtype"]]
    return np.fromfile(folder / "tokens.bin", dtype).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_rows(path: Path, texts: list[str], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


# --- the tokens ---


def test_the_tokens_are_those_of_one_text_after_another(tokenizer, file, tmp_path):
    expected = []
    for text in TEXTS:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokens(file.folder) == expected
    assert len(file) == len(expected)
    manifest = file.manifest
    assert (manifest["documents"], manifest["empty"], manifest["max_id"]) == (len(TEXTS), 0, max(expected))
    assert manifest["domain"] == {"name": "eng", "token": "<|eng|>", "id": 3}
    assert manifest["tokenizer"] == tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(file.tokenizer())
    assert {path.name for path in file.folder.iterdir()} == {"tokens.bin", "tokenizer", "manifest.json", ".lock"}


def test_without_a_domain_every_document_begins_as_the_tokenizer_has_it(tokenizer, source, tmp_path):
    file = build_tokens([source], tmp_path / "file", tokenizer)
    expected = [id for text in TEXTS for id in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    assert expected[0] == tokenizer.bos_token_id
    assert tokens(file.folder) == expected
    assert file.domain_id is None
    row = file.rows(16)[0]
    assert row["input_ids"] == row["labels"] == expected[:16]


@pytest.mark.parametrize("texts", [JAPANESE, CYRILLIC])
def test_other_scripts_come_back_as_they_were(tokenizer, tmp_path, texts):
    file = build_tokens([write_rows(tmp_path / "a.jsonl", texts)], tmp_path / "file", tokenizer, domain="eng")
    assert tokenizer.decode(tokens(file.folder)).split("</s>") == [*texts, ""]


def test_a_special_token_written_in_a_document_stays_text(tokenizer, tmp_path):
    texts = ["say <|eng|> and </s>, <s>, <pad> or <|reserved_0|>", "<|spa|>"]
    file = build_tokens([write_rows(tmp_path / "a.jsonl", texts)], tmp_path / "file", tokenizer, domain="spa")
    ids = tokens(file.folder)
    special = set(domain_ids(tokenizer).values()) | {tokenizer.bos_token_id, tokenizer.pad_token_id}
    assert special.isdisjoint(ids)
    assert ids.count(tokenizer.eos_token_id) == len(texts)
    assert tokenizer.decode(ids) == "".join(text + "</s>" for text in texts)
    assert tokenizer("<|spa|>")["input_ids"][1] == file.domain_id  # the tokenizer itself is as it was


def test_documents_without_text_are_passed_over_and_counted(tokenizer, tmp_path):
    texts = ["", "one", " \t", "two", "\u3000", "three", ""]
    path = write_rows(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text() + '{"text": null}\n')
    file = build_tokens([path], tmp_path / "file", tokenizer, domain="eng")
    assert tokenizer.decode(tokens(file.folder)) == "one</s>two</s>three</s>"
    assert (file.manifest["documents"], file.manifest["empty"]) == (3, 5)


def test_skip_and_documents_part_a_source_into_held_out_and_train(tokenizer, source, tmp_path, small_parts):
    source.write_text("\n\n".join(TEXTS), encoding="utf-8")  # every second document has no text
    whole = build_tokens([source], tmp_path / "whole", tokenizer, domain="eng")
    held_out = build_tokens([source], tmp_path / "held_out", tokenizer, domain="eng", documents=7)
    train = build_tokens([source], tmp_path / "train", tokenizer, domain="eng", skip=7)
    assert (held_out.manifest["documents"], train.manifest["documents"]) == (7, len(TEXTS) - 7)
    assert tokens(held_out.folder) + tokens(train.folder) == tokens(whole.folder)


def test_more_than_65536_ids_take_four_bytes_each(tmp_path):
    for size, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        words = {f"w{i}": i for i in range(size - 2)} | {"</s>": size - 2, "<unk>": size - 1}
        backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
        path = write_rows(tmp_path / "a.jsonl", ["w7 w65533 unknown", f"w{size - 3}"])
        file = build_tokens([path], tmp_path / dtype, tokenizer)
        assert file.manifest["dtype"] == dtype and file.vocab_size == size
        assert tokens(file.folder) == [7, 65533, size - 1, size - 2, size - 3, size - 2]
        assert file.rows(6).batch([0]).tolist() == [tokens(file.folder)]


def test_every_kind_of_source_gives_the_same_tokens(tokenizer, source, file, tmp_path):
    third = len(TEXTS) // 3
    folder = tmp_path / "folder"
    folder.mkdir()
    write_rows(folder / "1.jsonl", TEXTS[:third])
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[third:-third]}), folder / "2.parquet")
    (folder / "3.txt").write_text("\r\n".join(TEXTS[-third:]), encoding="utf-8")
    write_rows(tmp_path / "dataset.jsonl", TEXTS, "body")
    dataset = tmp_path / "dataset"
    dataset.mkdir()
    (tmp_path / "dataset.jsonl").rename(dataset / "test.jsonl")
    made = {
        "folder": build_tokens([folder], tmp_path / "of-folder", tokenizer, domain="eng"),
        "files": build_tokens(sorted(folder.iterdir()), tmp_path / "of-files", tokenizer, domain="eng"),
        "dataset": build_tokens(
            [dataset], tmp_path / "of-dataset", tokenizer, domain="eng", split="test", column="body"
        ),
    }
    for name, other in made.items():
        assert tokens(other.folder) == tokens(file.folder), name
    assert made["files"].manifest["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


# --- several processes, and builds that were killed ---


def test_a_source_of_the_same_size_with_other_words_is_not_taken_for_the_old_one(tokenizer, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    first = build_tokens([path], tmp_path / "out", tokenizer).manifest
    assert build_tokens([path], tmp_path / "out", tokenizer).manifest == first
    write_rows(tmp_path / "a.jsonl", list(reversed(TEXTS)))
    with pytest.raises(ConfigError, match="sources_sha256"):
        build_tokens([path], tmp_path / "out", tokenizer)


def test_the_bytes_do_not_depend_on_the_number_of_processes(tokenizer, source, tmp_path, small_parts):
    told: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
    for processes, calls in told.items():
        build_tokens(
            [source],
            tmp_path / str(processes),
            tokenizer,
            domain="eng",
            processes=processes,
            on_progress=lambda documents, count, calls=calls: calls.append((documents, count)),
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert told[1] == told[2] and len(told[1]) > 5
    assert told[1][-1] == (len(TEXTS), len(TokenFile.open(tmp_path / "1")))


class Killed(BaseException):
    """Stands for SIGKILL."""


def kill_at(monkeypatch, number: int) -> list[str]:
    """Die at the given write to the disk, half-way where bytes are appended; returns the names of the writes."""
    seen: list[str] = []

    def mortal(owner: Any, name: str, half: Any) -> None:
        original = getattr(owner, name)

        def write(path: Path, *arguments: Any, **options: Any) -> Any:
            seen.append(f"{name} {path.name}")
            if len(seen) == number:
                if half is not None:
                    original(path, *half(*arguments))
                raise Killed
            return original(path, *arguments, **options)

        monkeypatch.setattr(owner, name, write)

    for owner in (build, files):
        mortal(owner, "append_bytes", lambda content: (content[: len(content) // 2],))
    mortal(build, "whole_folder", None)
    mortal(build, "write_jsonl", None)
    mortal(build, "write_json", None)
    mortal(Path, "unlink", None)
    mortal(os, "truncate", None)
    return seen


def test_a_build_that_is_killed_at_any_write_ends_like_an_unbroken_one(
    tokenizer, source, tmp_path, small_parts, monkeypatch
):
    options = {"domain": "eng", "skip": 1, "documents": len(TEXTS) - 3}
    unbroken = build_tokens([source], tmp_path / "unbroken", tokenizer, **options)
    with monkeypatch.context() as patch:
        writes = kill_at(patch, 0)
        build_tokens([source], tmp_path / "counted", tokenizer, **options)
    kinds = {name.split()[0] for name in writes}
    assert kinds >= {"append_bytes", "whole_folder", "write_jsonl", "write_json", "unlink"}
    assert writes.count("append_bytes build.jsonl") == writes.count("append_bytes tokens.bin") > 5
    for number in range(1, len(writes) + 1):
        for other in (number + 1, 1):  # it goes on and is killed again, a little later or at once
            out = tmp_path / f"{number}-{other}"
            for at in (number, other):
                with monkeypatch.context() as patch, pytest.raises(Killed):
                    kill_at(patch, at)
                    build_tokens([source], out, tokenizer, **options)
                    raise Killed  # the second attempt had less to do
            build_tokens([source], out, tokenizer, **options)
            assert contents(out) == contents(unbroken.folder), writes[number - 1]


def test_a_build_goes_on_from_what_is_complete(tokenizer, source, tmp_path, small_parts, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 13)
        build_tokens([source], tmp_path / "out", tokenizer)
    before = (tmp_path / "out" / "tokens.bin").read_bytes()
    encoded: list[str] = []

    def counted(parts, encoder, processes):
        for part, ids in encode(parts, encoder, processes):
            encoded.extend(part.texts)
            yield part, ids

    monkeypatch.setattr("holdfast.data.tokens.file.encode", counted)
    file = build_tokens([source], tmp_path / "out", tokenizer)
    assert 0 < len(encoded) < len(TEXTS) and encoded == TEXTS[-len(encoded) :]
    assert before and (tmp_path / "out" / "tokens.bin").read_bytes().startswith(before[: len(before) // 4])
    encoded.clear()
    again = build_tokens([source], tmp_path / "out", tokenizer)
    assert again.manifest == file.manifest and not encoded


def test_sigkill_leaves_no_process_and_the_command_that_is_named_continues(
    tokenizer, tmp_path, small_parts, cli, capsys
):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = write_rows(tmp_path / "some texts.jsonl", TEXTS * 20, "body")
    out = tmp_path / "out"
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--domain", "eng", "--column", "body"]
    code = "import sys; from holdfast.data.tokens import build; build.PART = 500; from holdfast.cli import main; main()"
    command = ["lab", "tokens", str(path), "--out", str(out), *options, "--documents", "450", "--processes", "2"]
    with subprocess.Popen([sys.executable, "-c", code, *command]) as process:
        while not (out / "build.jsonl").exists() or (out / "build.jsonl").read_bytes().count(b"\n") < 4:
            assert process.poll() is None
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert workers and not alive
    with pytest.raises(DataError, match="is unfinished; continue with: holdfast lab tokens") as refused:
        TokenFile.open(out)
    named = shlex.split(str(refused.value).partition("continue with: holdfast ")[2])
    assert cli(*named) == 0
    unbroken = tmp_path / "unbroken"
    assert cli(*command, "--out", unbroken) == 0
    assert tokens(out) == tokens(unbroken)
    assert f"{unbroken}: {len(tokens(out))} tokens (uint16) of 450 documents" in capsys.readouterr().out


def test_an_interrupt_keeps_what_is_done(tokenizer, source, tmp_path, small_parts):
    def interrupt(documents: int, count: int) -> None:
        if documents > len(TEXTS) // 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"out: stopped after \d+ documents"):
        build_tokens([source], tmp_path / "out", tokenizer, on_progress=interrupt)
    file = build_tokens([source], tmp_path / "out", tokenizer)
    assert contents(file.folder) == contents(build_tokens([source], tmp_path / "unbroken", tokenizer).folder)


def test_a_process_that_is_killed_is_reported(tokenizer):
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), (), (1,), "<u2")

    def parts():
        for _ in range(4):
            for process in multiprocessing.active_children():
                process.kill()
            yield build.Part(TEXTS, 0, 0, "")

    with pytest.raises(RuntimeError, match="ended with exit code -9"):
        list(encode(parts(), encoder, 2))


def test_a_build_under_way_cannot_be_joined(tokenizer, source, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(RunDirectoryError, match="in use by another process"):
        build_tokens([source], tmp_path / "out", tokenizer)


# --- builds that cannot be ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domain": "egn"}, r"no token <\|egn\|>; did you mean 'eng'"),
        ({"sources": ["text.txt"]}, "no file or folder 'text.txt'.*did you mean 'texts.txt'"),
        ({"sources": ["folder/texts"]}, "no file or folder 'folder/texts'"),
        ({"sources": ["texts.doc"]}, "unknown kind of file '.doc'"),
        ({"column": "txt", "sources": ["rows.jsonl"]}, r"rows.jsonl: row 1 \(line 1\): .*'txt'; did you mean 'text'"),
        ({"sources": ["texts.txt", "bad.jsonl"]}, r"bad.jsonl: row 2 \(line 2\): is not valid JSON"),
        ({"sources": ["empty.txt"]}, "empty.txt: no text to tokenise among 2 documents"),
        ({"skip": 100}, "no text to tokenise among 24 documents"),
        ({"out": "folder"}, r"holds other files \(thesis.tex\)"),
    ],
)
def test_what_cannot_be_built_is_named(tokenizer, source, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ["a"])
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text: "b"}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "texts.doc").write_text("a")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    with pytest.raises((ConfigError, DataError), match=message):
        build_tokens(**{"sources": ["texts.txt"], "out": "out", "tokenizer": tokenizer} | options)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"


def test_a_wrong_row_is_mended_and_the_same_call_goes_on(tokenizer, source, tmp_path, small_parts):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    good = path.read_text()
    path.write_text(good.replace('{"text"', "{text", 20).replace("{text", '{"text"', 19))
    with pytest.raises(DataError, match="row 20 "):
        build_tokens([path], tmp_path / "out", tokenizer)
    path.write_text(good)
    file = build_tokens([path], tmp_path / "out", tokenizer)
    assert file.manifest["documents"] == len(TEXTS)


def test_a_folder_of_other_arguments_or_texts_is_not_touched(tokenizer, source, tmp_path, small_parts, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 13)
        build_tokens([source], tmp_path / "killed", tokenizer)
    build_tokens([source], tmp_path / "done", tokenizer)
    before = contents(tmp_path)
    for folder, what in (("killed", "an unfinished build"), ("done", "a token file")):
        with pytest.raises(ConfigError, match=rf"{folder}: holds {what} of other arguments \(domain None, not .*spa"):
            build_tokens([source], tmp_path / folder, tokenizer, domain="spa")
    assert contents(tmp_path) == before
    source.write_text(source.read_text().replace(TEXTS[0], TEXTS[0].upper()))
    with pytest.raises(DataError, match="documents of the sources are not those"):
        build_tokens([source], tmp_path / "killed", tokenizer)
    source.write_text("one more\n")
    with pytest.raises(ConfigError, match=r"other arguments \(bytes \d+, not 9; sources_sha256 '"):
        build_tokens([source], tmp_path / "done", tokenizer)


def test_an_attempt_that_wrote_nothing_binds_nobody(tokenizer, source, tmp_path):
    with pytest.raises(DataError, match="no column"):
        build_tokens([write_rows(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", tokenizer, column="body")
    assert build_tokens([source], tmp_path / "out", tokenizer, domain="spa").domain_id == 4


def test_a_tokenizer_must_end_its_texts(source, tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ConfigError, match="end-of-sequence"):
        build_tokens([source], tmp_path / "out", PreTrainedTokenizerFast(tokenizer_object=backend))


# --- files that cannot be read ---


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder: Path) -> None:
    os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size - 2)


def lengthen(folder: Path) -> None:
    with (folder / "tokens.bin").open("ab") as file:
        file.write(b"\1\0")


REFUSALS = {
    "truncated": (cut, r"tokens.bin: is truncated"),
    "longer": (lengthen, r"tokens.bin: is longer"),
    "other dtype": (lambda folder: edit(folder, dtype="uint32"), r"tokens.bin: is truncated, or of another dtype"),
    "unknown dtype": (lambda folder: edit(folder, dtype="int16"), "dtype: must be uint16 or uint32, not 'int16'"),
    "small dtype": (lambda folder: edit(folder, vocab_size=70_000), "uint16 is too small for a vocabulary of 70000"),
    "vocabulary": (lambda folder: edit(folder, vocab_size=100), r"tokens.bin: holds the id \d+, beyond the vocab"),
    "domain": (lambda folder: edit(folder, domain={"id": 900}), "id 900 is beyond the vocabulary"),
    "no domain's id": (lambda folder: edit(folder, domain="eng"), "domain: must be null, or an object"),
    "count": (lambda folder: edit(folder, tokens="many"), "tokens: must be of type int, not 'many'"),
    "format": (lambda folder: edit(folder, format=2), "manifest.json: is of format 2; .* reads format 1"),
    "no format": (lambda folder: (folder / "manifest.json").write_text("{}"), "manifest.json: is no manifest"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: is no manifest"),
    "no tokens": (lambda folder: (folder / "tokens.bin").unlink(), "tokens.bin: is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is no token file: it has no manifest.json"),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(file, reason):
    assert len(TokenFile.open(file.folder, verify=True)) == len(file)
    break_it, message = REFUSALS[reason]
    break_it(file.folder)
    with pytest.raises(DataError, match=message) as error:
        TokenFile.open(file.folder)
    assert str(file.folder) in str(error.value)


def test_another_tokenizer_is_refused(file, tokenizer):
    assert TokenFile.open(file.folder, tokenizer).vocab_size == 270
    other = train_tokenizer(TEXTS[5:], 269, domains=["eng", "spa"], reserved=1)
    with pytest.raises(DataError, match="made with another tokenizer"):
        TokenFile.open(file.folder, other)
    other.save_pretrained(file.folder / "tokenizer")
    with pytest.raises(DataError, match="tokenizer: is another tokenizer"):
        TokenFile.open(file.folder).verify()


def test_a_folder_that_is_not_there_is_named(file):
    with pytest.raises(ConfigError, match=r"no file or folder .*did you mean 'file'"):
        TokenFile.open(file.folder.with_name("fil"))


def test_one_flipped_bit_is_found(file):
    content = bytearray((file.folder / "tokens.bin").read_bytes())
    content[len(content) // 2 & ~1] ^= 1
    (file.folder / "tokens.bin").write_bytes(content)
    opened = TokenFile.open(file.folder)  # sizes are right, and more is not looked at
    with pytest.raises(DataError, match=r"tokens.bin: is damaged: its SHA-256"):
        opened.verify()
    with pytest.raises(DataError, match=r"tokens.bin: is damaged"):
        TokenFile.open(file.folder, verify=True)


def test_an_id_beyond_the_vocabulary_never_reaches_a_model(file):
    content = np.fromfile(file.folder / "tokens.bin", "<u2")
    content[40] = 270
    content.tofile(file.folder / "tokens.bin")
    rows = TokenFile.open(file.folder).rows(16)
    rows.batch([0, 1, 3])
    with pytest.raises(DataError, match="holds the id 270, beyond the vocabulary of 270"):
        rows.batch([1, 2])
    with pytest.raises(DataError, match=r"holds the id 270 \(token 40\)"):
        TokenFile.open(file.folder, verify=True)


# --- rows ---


def test_rows_cut_the_tokens_and_begin_with_the_domain(file):
    ids = tokens(file.folder)
    rows = file.rows(20)
    assert len(rows) == len(ids) // 20
    cut = [[3, *ids[20 * i + 1 : 20 * i + 20]] for i in range(len(rows))]
    assert [row["input_ids"] for row in rows] == cut
    assert [row["labels"] for row in rows] == [[-100, *row[1:]] for row in cut]
    assert rows[-1]["input_ids"] == cut[-1] and [row["input_ids"] for row in rows[2:4]] == cut[2:4]
    assert tokens(file.folder) == ids  # the file keeps its first tokens
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_batch_is_its_rows(file):
    rows = file.rows(20)
    for indices in ([4, 0, 4, 2], np.array([1, 3]), torch.tensor([5]), range(3), []):
        batch = rows.batch(indices)
        assert batch.dtype == torch.int64 and batch.shape == (len(indices), 20)
        assert batch.tolist() == [rows[int(i)]["input_ids"] for i in indices]
    batch = rows.batch([0])
    batch.zero_()
    assert rows[0]["input_ids"][0] == 3


def test_a_file_shorter_than_a_row_is_refused(file):
    assert len(file.rows(len(file))) == 1
    with pytest.raises(DataError, match=rf"file: holds {len(file)} tokens; one row is {len(file) + 1}"):
        file.rows(len(file) + 1)


def test_rows_are_read_where_they_are_needed(file, tmp_path, monkeypatch):
    """They can be pickled without the tokens, used or not, and read by spawned workers from wherever these are."""
    monkeypatch.chdir(tmp_path)
    rows = TokenFile.open("file").rows(20)
    first = rows.batch([0, 1])
    content = pickle.dumps(rows)
    assert len(content) < 1000
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(content).batch([0, 1]), first)
    loader = DataLoader(rows, batch_size=2, num_workers=1, multiprocessing_context="spawn", collate_fn=list)
    assert [row["input_ids"] for row in next(iter(loader))] == first.tolist()


# --- the command line ---


def test_from_texts_to_token_files_as_the_page_says(tmp_path, monkeypatch, cli):
    page = (DOCS / "lab" / "tokens.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "english.jsonl", language("north", 150, 0))
    (tmp_path / "spanish").mkdir()
    write_rows(tmp_path / "spanish" / "a.jsonl", language("south", 150, 0))
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    holdfast ")]
    assert len(commands) == 5
    for command in commands:
        assert cli(*command) == 0, command
    files = {name: TokenFile.open(f"tokens/{name}", verify=True) for name in ("eng", "eng-valid", "spa", "spa-valid")}
    assert [file.domain_id for file in files.values()] == [3, 3, 4, 4]
    assert [file.manifest["documents"] for file in files.values()] == [50, 100, 50, 100]
    assert files["spa"].tokenizer().decode(files["spa"].rows(64)[1]["input_ids"]).startswith("<|spa|>")
    names: dict[str, Any] = {}
    exec(re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[1], names)
    assert names["batch"].shape == (3, 64) and names["text"].startswith("<|eng|>")


def test_the_command_ends_with_2_and_one_line(tokenizer, source, tmp_path, cli, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for arguments, message in {
        (source, "--tokenizer", tmp_path / "tokenizer", "--domain", "egn"): "did you mean 'eng'",
        (source, "--tokenizer", source): "--tokenizer: .* is a file",
        (tmp_path / "a.jsonl", "--tokenizer", tmp_path / "tokenizer"): "no file or folder",
    }.items():
        assert cli("lab", "tokens", *arguments, "--out", tmp_path / "out") == 2
        assert re.search(message, capsys.readouterr().err.strip())
