"""O-LoRA: the loss against plain loops, what a stage may change, one plain adapter at its end, and resuming."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel

from holdfast.api.stage import Step
from holdfast.engines.vectors import gradients
from holdfast.errors import ConfigError, MethodError
from holdfast.methods import build
from holdfast.methods.o_lora import PAST, OLoRA
from holdfast.runner.load import trained_weights
from holdfast.tuners.lora import Lora
from holdfast.tuners.lora_factors import exchange_adapters, factors
from support.lora import killed_in_stage_2_equals_unbroken, logits, lora_model, saved_ranks, shake
from support.tiny import tiny_model, tiny_stage
from support.trained import trained


def after_stages(method, model, stages):
    """Run stages without training; return the factors after each stage."""
    ends = []
    for t in range(1, stages + 1):
        method.before_stage(tiny_stage(model, [], index=t))
        shake(model, seed=t)
        ends.append({key: w.clone() for key, w in factors(model).items()})
        method.final_weights(tiny_stage(model, [], index=t))
    return ends


@pytest.mark.parametrize("penalty", ["squared", "absolute"])
def test_the_gradient_is_that_of_a_plain_loop_over_all_past_adapters(penalty):
    model = lora_model()
    method = OLoRA(lambda_1=0.7, lambda_2=0.4, penalty=penalty)
    past = after_stages(method, model, 2)
    stage = tiny_stage(model, [], index=3)
    method.before_stage(stage)
    shake(model, seed=3)
    new = {key: w.clone().requires_grad_() for key, w in factors(model).items()}
    loss, norms = torch.zeros(()), torch.zeros(())
    for key, w in new.items():
        norms = norms + 0.4 * (w**2).sum().sqrt()
        if key.endswith("lora_A"):
            for earlier in past:
                for a in earlier[key]:
                    for b in w:
                        product = (a * b).sum()
                        loss = loss + 0.7 * (product**2 if penalty == "squared" else product.abs())
    (loss + norms).backward()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0) if p.requires_grad else None
    values = method.after_backward(Step(stage, 0, 4, 1, logged=True), gradients(model))
    assert method.declares(stage) == tuple(values) == ("o_lora", "o_lora/norm")
    assert values["o_lora"] == pytest.approx(loss.item(), rel=1e-4)
    assert values["o_lora/norm"] == pytest.approx(norms.item(), rel=1e-4)
    found = dict(model.named_parameters())
    for key, w in new.items():
        torch.testing.assert_close(found[f"{key}.default.weight"].grad, 2.0 + w.grad, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_has_a_finite_gradient_of_its_norm_where_b_is_zero():
    model = lora_model()
    method = OLoRA(lambda_2=1.0)
    stage = tiny_stage(model, [])
    method.before_stage(stage)
    assert method.declares(stage) == ("o_lora/norm",)
    method.after_backward(Step(stage, 0, 4, 1, logged=False), gradients(model))
    for name, gradient in gradients(model).tensors.items():
        expected = 0.0 if "lora_B" in name else 1.0
        assert gradient.norm().item() == pytest.approx(expected, abs=1e-5)


def overlaps(model):
    """All entries of A_i A_t^T, absolute."""
    new, past = factors(model), factors(model, PAST)
    return torch.cat([(new[key] @ past[key].T).abs().flatten() for key in past if key.endswith("lora_A")])


class Watched(OLoRA):
    """Records the overlap at the beginning and at the end of a stage's training."""

    name = "watched_o_lora"
    begin: torch.Tensor
    end: torch.Tensor

    def before_stage(self, stage):
        super().before_stage(stage)
        if self.stages:
            self.begin = overlaps(stage.model)

    def final_weights(self, stage):
        if self.stages:
            self.end = overlaps(stage.model)
        super().final_weights(stage)


@pytest.mark.parametrize("penalty", ["squared", "absolute"])
def test_the_overlap_with_the_past_decreases_and_without_the_loss_it_does_not(penalty, tmp_path):
    ends, terms = {}, {}
    for strength in (0.0, 0.5):
        method = Watched(lambda_1=strength, penalty=penalty)
        trainer = trained(tmp_path, model=lora_model(), method=method, stages=2, args={"num_train_epochs": 4})
        ends[strength] = (method.begin.mean().item(), method.end.mean().item())
        terms[strength] = [
            log["term/watched_o_lora"] for log in trainer.state.log_history if "term/watched_o_lora" in log
        ]
    assert ends[0.0][0] == ends[0.5][0] > 0.01
    assert ends[0.5][1] < 0.5 * ends[0.5][0]
    assert ends[0.0][1] > 0.9 * ends[0.0][0]
    assert not terms[0.0] and len(terms[0.5]) > 4 and terms[0.5][-1] < 0.5 * terms[0.5][0]


def test_a_lost_past_is_reported_and_not_passed_over(tmp_path, monkeypatch):
    """The published defect: the past is empty, the loss is zero for ever, and the method is plain LoRA."""
    original = factors

    def lost(model, adapter="default"):
        return {key: w[:0] if adapter == PAST else w for key, w in original(model, adapter).items()}

    monkeypatch.setattr("holdfast.methods.o_lora.factors", lost)
    method = OLoRA()
    with pytest.raises(MethodError, match="'o_lora' was exactly zero"):
        trained(tmp_path, model=lora_model(), method=method, stages=2)
    assert method.stages == 1


def test_past_tasks_logits_change_through_the_new_adapter_alone(tmp_path):
    seen = {}

    class Looks(OLoRA):
        name = "looks_o_lora"

        def final_weights(self, stage):
            model = stage.model
            if self.stages:
                seen["both"] = logits(model)
                model.base_model.set_adapter([PAST])
                seen["past alone"] = logits(model)
                model.base_model.set_adapter(["default", PAST])
            super().final_weights(stage)
            seen[stage.index] = logits(model)
            seen[f"weights {stage.index}"] = {key: w.clone() for key, w in factors(model).items()}

    trainer = trained(tmp_path, model=lora_model(lora_dropout=0.2), method=Looks(), stages=2)
    assert torch.equal(seen["past alone"], seen[1])
    assert (seen["both"] - seen[1]).abs().max() > 1e-3
    torch.testing.assert_close(seen[2], seen["both"], rtol=1e-5, atol=1e-5)
    for key, w in seen["weights 1"].items():
        joined = seen["weights 2"][key]
        assert torch.equal(joined[:3] if key.endswith("lora_A") else joined[:, :3], w)
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.peft_config["default"].lora_dropout == 0.2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}},
    ],
)
def test_the_stage_ends_with_one_adapter_that_gives_the_same_logits_in_plain_peft(options, tmp_path):
    model, method = lora_model(**options), OLoRA()
    scaling = {name: m.scaling["default"] for name, m in model.named_modules() if hasattr(m, "lora_A")}
    ends = after_stages(method, model, 3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 9
    assert not list(tmp_path.glob("*/adapter_config.json"))
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path)
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)

    by_hand = tiny_model()
    with torch.no_grad():
        for name, p in by_hand.named_parameters():
            layer = f"base_model.model.{name.removesuffix('.weight')}"
            if layer in scaling:
                p.add_(scaling[layer] * sum(end[f"{layer}.lora_B"] @ end[f"{layer}.lora_A"] for end in ends))
    torch.testing.assert_close(logits(model), logits(by_hand), rtol=1e-4, atol=1e-4)


def test_the_new_adapter_begins_at_zero_with_fresh_weights_and_its_own_dropout(tmp_path):
    model, method = lora_model(lora_dropout=0.3), OLoRA()
    [end] = after_stages(method, model, 1)
    before = logits(model)
    torch.manual_seed(77)
    expected = torch.rand(3)
    torch.manual_seed(77)
    method.before_stage(tiny_stage(model, [], index=2))
    assert torch.equal(torch.rand(3), expected)  # the random state is as if nothing had been drawn
    assert torch.equal(logits(model), before)
    first = {key: w.clone() for key, w in factors(model).items()}
    for key, w in first.items():
        assert bool(w.any()) == key.endswith("lora_A") and not torch.equal(w, end[key])
    assert [p.requires_grad for name, p in model.named_parameters() if f".{PAST}." in name].count(True) == 0
    assert sum(p.requires_grad for p in model.parameters()) == len(first)
    dropout = {name: m.p for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert set(dropout.values()) == {0.3} and not any(name.endswith(PAST) for name in dropout)

    again = lora_model(lora_dropout=0.3)
    exchange_adapters(again, {"default": (again.peft_config["default"], end)})
    OLoRA().before_stage(tiny_stage(again, [], index=2))  # a fresh process that knows the stage's number alone
    for key, w in factors(again).items():
        assert torch.equal(w, first[key])


def test_the_first_stage_is_sequential_bit_for_bit_and_each_optimizer_trains_the_new_adapter(tmp_path):
    ours = trained(tmp_path, model=lora_model(), method="o_lora")
    plain = trained(tmp_path, model=lora_model(), method="sequential")
    for key, w in factors(plain.model).items():
        assert torch.equal(w, factors(ours.model)[key])
    before = logits(ours.model)
    ours.train()
    held = {id(p) for group in ours.optimizer.param_groups for p in group["params"]}
    assert (logits(ours.model) - before).abs().max() > 1e-3
    assert not held & {id(p) for p in ours.model.parameters()}  # final_weights exchanged them again
    model = lora_model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match="optimizers: a method trains other parameters"):
        trained(tmp_path, model=model, method="o_lora", stages=2, optimizers=(optimizer, None))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tiny_model, "one LoRA adapter"),
        (lambda: lora_model(use_dora=True), "lora_magnitude_vector.*is trained, too"),
        (lambda: lora_model(modules_to_save=["norm"]), "norm.* is trained, too"),
        (lambda: lora_model(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    ],
)
def test_a_model_that_it_cannot_work_with_is_refused(model, reason, tmp_path):
    for name in ("o_lora", "seq_lora_merge"):
        with pytest.raises(ConfigError, match=reason):
            trained(tmp_path, model=model(), method=name)


def test_a_wrong_stage_index_and_methods_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="stage_index"):
        trained(tmp_path, model=lora_model(), method="o_lora", stage_index=3)
    with pytest.raises(ConfigError, match="'o_lora' and 'ewc' cannot be applied together"):
        build([("ewc", {}), ("o_lora", {})])


def test_the_tuner_loads_an_adapter_of_another_rank_in_a_new_process(tmp_path):
    tuner = Lora(r=3, lora_alpha=10, target_modules=["q_proj", "down_proj"])
    model = tuner.prepare(tiny_model())
    after_stages(OLoRA(), model, 3)
    tuner.save(model, tmp_path)
    other = tuner.prepare(tiny_model())
    tuner.load(other, tmp_path)
    assert trained_weights(other) == trained_weights(model)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.slow  # test_guards kills every method
def test_killed_in_stage_2_and_continued_in_another_process_equals_unbroken(tmp_path):
    _, weights, events = killed_in_stage_2_equals_unbroken(tmp_path, "o_lora")
    assert all(("o_lora" in terms) == (stage == 2) for stage, _, terms in events)
    ranks = saved_ranks(tmp_path / "whole")
    assert ranks == [3, 6] and len(weights) == 4
