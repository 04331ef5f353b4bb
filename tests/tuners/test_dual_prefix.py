"""Dual prefixes as a PEFT type: several adapters, unloading and deleting, and files of version 0.1.0."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file

from holdfast.engines.optimizer_state import load_optimizer, save_optimizer
from holdfast.errors import ConfigError
from holdfast.runner.load import trained_weights
from holdfast.system.files import read_json, write_json
from holdfast.training.method_state import load_states
from holdfast.tuners.dual_prefix import DualPrefix, DualPrefixConfig
from support import peft_contract as contract
from support.peft_contract import BATCH, INPUTS, base, fill, logits

TOKENS = INPUTS["attention_mask"].bool()
"""Where there is a token: positions of padding are others than the base model's."""


def make(**options):
    return DualPrefixConfig(**{"task_type": "CAUSAL_LM", "general_length": 2, "expert_length": 3} | options)


def test_it_is_saved_and_loaded(tmp_path):
    contract.is_saved_and_loaded(make, tmp_path)


def test_it_can_be_switched_off_and_taken_off():
    model = fill(get_peft_model(base(), make()))
    on = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model)[TOKENS], logits(base())[TOKENS])
    assert torch.equal(logits(model), on)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), logits(base()))
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert unloaded.state_dict().keys() == base().state_dict().keys() and not hasattr(unloaded, "peft_config")


def test_it_is_not_merged():
    contract.says_why_it_cannot_be_merged(make, r"stand before the input and change no weight.*unload\(\)")


def test_gradient_checkpointing_and_generation():
    contract.works_with_gradient_checkpointing(make)
    contract.generates(make)


def test_several_in_one_model():
    """An inactive one changes nothing, each gives what it gives alone, and the last can be deleted, too."""
    two = partial(make, general_layers=0, expert_length=4)
    alone = {}
    for number, (name, kind) in enumerate((("one", make), ("two", two))):
        single = fill(get_peft_model(base(), kind(), adapter_name=name), seed=number)
        alone[name] = logits(single), dict(single.named_parameters())
    model = get_peft_model(base(), make(), adapter_name="one")
    fill(model, seed=0)
    model.add_adapter("two", two())
    assert torch.equal(logits(model), alone["one"][0])
    assert all(".one." in name for name, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".two." in name:
                p.copy_(alone["two"][1][name])
    model.set_adapter("two")
    assert torch.equal(logits(model), alone["two"][0])
    assert all(".two." in name for name, p in model.named_parameters() if p.requires_grad)
    model.base_model.set_adapter(["one", "two"])
    assert not any(torch.allclose(logits(model), found, atol=1e-3) for found, _ in alone.values())
    both = logits(model)
    model.base_model.finish()
    with model.base_model.using(torch.tensor([0, 0, 0, 0])):
        torch.testing.assert_close(logits(model), both)
    model.delete_adapter("two")
    assert torch.equal(logits(model), alone["one"][0]) and model.base_model.tasks == 1
    model.delete_adapter("one")
    assert torch.equal(model.base_model(**INPUTS).logits[TOKENS], logits(base())[TOKENS])
    assert not any(".dual_prefix_" in name for name in model.state_dict())


def test_without_memory_of_its_own_until_it_is_loaded(tmp_path):
    model = fill(get_peft_model(base(), make()))
    model.base_model.finish()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), str(tmp_path), low_cpu_mem_usage=True)
    loaded.load_adapter(str(tmp_path), "other", low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded), logits(model)) and loaded.base_model.tasks == 1
    bare = base()
    inject_adapter_in_model(make(), bare, low_cpu_mem_usage=True)
    assert {p.is_meta for name, p in bare.named_parameters() if ".dual_prefix_" in name} == {True}


def test_every_trained_tensor_gets_a_gradient():
    """As plain Trainer on several processes needs it; that of the task's key is zero, as the loss does not see it."""
    model = fill(get_peft_model(base(), make()))
    model(**BATCH).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5 and all(".dual_prefix_" in name for name in trained)
    assert {name for name, p in trained.items() if not p.grad.any()} == {n for n in trained if "task_key" in n}


def test_a_padded_batch_of_embeddings():
    model = fill(get_peft_model(base(), make()))
    inputs = {"inputs_embeds": model.get_input_embeddings()(INPUTS["input_ids"])} | INPUTS
    inputs.pop("input_ids")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, logits(model))


@pytest.mark.parametrize("options", [{"general_layers": -1}, {"general_length": 0}, {"expert_length": 0}])
def test_wrong_options_are_named_in_plain_peft(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        DualPrefixConfig(**options)


def test_targets_that_are_no_attention():
    with pytest.raises(ConfigError, match=r"target_modules: model.layers.0.mlp is a LlamaMLP, not the attention"):
        get_peft_model(base(), make(target_modules=["layers.0.mlp"]))
    model = get_peft_model(base(), make(target_modules=["layers.1.self_attn"], general_layers=0))
    model.add_adapter("all", make())
    assert [len(layer.dual_prefix_keys) for layer in model.base_model.prefixes] == [1, 2]


# --- what version 0.1.0 wrote ---


def former(name: str) -> str:
    """The name of version 0.1.0, in which a tensor's place was its layer's number."""
    layer, part, rest = re.search(r"layers\.(\d)\.self_attn\.dual_prefix_(\w+?)s?\.(?:default\.)?(\w+)", name).groups()
    return f"base_model.key.{rest}" if part == "task_key" else f"base_model.prefixes.{layer}.{part}.{rest}"


def test_files_of_version_0_1_0_are_read(tmp_path):
    tuner, model = DualPrefix(general_length=2, expert_length=3), fill(get_peft_model(base(), make()))
    model.base_model.finish()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    old = {former(name): t for name, t in load_file(file).items()}
    assert {"base_model.prefixes.0.key.now", "base_model.prefixes.1.value.past", "base_model.key.now"} <= set(old)
    save_file(old, file)
    settings = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", {k: v for k, v in settings.items() if not k.endswith("_modules")})
    here = tuner.prepare(base())
    tuner.load(here, tmp_path)
    by_peft = hasattr(BaseTuner, "_remap_adapter_state_dict_for_load")  # since PEFT 0.21
    for loaded in (here, PeftModel.from_pretrained(base(), str(tmp_path))) if by_peft else (here,):
        assert torch.equal(logits(loaded), logits(model)) and loaded.base_model.tasks == 1

    class Unnamed(torch.nn.Module):
        """A model whose trained tensors have the old names."""

        def named_parameters(self, *args, **kwargs):
            return [(former(name), p) for name, p in model.named_parameters() if p.requires_grad]

    assert trained_weights(model, former=True) == trained_weights(Unnamed()) != trained_weights(model)


def test_a_checkpoint_of_version_0_1_0_goes_on(tmp_path):
    """Its optimizer's state and that of its methods are by the old names."""
    model = fill(get_peft_model(base(), make()))
    trained = [p for p in model.parameters() if p.requires_grad]

    def adam():
        return torch.optim.AdamW(trained, lr=1e-3)

    optimizer = adam()
    model(**BATCH).loss.backward()
    optimizer.step()
    save_optimizer(optimizer, model, tmp_path)
    tensors, values = load_file(tmp_path / "optimizer.safetensors"), read_json(tmp_path / "optimizer.json")
    old = {former(key) + "/" + key.rpartition("/")[2]: t for key, t in tensors.items()}
    save_file(old, tmp_path / "optimizer.safetensors")
    for group in values["groups"]:
        group["params"] = [former(name) for name in group["params"]]
    write_json(tmp_path / "optimizer.json", values, exact=True)
    again = adam()
    load_optimizer(again, model, tmp_path)
    assert all(torch.equal(again.state[p]["exp_avg"], optimizer.state[p]["exp_avg"]) for p in trained)

    class Kept:
        name = "kept"

        def load_state(self, state, model):
            self.state = state

    names = [name for name, p in model.named_parameters() if p.requires_grad]
    save_file({f"fisher/{former(name)}": torch.ones(1) for name in names}, tmp_path / "kept.safetensors")
    write_json(tmp_path / "kept.json", {"tasks": 1})
    method = Kept()
    load_states([method], tmp_path, model)
    assert set(method.state) == {"tasks", *(f"fisher/{name}" for name in names)}
