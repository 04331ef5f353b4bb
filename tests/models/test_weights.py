"""A pretrained model whose files lack weights is refused wherever it is loaded; one that is whole never is."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from holdfast import tuners
from holdfast.config.model import ModelConfig
from holdfast.config.section import Named
from holdfast.data.tokens.file import build_tokens
from holdfast.deploy.export import export
from holdfast.deploy.serve import application
from holdfast.errors import ConfigError
from holdfast.lab.pretrain import pretrain
from holdfast.models.weights import check_weights, load_language_model
from holdfast.rehearsal.replay import replay
from holdfast.runner.evaluate import evaluate
from holdfast.runner.reload import find_stage
from holdfast.runner.run import run
from holdfast.system.progress import Progress
from support.command import holdfast
from support.families import FAMILIES, write_family
from support.tiny import tiny_config, tiny_model, tiny_tokenizer, write_model

QUIET = Progress(quiet=True)


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in names:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def untied(folder: Path) -> Path:
    tiny_model(tie_word_embeddings=False).save_pretrained(folder)
    return folder


LACKING = {
    "a tensor": (
        lambda f: without(f, "model.layers.1.mlp.up_proj.weight"),
        r"lack 1 tensors .*: model\.layers\.1\.mlp",
    ),
    "the head": (lambda f: without(f, "lm_head.weight"), r"lack 1 tensors of LlamaForCausalLM, .*: lm_head\.weight"),
    "two layers": (
        lambda f: change_config(f, num_hidden_layers=4),
        r"lack 18 tensors .*model\.layers\.2\.input_layernorm\.weight, .*model\.layers\.3\.self_attn\.v_proj\.weight",
    ),
    "another architecture": (
        lambda f: change_config(f, model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"]),
        r"tensors of GPTNeoXForCausalLM.*gpt_neox\..* and \d+ more; the files have instead: .*model\.embed_tokens",
    ),
    "other shapes": (
        lambda f: change_config(f, intermediate_size=48),
        r"mlp\.down_proj\.weight \[16, 32\], not \[16, 48",
    ),
    "a base model": (tiny_model(tie_word_embeddings=False).model.save_pretrained, r": lm_head\.weight"),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_lacks_weights_is_refused_with_their_names(case, tmp_path):
    spoil, message = LACKING[case]
    spoil(untied(tmp_path / "model"))
    with pytest.raises(ConfigError, match=f"model.name: .*{message}"):
        load_language_model(tmp_path / "model")
    with pytest.raises(ConfigError, match=f"model.name: .*{message}"):
        check_weights(ModelConfig(name=str(tmp_path / "model")))


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    file = untied(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for load in (load_language_model, lambda name: check_weights(ModelConfig(name=str(name)))):
        with pytest.raises(ConfigError, match=r"model.name: the weights of .* cannot be loaded"):
            load(tmp_path)


def old_gpt2(folder: Path) -> None:
    """As the hub's first models are stored: without the prefix, and with buffers that are no weights."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=1, vocab_size=64, n_positions=32))
    model.save_pretrained(folder)
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(folder / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def head_under_both_names(folder: Path) -> None:
    model = tiny_model()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)


WHOLE = {
    "tied": lambda f: tiny_model().save_pretrained(f),
    "untied": untied,
    "tied, of which the head is stored": lambda f: (
        tiny_model().save_pretrained(f),
        save_file(
            {n.replace("model.embed_tokens", "lm_head"): t for n, t in load_file(f / "model.safetensors").items()},
            f / "model.safetensors",
            {"format": "pt"},
        ),
    ),
    "tied, in a .bin file": head_under_both_names,
    "in shards": lambda f: tiny_model().save_pretrained(f, max_shard_size="5KB"),
    "gpt2 of old": old_gpt2,
    "bloom": lambda f: BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2)
    ).save_pretrained(f),
    **{name: partial(write_family, name=name) for name in FAMILIES},
}  # fmt: skip


@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_model_is_loaded(case, tmp_path):
    WHOLE[case](tmp_path)
    assert check_weights(ModelConfig(name=str(tmp_path)))
    loaded = load_language_model(tmp_path).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in loaded.items())


def test_weights_that_a_model_does_not_use_are_told(tmp_path, caplog):
    change_config(untied(tmp_path), num_hidden_layers=1)
    load_language_model(tmp_path)
    [told] = [record.getMessage() for record in caplog.records if record.name == "holdfast"]
    assert "does not use 9 tensors" in told and "model.layers.1." in told


def test_a_hub_model_that_is_not_here_yet_is_checked_when_it_is_loaded(tmp_path, monkeypatch):
    config = tiny_model().config
    monkeypatch.setattr("holdfast.models.weights.load_model_config", lambda model: config)
    assert not check_weights(ModelConfig(name="nobody/has-this-model"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    config = tiny_config(folder, tuner={"name": "lora", "r": 2})
    config["stream"]["order"] = ["red"]
    run(config | {"training": {"max_steps": 1}}, QUIET)
    return folder


@pytest.fixture
def spoiled(taught, tmp_path) -> Path:
    """A finished run whose base model has lost a tensor since."""
    place = tmp_path / "place"
    shutil.copytree(taught, place)
    without(place / "model", "model.norm.weight")
    adapter = place / "run" / "stages" / "01-red" / "adapter" / "adapter_config.json"
    adapter.write_text(adapter.read_text().replace(str(taught), str(place)))
    (place / "run" / "manifest.jsonl").unlink()
    return place


def test_no_command_takes_such_a_model(spoiled, tmp_path, capsys):
    lacks = r"lack 1 tensors of LlamaForCausalLM, .*: model\.norm\.weight"
    stored = find_stage(spoiled / "run")
    for refused in (
        lambda: evaluate(spoiled / "run", progress=QUIET, accept_changes=True),
        lambda: application(stored),
        lambda: export(spoiled / "run", tmp_path / "merged", merge=True, accept_changes=True),
        lambda: replay(str(spoiled / "model"), tmp_path / "corpus", tokens=10),
        lambda: replay(str(spoiled / "run" / "stages" / "01-red" / "adapter"), tmp_path / "corpus", tokens=10),
    ):
        with pytest.raises(ConfigError, match=lacks):
            refused()
    config = tiny_config(spoiled, output=str(tmp_path / "new"))
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    for command in ("check", "run"):
        assert holdfast(command, tmp_path / "run.yaml") == 2
        assert "lack 1 tensors" in capsys.readouterr().err
    assert not (tmp_path / "new" / "run.json").exists()


def test_the_laboratory_does_not_go_on_from_such_a_model(tmp_path):
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the tide comes in\n" * 20)
    build_tokens([tmp_path / "text.txt"], tmp_path / "tokens", tiny_tokenizer())
    without(tmp_path / "model", "model.norm.weight")
    config = {
        "model": {"path": str(tmp_path / "model")},
        "data": [str(tmp_path / "tokens")],
        "context": 16,
        "stop": {"tokens": 64},
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(ConfigError, match=r"model.path: .* lack 1 tensors .*model\.norm\.weight"):
        pretrain(config, QUIET)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"name": "full"}, "model.norm.weight"),
        ({"name": "lora", "r": 2}, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ({"name": "lora", "r": 2, "modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight"),
        ({"name": "prompt"}, "prompt_embeddings"),
    ],
    ids=["full", "lora", "modules_to_save", "prompt"],
)
def test_a_tuner_does_not_load_a_part_of_its_weights(options, name, tmp_path):
    tuner = tuners.build(Named.model_validate(options))
    model = tuner.prepare(tiny_model())
    tuner.save(model, tmp_path)
    [file] = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{tmp_path}.*lack.* {name.replace('.weight', '')}"):
        tuner.load(model, tmp_path)


def test_plain_peft_s_warning_of_missing_tensors_is_an_error(taught, tmp_path):
    place = tmp_path / "place"
    shutil.copytree(taught, place)
    (place / "run" / "manifest.jsonl").unlink()
    adapter = place / "run" / "stages" / "01-red" / "adapter"
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[name]
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    for load in (
        lambda: export(place / "run", tmp_path / "merged", merge=True),
        lambda: replay(str(adapter), tmp_path / "corpus", tokens=10),
    ):
        with pytest.raises(ConfigError, match=r"missing adapter keys .*layers\.0\.self_attn\.q_proj\.lora_A"):
            load()
