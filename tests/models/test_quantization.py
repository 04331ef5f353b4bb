"""QLoRA for real: bitsandbytes holds the frozen weights in 4 bits, on whatever device there is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import holdfast.runner.run
import holdfast.runner.stage
from holdfast.config.model import ModelConfig
from holdfast.config.run import load_config
from holdfast.deploy.export import export
from holdfast.models.generation import generate
from holdfast.models.pretrained import load_tokenizer
from holdfast.models.quantization import weight_options
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'holdfast[quantization]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FROZEN = ["adalora", "adapter", "dual_prefix", "ia3", "moe_lora", "p_tuning", "prefix", "prompt", "prompt_pool"]


def configuration(folder: Path, output: str, tuner: Any) -> dict[str, Any]:
    config = tiny_config(folder, tuner=tuner, output=str(folder / output))
    tiny_model(hidden_size=64, intermediate_size=128, initializer_range=0.2).save_pretrained(config["model"])
    config["model"] = {"name": config["model"], "quantization": "4bit"}
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"max_steps": 3, "save_every": 2, "learning_rate": 1e-2}
    del config["training"]["epochs"]
    return config | {"evaluation": {"max_new_tokens": 3, "bootstrap": 0}}


def run(config: dict[str, Any]) -> dict[str, Any]:
    return holdfast.runner.run.run(config, Progress(quiet=True))


def test_the_frozen_linear_layers_are_in_nf4_and_all_else_is_not(tmp_path):
    """Each weight is the original to a fraction of its block's largest: the widest gap of NF4's values is 0.28."""
    config = configuration(tmp_path, "run", {"name": "lora", "r": 4, "lora_dropout": 0.0})
    plain = AutoModelForCausalLM.from_pretrained(config["model"]["name"])
    model = holdfast.runner.load.load_model(prepare(resolve(load_config(config))))
    layers = {name: part for name, part in model.named_modules() if isinstance(part, bnb.nn.Linear4bit)}
    assert len(layers) == 2 * 7
    for name, layer in layers.items():
        quantised, key = layer.weight, name.removeprefix("base_model.model.").removesuffix(".base_layer")
        assert quantised.dtype == torch.uint8 and not quantised.requires_grad
        assert quantised.quant_state.quant_type == "nf4" and quantised.quant_state.nested
        original = plain.get_parameter(f"{key}.weight").detach().to(DEVICE)
        found = bnb.functional.dequantize_4bit(quantised.data, quantised.quant_state)
        blocks = original.flatten().unflatten(0, (-1, 64))
        gap = (found.float() - original).flatten().unflatten(0, (-1, 64)).abs()
        assert (gap <= 0.16 * blocks.abs().amax(dim=1, keepdim=True)).all() and gap.any()
    rest = [p for p in model.parameters() if p.dtype != torch.uint8]
    assert rest and all(p.dtype == torch.float32 for p in rest)
    assert {name.rpartition(".lora_")[1] for name, p in model.named_parameters() if p.requires_grad} == {".lora_"}


def test_a_run_continues_and_its_adapter_answers_alike_on_a_quantised_base_in_plain_peft(tmp_path, monkeypatch):
    tuner = {"name": "lora", "r": 4}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    watch = holdfast.runner.stage.StageWatch.on_step_end

    def copying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch(self, args, state, control, **kwargs)
        if Path(args.output_dir).parent.name == "02-green" and state.global_step == 3:
            shutil.copytree(whole, broken)

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", copying)
        matrix = run(configuration(tmp_path, "whole", tuner))
    assert run(configuration(tmp_path, "broken", tuner)) == matrix
    one, two = (
        load_file(path / "stages" / "02-green" / "adapter" / "adapter_model.safetensors") for path in (whole, broken)
    )
    assert all(torch.equal(one[key], two[key]) for key in one) and any(w.any() for k, w in one.items() if "lora_B" in k)

    exported = export(whole, tmp_path / "out")
    assert any("4bit" in line for line in exported.lacks)
    model = ModelConfig(**configuration(tmp_path, "whole", tuner)["model"])
    base = AutoModelForCausalLM.from_pretrained(model.name, **weight_options(model, DEVICE))
    plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    tokenizer = load_tokenizer(model)
    lines = (whole / "stages" / "02-green" / "responses" / "red.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    options = {"max_new_tokens": 3, "batch_size": 8, "eos_token_ids": [2], "pad_token_id": 0}
    prompts = [tokenizer(row["prompt"], add_special_tokens=False)["input_ids"] for row in rows]
    answers = [tokenizer.decode(ids).strip() for ids in generate(plain, prompts, **options)]
    assert answers == [row["response"] for row in rows]


def test_gradients_are_the_same_after_the_model_has_answered(tmp_path):
    config = configuration(tmp_path, "run", {"name": "lora", "r": 4, "lora_dropout": 0.0})
    model = holdfast.runner.load.load_model(prepare(resolve(load_config(config)))).train()
    for name, p in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p)
    batch = {key: t.to(DEVICE) for key, t in pad_rows(tiny_rows(4)).items()}
    found = []
    for _ in range(2):
        model.zero_grad()
        model(**batch).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        generate(model, [[5, 6, 7]], max_new_tokens=2, batch_size=1, eos_token_ids=[2], pad_token_id=0)
    assert all(torch.equal(g, found[1][name]) and g.any() for name, g in found[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("tuner", FROZEN)
def test_every_tuner_that_leaves_the_weights_alone_trains_on_quantised_ones(tuner, tmp_path):
    matrix = run(configuration(tmp_path, "run", tuner))
    assert None not in matrix["scores"][-1]
    [one, two] = (
        load_file(next((tmp_path / "run" / "stages" / stage / "adapter").glob("adapter_model.safetensors")))
        for stage in ("01-red", "02-green")
    )
    assert any(not torch.equal(one[key], two[key]) for key in one)
