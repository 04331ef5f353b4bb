"""The demo with pictures, small: its model sees, its runs are compared, and nothing is done twice."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from holdfast.data.streams.gallery import stream
from holdfast.data.streams.gallery.stream import general_rows
from holdfast.errors import ConfigError
from holdfast.lab import image_demo as demo
from holdfast.lab.seeing import make_seeing_model
from holdfast.system.files import read_json, read_jsonl
from support.command import holdfast


@pytest.fixture
def small(monkeypatch):
    """Few rows, one pass over them, and two methods."""
    monkeypatch.setattr(demo, "SIZE", 4)
    monkeypatch.setattr(demo, "ROOMS", 2)
    monkeypatch.setattr(demo, "TESTED", 1)
    monkeypatch.setattr(demo, "PRETRAINING", {"one": ((1,), 4, 1), "two": ((1, 2), 4, 1)})
    monkeypatch.setattr(demo, "METHODS", {name: demo.METHODS[name] for name in ("sequential", "replay+gere_kl")})
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING | {"epochs": 1, "batch_size": 4, "log_every": 1})
    monkeypatch.setattr(stream, "QUESTIONS", 2)


def made(folder):
    """When each file of weights, events and responses was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".safetensors", ".jsonl")}


def test_the_seed_decides_the_model_and_its_processor_reads_every_word(tmp_path):
    rows = general_rows(6)
    texts = [f"{row.question} {row.answer}" for row in rows] + ["Where does it hang in room 2?"]
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        make_seeing_model(tmp_path / name, texts, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other")]
    assert weights[0] == weights[1] != weights[2]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "one").tokenizer
    assert model.config.text_config.vocab_size == len(tokenizer)
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).replace(" ?", "?") == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("in room 2?")["input_ids"])[-1] == "2?"


def test_rows_are_written_with_each_picture_once(tmp_path):
    rows = general_rows(5)
    demo.write_rows(tmp_path, "a", "train", [*rows, *rows])
    written = read_jsonl(tmp_path / "a" / "train.jsonl")
    assert [(row["prompt"], row["answer"]) for row in written] == [(row.question, row.answer) for row in rows] * 2
    assert len(list((tmp_path / "pictures").iterdir())) == len({row["image"] for row in written}) <= len(rows)
    for row, drawn in zip(written, rows, strict=False):
        with Image.open(tmp_path / "a" / row["image"]) as image:
            assert image.convert("RGB").tobytes() == drawn.drawing.pixels().tobytes()


def test_the_demo_compares_its_runs_and_does_nothing_twice(small, tmp_path):
    told = io.StringIO()
    runs = demo.run_image_demo(tmp_path, 0, Console(file=told, width=200))
    assert runs == [tmp_path / "sequential-0", tmp_path / "replay+gere_kl-0"]
    for path in runs:
        matrix = read_json(path / "matrix.json")
        assert matrix["tasks"] == ["room-1", "room-2"] and list(matrix["general"]) == ["gallery"]
        assert matrix["summary"]["forgetting"] is not None
    assert max(row["terms"]["gere_kl"] for row in read_jsonl(runs[1] / "events.jsonl")) > 0
    page = tmp_path / "report-0.html"
    assert "replay" in page.read_text(encoding="utf-8")
    assert "sequential" in told.getvalue() and str(page) in told.getvalue()
    before = made(tmp_path)
    assert demo.run_image_demo(tmp_path, 0, Console(file=told)) == runs
    assert made(tmp_path) == before


def test_two_demos_at_once_are_refused(tmp_path, capsys):
    assert holdfast("demo", "--images", "--real", "-o", tmp_path) == 2
    assert "--images: the demo with pictures makes its model itself" in " ".join(capsys.readouterr().err.split())
    assert not list(Path(tmp_path).iterdir())


def test_the_demo_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"holdfast\[images\]"):
        demo.run_image_demo(tmp_path, 0, Console(file=io.StringIO()))
