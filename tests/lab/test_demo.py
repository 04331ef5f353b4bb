"""The demo, small: its model is that of a laboratory run, its runs are compared, and nothing is done twice."""

import io

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.lab import demo
from holdfast.system.files import read_json
from holdfast.system.progress import Progress

QUIET = Progress(quiet=True)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small world, a short pretraining and two methods of one epoch."""
    monkeypatch.setattr(demo, "SIZE", 4)
    monkeypatch.setitem(demo.PRETRAINING, "stop", {"tokens": 10 * 8 * 64})
    monkeypatch.setattr(demo, "METHODS", {name: demo.METHODS[name] for name in ("sequential", "replay+gere_kl")})
    configuration = demo.configuration

    def short(*args):
        config = configuration(*args)
        config["training"] |= {"epochs": 1}
        return config

    monkeypatch.setattr(demo, "configuration", short)


def made(folder):
    """When each file of weights, events and responses was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".safetensors", ".jsonl")}


def test_the_model_is_that_of_a_laboratory_run_and_the_seed_decides_it(tmp_path):
    weights = []
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        demo.make_model(tmp_path / name / "model", seed, QUIET)
        run = tmp_path / name / f"pretrain-{seed}" / "general-text"
        assert read_json(run / "result.json")["step"] == 10
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
        assert weights[-1] == (run / "model" / "model.safetensors").read_bytes()
    assert weights[0] == weights[1] != weights[2]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one" / "model")
    assert model.config.vocab_size == len(tokenizer)
    assert (tokenizer.model_max_length, model.config.max_position_embeddings) == (64, 64)
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert {path.suffix for path in (tmp_path / "one" / "model").iterdir()} == {".json", ".safetensors"}


def test_the_demo_compares_its_runs_and_does_nothing_twice(tmp_path):
    told = io.StringIO()
    runs = demo.run_demo(tmp_path, 0, Console(file=told, width=200))
    assert runs == [tmp_path / "sequential-0", tmp_path / "replay+gere_kl-0"]
    assert all(read_json(run / "matrix.json")["summary"]["forgetting"] is not None for run in runs)
    page = tmp_path / "report-0.html"
    assert "replay" in page.read_text(encoding="utf-8")
    assert "sequential" in told.getvalue() and str(page) in told.getvalue()
    (tmp_path / "pretrain-0" / "tokens" / "tokens.bin").unlink(missing_ok=True)
    before = made(tmp_path)
    assert demo.run_demo(tmp_path, 0, Console(file=told)) == runs
    assert made(tmp_path) == before
