"""What every PEFT type of holdfast must do in plain PEFT, checked for any configuration that makes one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from support.paths import TESTS
from support.tiny import pad_rows, tiny_model, tiny_rows

Make = Callable[..., PeftConfig]
BATCH = pad_rows(tiny_rows(4, seed=3))
INPUTS = {key: BATCH[key] for key in ("input_ids", "attention_mask")}

FRESH = """
import importlib, sys, torch
sys.path.insert(0, sys.argv[4])
importlib.import_module(sys.argv[1])
from peft import PeftModel
from safetensors.torch import save_file
from support.peft_contract import INPUTS, base
torch.set_num_threads(1)
save_file({"logits": PeftModel.from_pretrained(base(), sys.argv[2]).eval()(**INPUTS).logits.detach()}, sys.argv[3])
"""


def base() -> Any:
    """Weights so large that every layer matters."""
    return tiny_model(initializer_range=0.3).eval()


def fill(model: Any, seed: int = 1, spread: float = 0.3) -> Any:
    """Give what is trained random values, as if it had been."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(0, spread)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits.clone()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**BATCH).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def begins_at_the_base_model(make: Make) -> None:
    torch.testing.assert_close(logits(get_peft_model(base(), make()).eval()), logits(base()), rtol=0, atol=1e-5)


def begins_elsewhere_where_asked_to(make: Make) -> None:
    """``init_weights=False``, by which PEFT's shared tests see that an untrained adapter takes part."""
    model = get_peft_model(base(), make(init_weights=False)).eval()
    assert not torch.allclose(logits(model), logits(base()), atol=1e-3)
    assert torch.equal(logits(model.unload()), logits(base()))


def trains_its_own_parameters_and_all_of_them(make: Make, prefix: str) -> None:
    before = base()
    model = get_peft_model(base(), make())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(f".{prefix}" in name for name in trained)
    found = gradients(fill(model))
    assert set(found) == trained
    assert all(gradient.any() for gradient in found.values())
    own = model.unload().state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in before.state_dict().items())


def is_saved_and_loaded(make: Make, folder: Path) -> None:
    """With and without PEFT's way around weights that are made only to be overwritten."""
    model = fill(get_peft_model(base(), make()))
    model.save_pretrained(folder)
    expected = logits(model)
    assert not torch.allclose(expected, logits(base()), atol=1e-2)
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for options in ({}, {"low_cpu_mem_usage": True}):
        assert torch.equal(logits(PeftModel.from_pretrained(base(), str(folder), **options).eval()), expected)
    trainable = PeftModel.from_pretrained(base(), str(folder), is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def is_loaded_in_a_fresh_process(make: Make, module: str, folder: Path) -> None:
    """In which nothing of holdfast is imported but ``module``."""
    model = fill(get_peft_model(base(), make()))
    model.save_pretrained(folder)
    out = folder / "logits.safetensors"
    subprocess.run([sys.executable, "-c", FRESH, module, str(folder), str(out), str(TESTS)], check=True)
    assert torch.equal(load_file(out)["logits"], logits(model))


def can_be_switched_off(make: Make) -> None:
    model = fill(get_peft_model(base(), make()))
    on = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    assert torch.equal(logits(model), on)
    assert torch.equal(logits(model.unload()), logits(base()))


def can_be_one_of_several(one: Make, two: Make) -> None:
    """Two adapters of different kinds in one model: each gives what it gives alone; of both, the order is nothing."""
    alone = {}
    for name, make in (("one", one), ("two", two)):
        single = fill(get_peft_model(base(), make(), adapter_name=name), seed=len(name) + (name == "two"))
        alone[name] = (logits(single), {n: p for n, p in single.named_parameters() if f".{name}." in n})
    model = get_peft_model(base(), one(), adapter_name="one")
    model.add_adapter("two", two())
    model.eval()
    assert torch.equal(logits(model), logits(base()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            for _, weights in alone.values():
                if name in weights:
                    p.copy_(weights[name])
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        assert torch.equal(logits(model), alone[name][0])
        assert all(f".{name}." in n for n, p in model.named_parameters() if p.requires_grad)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert not any(torch.allclose(both, alone[name][0], atol=1e-3) for name in alone)
    model.base_model.set_adapter(["two", "one"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.delete_adapter("one")
    assert torch.equal(logits(model), alone["two"][0])


def says_why_it_cannot_be_merged(make: Make, reason: str) -> None:
    model = fill(get_peft_model(base(), make()))
    expected = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=reason):
            merge()
    assert torch.equal(logits(model), expected)


def works_with_gradient_checkpointing(make: Make) -> None:
    model = fill(get_peft_model(base(), make())).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model)
    assert set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, msg=name)


def works_in_bfloat16(make: Make) -> None:
    """Adapters beside bfloat16 weights are float32, as PEFT makes them; or bfloat16 where PEFT is asked to."""
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        model = get_peft_model(base().to(torch.bfloat16), make(), autocast_adapter_dtype=autocast)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        fill(model)
        assert logits(model).dtype == torch.bfloat16
        assert all(g.isfinite().all() and g.any() for g in gradients(model).values())
    exact = fill(get_peft_model(base(), make()), spread=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = logits(exact)
    assert (rounded.float() - logits(exact)).norm() < 0.05 * logits(exact).norm()


def generates(make: Make) -> None:
    """With a cache and padding on the left, what a loop without either gives."""
    model = fill(get_peft_model(base(), make()))
    model.generation_config.eos_token_id = None
    prompts = [torch.arange(5, 5 + length) for length in (3, 6)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.cat([torch.zeros(width - len(p), dtype=torch.int64), p]) for p in prompts])
    made = model.generate(input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=5, do_sample=False)
    for row, prompt in zip(made, prompts, strict=True):
        text = prompt
        for _ in range(5):
            text = torch.cat([text, model(input_ids=text[None]).logits[0, -1].argmax()[None]])
        assert torch.equal(row[-len(text) :], text)


def trains_other_modules_in_full(make: Make, folder: Path) -> None:
    """Houlsby et al. train the layer norms, too."""
    model = fill(get_peft_model(base(), make(modules_to_save=["layernorm", "model.norm"])))
    model.save_pretrained(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    assert sum("norm.weight" in name for name in saved) == 5
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(folder)).eval()), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
