"""General samples that show pictures: which rows are chosen, what is supervised, and that a run rehearses them."""

from __future__ import annotations

import json

import pytest

from holdfast.api.rows import IGNORED
from holdfast.config.model import ModelConfig
from holdfast.config.run import load_config
from holdfast.data.encode_apart import encoder_of
from holdfast.data.formats import to_examples
from holdfast.errors import ConfigError, DataError
from holdfast.models.pictures import pictures_in
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sight import load_sight
from holdfast.rehearsal.samples import general_rows
from holdfast.runner.run import run
from holdfast.system.files import read_jsonl
from holdfast.system.progress import Progress
from support.sight import seeing_config, write_pictures, write_seeing


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A tiny model's folder, its tokenizer, how it sees, and its configuration."""
    folder = write_seeing(tmp_path_factory.mktemp("seeing") / "model")
    config = ModelConfig(name=str(folder))
    tokenizer, model_config = load_tokenizer(config), load_model_config(config)
    return folder, tokenizer, load_sight(config, model_config, tokenizer), model_config


def write(folder, rows):
    """A file of general rows, and the pictures that they show."""
    folder.mkdir(parents=True, exist_ok=True)
    names = write_pictures(folder, len(rows), seed=7)
    path = folder / "general.jsonl"
    shown = ({"image": name} | row for name, row in zip(names, rows, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in shown), encoding="utf-8")
    return path


ROWS = [{"prompt": f"what is {n}?", "answer": "ab"[n % 2]} for n in range(6)]


def chosen(path, seeing, samples=10, seed=0):
    _, tokenizer, sight, model_config = seeing
    encode = encoder_of(model_config, tokenizer, sight, max_length=64).encode_all
    return general_rows(tokenizer, path=str(path), samples=samples, seed=seed, encode=encode)


def test_rows_are_those_of_a_task_and_only_answers_are_supervised(seeing, tmp_path):
    path = write(tmp_path, ROWS)
    _, tokenizer, sight, model_config = seeing
    encoder = encoder_of(model_config, tokenizer, sight, max_length=64)
    examples = to_examples(read_jsonl(path), "prompt_answer", file=path)
    rows = chosen(path, seeing)
    assert rows == [{key: row[key] for key in ("input_ids", "labels")} for row in encoder.encode_all(examples)]
    for row, example in zip(rows, examples, strict=True):
        assert pictures_in(row["input_ids"]) == example.pictures
        assert tokenizer.decode([token for token in row["labels"] if token != IGNORED]) == f"{example.answer}</s>"


def test_the_seed_chooses_and_the_chosen_keep_their_order(seeing, tmp_path):
    path = write(tmp_path, ROWS)
    every = chosen(path, seeing)
    choices = [[every.index(row) for row in chosen(path, seeing, 3, seed)] for seed in range(4)]
    assert all(len(choice) == 3 and choice == sorted(choice) for choice in choices)
    assert len({tuple(choice) for choice in choices}) > 1
    assert chosen(path, seeing, 3, 1) == chosen(path, seeing, 3, 1)


def test_only_the_pictures_of_chosen_rows_are_read(seeing, tmp_path):
    path = write(tmp_path, ROWS)
    every = chosen(path, seeing)
    for seed in range(4):
        [row] = chosen(path, seeing, 1, seed)
        (tmp_path / f"7-{(every.index(row) + 1) % len(ROWS)}.png").unlink(missing_ok=True)
        assert chosen(path, seeing, 1, seed) == [row]
        write(tmp_path, ROWS)


def test_a_row_with_a_picture_needs_to_know_how_the_model_reads_it(seeing, tmp_path):
    with pytest.raises(ConfigError, match=r"general\.jsonl: row \d+: shows a picture, and only .* knows how"):
        general_rows(seeing[1], path=str(write(tmp_path, ROWS)))


def test_a_picture_that_cannot_be_read_is_named(seeing, tmp_path):
    path = write(tmp_path, ROWS[:2])
    (tmp_path / "7-1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"general\.jsonl: row 2 .*7-1\.png"):
        chosen(path, seeing)


def test_a_run_keeps_its_distribution_on_pictures(tmp_path):
    path = write(tmp_path / "general", ROWS)
    method = {"name": "gere_kl", "path": str(path), "ce_weight": 0.0, "ratio": 0.5}
    config = seeing_config(tmp_path, method=method, evaluation={"general": [], "max_new_tokens": 3})
    run(load_config(config), Progress(quiet=True))
    assert max(row["terms"]["gere_kl"] for row in read_jsonl(tmp_path / "run" / "events.jsonl")) > 0
