"""Sequential LoRA merging: the merged update against each paper's formula by brute force, and a stage's start."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.seq_lora_merge import SeqLoRAMerge
from holdfast.training.method_state import load_states, save_states
from holdfast.tuners.lora_factors import exchange_adapters, factors, scalings
from support.lora import killed_in_stage_2_equals_unbroken, logits, lora_model, saved_ranks, shake
from support.tiny import tiny_model, tiny_stage
from support.trained import trained

FULL = 32
"""A rank at which no layer of the tiny model loses anything."""


def updates(model, values=None, scaling=None):
    """scaling * B A of every layer, [out, in]."""
    values, scaling = values or factors(model), scaling or scalings(model)
    return {key[:-7]: scaling[key] * w @ values[f"{key[:-7]}.lora_A"] for key, w in values.items() if key in scaling}


def after_stages(method, model, stages):
    """Run stages without training; return the updates that each learned."""
    learned = []
    for t in range(1, stages + 1):
        method.before_stage(tiny_stage(model, [], index=t))
        shake(model, seed=t)
        learned.append(updates(model))
        method.final_weights(tiny_stage(model, [], index=t))
        method.after_stage(tiny_stage(model, [], index=t))
    return learned


def kept_largest(d, density):
    """Entries of d but the smallest."""
    order = sorted(range(d.numel()), key=lambda i: -abs(d.flatten()[i].item()))
    kept = torch.zeros(d.numel())
    for i in order[: int(density * d.numel())]:
        kept[i] = d.flatten()[i]
    return kept.reshape(d.shape)


def elected(parts, weights):
    """TIES' second and third step, entry by entry."""
    result = torch.zeros_like(parts[0])
    for row in range(result.shape[0]):
        for column in range(result.shape[1]):
            entries = [part[row, column].item() for part in parts]
            sign = 1 if sum(entries) >= 0 else -1
            agreeing = [w * e for w, e in zip(weights, entries, strict=True) if e * sign > 0]
            result[row, column] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return result


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 5}}])
@pytest.mark.parametrize("weights", [None, 0.4, [1.0, -0.5, 2.0, 7.0]])
def test_task_arithmetic_is_the_exact_sum_of_the_updates(weights, options):
    model = lora_model(**options)
    learned = after_stages(SeqLoRAMerge(weights=weights), model, 3)
    w = {None: [1 / 3] * 3, 0.4: [0.4] * 3}[weights] if not isinstance(weights, list) else weights[:3]
    for layer, found in updates(model).items():
        torch.testing.assert_close(found, sum(x * d[layer] for x, d in zip(w, learned, strict=True)))
    assert model.peft_config["default"].r == 3 * (5 if "rank_pattern" in options else 3)


@pytest.mark.parametrize("weights", [None, [0.5, 1.5, 1.0]])
def test_ties_is_the_formula_entry_by_entry(weights):
    model = lora_model()
    learned = after_stages(SeqLoRAMerge(merge="ties", density=0.3, weights=weights, rank=FULL), model, 3)
    for layer, found in updates(model).items():
        parts = [kept_largest(d[layer], 0.3) for d in learned]
        torch.testing.assert_close(found, elected(parts, weights or [1.0] * 3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", ["dare_linear", "dare_ties"])
def test_dare_is_the_formula_with_random_masks(merge, monkeypatch):
    masks, original = [], torch.bernoulli
    monkeypatch.setattr(torch, "bernoulli", lambda share: masks.append(original(share)) or masks[-1])
    model = lora_model()
    learned = after_stages(SeqLoRAMerge(merge=merge, density=0.3, rank=FULL), model, 2)
    drawn = iter(masks)
    for layer, found in updates(model).items():
        parts = [next(drawn) * d[layer] / 0.3 for d in learned]
        expected = sum(parts) / 2 if merge == "dare_linear" else elected(parts, [1.0, 1.0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    every = torch.cat([mask.flatten() for mask in masks])
    assert abs(every.mean() - 0.3) < 0.02 and len(every) == 2 * sum(d.numel() for d in learned[0].values())


def test_another_stage_draws_other_masks_and_the_same_stage_the_same():
    def merged(index):
        model = lora_model()
        method = SeqLoRAMerge(merge="dare_linear")
        after_stages(method, model, 1)
        stage = tiny_stage(model, [], index=2)
        method.before_stage(stage)
        shake(model, seed=2)
        stage.index = index
        torch.manual_seed(torch.seed())
        method.final_weights(stage)
        return updates(model)

    one, same, other = merged(2), merged(2), merged(3)
    assert all(torch.equal(one[layer], same[layer]) for layer in one)
    assert not any(torch.equal(one[layer], other[layer]) for layer in one)


def test_a_smaller_rank_is_the_best_approximation_of_that_rank():
    whole, cut = lora_model(), lora_model()
    after_stages(SeqLoRAMerge(), whole, 3)
    after_stages(SeqLoRAMerge(rank=4), cut, 3)
    assert cut.peft_config["default"].r == 4
    exact = updates(whole)
    for layer, found in updates(cut).items():
        u, s, v = torch.linalg.svd(exact[layer])
        torch.testing.assert_close(found, u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-4)
        assert s[4] > 1e-3  # something was cut off


@pytest.mark.parametrize("merge", ["linear", "ties", "dare_linear", "dare_ties"])
def test_the_merged_adapter_gives_the_same_logits_in_plain_peft(merge, tmp_path):
    model = lora_model()
    after_stages(SeqLoRAMerge(merge=merge), model, 2)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*/adapter_config.json"))
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)
    assert (logits(model) - logits(tiny_model())).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["fresh", "last"])
def test_a_stage_trains_the_first_initial_adapter_or_the_last_own_one(start):
    model = lora_model(lora_dropout=0.2)
    initial = {key: w.clone() for key, w in factors(model).items()}
    method = SeqLoRAMerge(start=start)
    after_stages(method, model, 2)
    own = method.learned[-1]
    method.before_stage(tiny_stage(model, [], index=3))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 10, 0.2)
    for key, w in factors(model).items():
        assert torch.equal(w, (initial if start == "fresh" else own)[key])
        assert w.any() or start == "fresh"
    assert sum(p.requires_grad for p in model.parameters()) == len(initial)


def test_a_single_stage_is_not_merged_and_equals_sequential_bit_for_bit(tmp_path):
    ours = trained(tmp_path, model=lora_model(), method={"name": "seq_lora_merge", "merge": "ties"})
    plain = trained(tmp_path, model=lora_model(), method="sequential")
    for key, w in factors(plain.model).items():
        assert torch.equal(w, factors(ours.model)[key])
    ours.train()
    method = ours.methods[0]
    moved = [bool((method.learned[1][key] - method.start[key]).any()) for key in method.start]
    assert all(moved)  # the second stage's optimizer held the second stage's adapter


def test_its_state_goes_on_in_a_fresh_process_and_without_it_the_next_stage_is_refused(tmp_path):
    model, method = lora_model(), SeqLoRAMerge(merge="dare_ties")
    after_stages(method, model, 2)
    save_states([method], tmp_path)
    fresh = SeqLoRAMerge(merge="dare_ties")
    copy = lora_model(seed=0)
    values = {key: w.clone() for key, w in factors(model).items()}
    exchange_adapters(copy, {"default": (model.peft_config["default"], values)})
    with pytest.raises(ConfigError, match="adapters of 0 stages are known"):
        fresh.before_stage(tiny_stage(copy, [], index=3))
    load_states([fresh], tmp_path, copy)
    for one, its_model in ((method, model), (fresh, copy)):
        one.before_stage(tiny_stage(its_model, [], index=3))
        shake(its_model, seed=3)
        one.final_weights(tiny_stage(its_model, [], index=3))
    for key, w in factors(model).items():
        assert torch.equal(w, factors(copy)[key])


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="density: would change nothing"):
        build([("seq_lora_merge", {"density": 0.5})])
    with pytest.raises(ConfigError, match="'o_lora' and 'seq_lora_merge' cannot be applied together"):
        build([("o_lora", {}), ("seq_lora_merge", {})])
    with pytest.raises(ConfigError, match="weights has 1 entries, but there are 2 stages"):
        trained(tmp_path, model=lora_model(), method={"name": "seq_lora_merge", "weights": [1.0]}, stages=2)


@pytest.mark.slow  # test_guards kills every method
def test_killed_in_stage_2_and_continued_in_another_process_equals_unbroken(tmp_path):
    killed_in_stage_2_equals_unbroken(tmp_path, {"name": "seq_lora_merge", "merge": "dare_ties"})
    assert saved_ranks(tmp_path / "whole") == [3, 6]
