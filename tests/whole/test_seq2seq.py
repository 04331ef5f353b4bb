"""Runs on sequence-to-sequence models: every method and tuner that can work with one does, the others are refused."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from holdfast import methods, tuners
from holdfast.api.task import Example, Turn
from holdfast.config.model import ModelConfig
from holdfast.data.encode_apart import encoder_of
from holdfast.models.pretrained import load_tokenizer
from holdfast.system.files import read_jsonl
from support.command import holdfast as command
from support.goes_on import LORA, STEPS, check_goes_on, check_method, run, write_texts
from support.guards import case, same, weights
from support.paths import DOCS
from support.resumed import finish, results, start
from support.seq2seq import seq2seq_config, seq2seq_model, write_seq2seq

OWN = {name: methods.find(name) for name in sorted(methods.METHODS.own)}
TUNERS = {name: tuners.find(name) for name in sorted(tuners.TUNERS.own)}
WORKING = [name for name, cls in OWN.items() if not cls.causal_only]
FAST = ("kl_pre", "lfpt5", "o_lora")
OPTIONS = {"gere": {"multiple": 0.1}, "lfpt5": {"samples": 2, "top_k": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seq2seq")
    seq2seq_config(path, dropout_rate=0.1)
    write_texts(path)
    return path


def config_of(folder: Path, output: Path, method: Any, tuner: Any = "full", **changes: Any) -> dict[str, Any]:
    config = seq2seq_config(folder) | {"method": method, "tuner": tuner, "output": str(output)} | changes
    return config | {"training": STEPS}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in WORKING])
def test_a_method_trains_saves_and_continues(name, folder, tmp_path, monkeypatch):
    check_method(OWN[name], OPTIONS.get(name, {}), config_of, folder, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n == "p_tuning" else pytest.mark.slow)
        for n, cls in TUNERS.items()
        if not cls.causal_only
    ],
)
def test_a_tuner_trains_saves_and_continues(name, folder, tmp_path, monkeypatch):
    method = ["replay", {"name": "gere_kl", "path": str(folder / "general.txt")}]
    check_goes_on(config_of(folder, tmp_path, method, name), tmp_path, monkeypatch, "02-green")


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_adapters_come_after_each_attention_and_mlp_of_encoder_and_decoder(name):
    for placement, count in (("houlsby", 2 * (2 + 3)), ("pfeiffer", 2 * (1 + 1))):
        model = TUNERS["adapter"](placement=placement, bottleneck=2).prepare(seq2seq_model(name))
        assert sum("adapter_down" in key for key, _ in model.named_parameters() if key.endswith("weight")) == count


REFUSED = [(name, {"method": name}) for name, cls in OWN.items() if cls.causal_only]
REFUSED += [(name, {"method": "sequential", "tuner": name}) for name, cls in TUNERS.items() if cls.causal_only]


@pytest.mark.parametrize(("name", "changes"), REFUSED)
def test_what_needs_a_causal_model_is_refused_by_name_with_the_reason(name, changes, folder, tmp_path, capsys):
    config = config_of(folder, tmp_path / "run", **{"method": "sequential"} | changes)
    if "tuner" not in changes:
        del config["tuner"]
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert command("run", tmp_path / "run.yaml") == 2
    said = " ".join(capsys.readouterr().err.split())
    cls = OWN[name] if name in OWN else TUNERS[name]
    assert f"{cls.kind} {name}: the model is a sequence-to-sequence one (t5), and {cls.causal_only}" in said
    assert not (tmp_path / "run" / "stages").exists()


def test_the_page_names_every_method_and_tuner_that_is_refused():
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    table = page.partition("Refused before training")[2].partition("\n## ")[0]
    named = re.findall(r"(?:method|tuner) `(\w+)`", table)
    assert sorted(named) == sorted(name for name, cls in (OWN | TUNERS).items() if cls.causal_only)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("data.packing=true", "data.packing: the model is a sequence-to-sequence one (t5)"),
        ("training.engine=fsdp2", "training.engine: the model is a sequence-to-sequence one (t5)"),
    ],
)
def test_keys_that_need_a_causal_model_are_refused(key, said, folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(config_of(folder, tmp_path / "run", "sequential")))
    assert command("check", tmp_path / "run.yaml", key) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_tasks_of_texts_are_refused(folder, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    for split in ("train", "test"):
        (tmp_path / "texts" / f"{split}.json").write_text(json.dumps([{"text": "the red one"}] * 2))
    config = config_of(folder, tmp_path / "run", "sequential")
    config["stream"] = {"tasks": [{"name": "texts", "path": str(tmp_path / "texts")}]}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert command("check", tmp_path / "run.yaml") == 2
    assert "rows of prompt and answer would do" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_check_shows_both_sides(name, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(seq2seq_config(tmp_path, name)))
    assert command("check", tmp_path / "run.yaml") == 0
    said = capsys.readouterr().out
    assert {"t5": "decoder: <pad>[r</s>]", "bart": "decoder: </s>[<s>r</s>]"}[name] in said
    assert "encoder: " in said and "?</s>" in said


@pytest.mark.slow
def test_a_killed_run_ends_as_an_unbroken_one(tmp_path):
    """Dropout makes the weights depend on the state of the random number generators."""
    config = seq2seq_config(tmp_path, dropout_rate=0.3) | {"method": ["replay", {"name": "der", "capacity": 6}]}
    whole, broken = (tmp_path / f"{kind}.json" for kind in ("whole", "broken"))
    whole.write_text(json.dumps(config | {"output": str(tmp_path / "whole")}))
    broken.write_text(json.dumps(config | {"output": str(tmp_path / "broken")}))
    unbroken = start(whole)
    for point in (("step", 4), ("answers", 2), ("checkpoint", 1)):
        assert finish(start(broken, *point)) == -signal.SIGKILL, f"{point} was never reached"
    assert finish(start(broken)) == 0 and finish(unbroken) == 0
    one, two = results(tmp_path / "whole"), results(tmp_path / "broken")
    for key in one:
        assert one[key] == two[key], key


@pytest.mark.parametrize(
    ("name", "tuner"),
    [("t5", "lora"), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("t5", "full"), ("bart", "lora")))],
)
def test_what_a_run_saved_answers_alike_in_plain_transformers(name, tuner, tmp_path):
    config = seq2seq_config(tmp_path, name) | {"tuner": LORA if tuner == "lora" else tuner, "method": "replay"}
    run(config | {"training": config["training"] | {"epochs": 6, "learning_rate": 1e-2}})
    stage = tmp_path / "run" / "stages" / "02-green"
    assert command("export", tmp_path / "run", "--to", tmp_path / "export", *["--merge"] * (tuner == "lora")) == 0
    loaded: list[Any] = [AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export")]
    if tuner == "lora":
        base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model")
        loaded.append(PeftModel.from_pretrained(base, stage / "adapter"))
        assert json.loads((stage / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    records = read_jsonl(stage / "responses" / "green.jsonl")
    for model in loaded:
        for record in records:
            with torch.no_grad():
                ids = tokenizer(record["prompt"], return_tensors="pt")
                out = model.eval().generate(**ids, max_new_tokens=3, do_sample=False)[0]
            assert tokenizer.decode(out, skip_special_tokens=True).strip() == record["response"]
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "export" / "README.md").read_text()


def test_a_folder_as_t5s(tmp_path):
    """SentencePiece pieces in tokenizer.json, sentinels at the end, and the decoder's start token in config.json."""
    write_seq2seq(tmp_path / "model", "t5")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    assert described["decoder_start_token_id"] == 0 and described["is_encoder_decoder"]
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())["tokenizer_class"] == "T5Tokenizer"
    tokenizer = load_tokenizer(ModelConfig(name=str(tmp_path / "model")))
    encoder = encoder_of(AutoConfig.from_pretrained(tmp_path / "model"), tokenizer, max_length=32)
    turns = (Turn("user", "the <extra_id_0> sea\nis red"), Turn("assistant", "<extra_id_0> green"))
    [row] = encoder.encode(Example("rows.json", 0, turns))
    [sentinel] = tokenizer.convert_tokens_to_ids(["<extra_id_0>"])
    assert sentinel in row["encoder_ids"] and sentinel in row["labels"]
    assert tokenizer.decode(row["labels"][1:]).split() == ["<extra_id_0>", "green</s>"]


def trained(folder: Path, output: Path, method: Any, epochs: int) -> dict[str, Any]:
    config = seq2seq_config(folder) | {"method": method, "tuner": "full", "output": str(output)}
    more = {"epochs": epochs, "learning_rate": 1e-2, "save_every": 100}
    return run(config | {"training": config["training"] | more})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["replay", "ewc", "kl_pre", "lfpt5"])
def test_a_method_that_is_switched_off_is_sequential(name, folder, tmp_path):
    options = {key: value for key, value in case(name).options.items() if key in ("length", "buffer", "samples")}
    off = case(name).off
    assert isinstance(off, dict)
    trained(folder, tmp_path / "plain", "sequential", 2)
    trained(folder, tmp_path / "off", {"name": name} | options | off, 2)
    for stage in ("01-red", "02-green"):
        assert same(weights(tmp_path / "off", stage), weights(tmp_path / "plain", stage))


@pytest.mark.slow
def test_replay_forgets_less_than_plain_training(tmp_path):
    seq2seq_config(tmp_path)
    plain, replayed = (
        trained(tmp_path, tmp_path / f"out-{n}", method, 25)["summary"]
        for n, method in enumerate(("sequential", {"name": "replay", "ratio": 1.0}))
    )
    assert plain["new_task"] >= 0.75 and replayed["new_task"] >= 0.75
    assert replayed["forgetting"] <= plain["forgetting"] - 0.25
