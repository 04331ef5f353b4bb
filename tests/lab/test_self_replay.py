"""Replay in a laboratory run: what it keeps, with the model's own rows or real ones, and that a killed run goes on."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from holdfast.data.tokens.file import TokenFile
from holdfast.lab.pretrain import pretrain
from holdfast.rehearsal.samples import corpus_rows
from holdfast.system.files import append_jsonl, read_jsonl
from holdfast.system.progress import Progress
from support import forked
from support.lab_runs import lab_config

QUIET = Progress(quiet=True)


def south(languages, pretrained, output, method, **changes):
    """Going on from the model of the northern language on the southern one."""
    model, data = str(pretrained.path / "model"), str(languages.south)
    return lab_config(languages, output, model=model, data=data, method=method, **changes)


def test_a_model_begins_with_the_domain_that_it_was_pretrained_on(languages, pretrained):
    begins = AutoConfig.from_pretrained(pretrained.path / "model").bos_token_id
    assert begins == TokenFile.open(languages.north).domain_id != languages.tokenizer.bos_token_id


@pytest.fixture(scope="module")
def plain(languages, pretrained, tmp_path_factory):
    return pretrain(south(languages, pretrained, tmp_path_factory.mktemp("plain") / "run", "sequential"), QUIET)


@pytest.mark.parametrize("method", ["ntp_pre", "kl_pre", "replace"])
@pytest.mark.parametrize("source", ["self", "general"])
def test_old_rows_keep_the_old_language(method, source, languages, pretrained, plain, tmp_path):
    """The northern loss rises by less than half of what it does without, the southern one falls."""
    options = {"name": method, "source": source, "ratio": 0.5}
    if source == "general":
        options["path"] = str(languages.north)
    result = pretrain(south(languages, pretrained, tmp_path / "run", options), QUIET)
    north, without = (
        r["end"]["domains"]["north"]["loss"] - r["start"]["domains"]["north"]["loss"] for r in (result, plain)
    )
    assert north < 0.5 * without
    learned = result["start"]["domains"]["south"]["loss"] - result["end"]["domains"]["south"]["loss"]
    assert learned > 0.3


class DiedError(Exception):
    pass


@pytest.mark.parametrize("tuner", ["full", {"name": "lora", "r": 2}])
def test_a_run_that_died_between_two_draws_goes_on_to_the_same_end(tuner, languages, pretrained, tmp_path, monkeypatch):
    """It dies at step 13; the last checkpoint is of step 12, and what steps 10 to 14 get was drawn before step 10."""
    method = {"name": "kl_pre", "count": 3, "buffer": 5}
    configs = [south(languages, pretrained, tmp_path / name, method, tuner=tuner) for name in ("unbroken", "broken")]
    for config in configs:
        config["training"] |= {"save_every": 4}
    pretrain(configs[0], QUIET)

    def dying(file, event):
        if event["step"] == 13:
            raise DiedError
        append_jsonl(file, event)

    with monkeypatch.context() as patch:
        patch.setattr("holdfast.training.watch.append_jsonl", dying)
        with pytest.raises(DiedError):
            pretrain(configs[1], QUIET)
    pretrain(configs[1], QUIET)
    runs = [tmp_path / "unbroken", tmp_path / "broken"]
    losses = [[event["loss"] for event in read_jsonl(run / "events.jsonl")] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 20
    one, other = (next(run.rglob("*.safetensors")).read_bytes() for run in runs)
    assert one == other


def test_from_the_command_line_a_corpus_and_then_training_on_it(languages, pretrained, tmp_path, cli, capsys):
    model, corpus = pretrained.path / "model", tmp_path / "corpus"
    assert cli("replay", model, "--tokens", 2000, "--out", corpus, "--length", 16) == 0
    assert "125 samples, 2,000 tokens" in capsys.readouterr().out
    rows = corpus_rows(corpus)
    assert {row["input_ids"][0] for row in rows} == {TokenFile.open(languages.north).domain_id}
    both = tmp_path / "both"
    assert (
        cli("replay", model, "--tokens", 64, "--out", both, "--length", 16, "--domain", "north", "--domain", "south")
        == 0
    )
    assert [row["input_ids"][0] for row in corpus_rows(both)] == [
        TokenFile.open(languages.north).domain_id,
        TokenFile.open(languages.south).domain_id,
    ] * 2
    text = languages.tokenizer.decode([token for row in rows for token in row["input_ids"]], skip_special_tokens=True)
    assert sum(map(text.count, "bcdfg")) > 5 * sum(map(text.count, "klmnp"))
    method = {"name": "kl_pre", "path": str(corpus)}
    result = pretrain(south(languages, pretrained, tmp_path / "run", method), QUIET)
    assert result["end"]["domains"]["north"]["kl"] < 0.5


@pytest.mark.slow
def test_two_processes_learn_what_one_does(languages, pretrained, tmp_path):
    """Each draws its share of a step's samples; the sum of both is a step of one process."""
    method, training = (
        {"name": "kl_pre", "count": 4, "buffer": 5},
        {"batch_size": 8, "learning_rate": 1e-2, "log_every": 1},
    )
    changes = {"training": training, "stop": {"tokens": 6 * 8 * 16}}
    pretrain(south(languages, pretrained, tmp_path / "one", method, **changes), QUIET)
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(south(languages, pretrained, tmp_path / "two", method, **changes)), encoding="utf-8")
    for process in forked.start_together(2, "-m", "holdfast", "lab", "pretrain", config):
        assert process.wait(timeout=300) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("one", "two")]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
