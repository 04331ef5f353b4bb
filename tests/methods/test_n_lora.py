"""N-LoRA: the loss against a plain loop, updates that become sparse, earlier ones that stay, and resuming."""

from __future__ import annotations

import pytest
import torch

from holdfast.api.stage import Step
from holdfast.engines.vectors import gradients
from holdfast.methods.n_lora import NLoRA
from holdfast.methods.parts.stacked_lora import PAST
from holdfast.tuners.lora_factors import factors
from support.lora import equals_penalty, lora_model, shake
from support.tiny import tiny_stage
from support.trained import trained


def begun(strength, stages=1):
    """A model in training after some stages, with a random adapter, its method and the stage."""
    model, method = lora_model(), NLoRA(strength=strength)
    for t in range(1, stages + 1):
        stage = tiny_stage(model, [], index=t)
        method.before_stage(stage)
        shake(model, seed=t)
        if t < stages:
            method.final_weights(stage)
    return model, method, stage


@pytest.mark.parametrize("stages", [1, 2])
def test_value_and_gradient_are_those_of_a_plain_loop_over_all_entries(stages):
    model, method, stage = begun(0.3, stages)
    new = {key: w.clone().requires_grad_() for key, w in factors(model).items()}
    loss = torch.zeros(())
    for key, a in new.items():
        if key.endswith("lora_A"):
            b = new[key.removesuffix("A") + "B"]
            for row in b:
                for column in a.T:
                    loss = loss + 0.3 * (row * column).sum().abs()
    equals_penalty(method, stage, new, loss, atol=1e-4)


def test_a_new_adapter_begins_without_a_gradient_of_its_own():
    """Where B is zero so is the update, and the sign of zero is zero."""
    model, method = lora_model(), NLoRA(strength=1.0)
    stage = tiny_stage(model, [])
    method.before_stage(stage)
    assert method.after_backward(Step(stage, 0, 4, 1, logged=True), gradients(model)) == {"n_lora": 0.0}
    assert not any(g.any() for g in gradients(model))


class Watched(NLoRA):
    """Records the new update at the end of each stage's training, and the past factors at both ends of it."""

    name = "watched_n_lora"

    def before_stage(self, stage):
        super().before_stage(stage)
        self.past = {key: w.clone() for key, w in factors(stage.model, PAST).items()}

    def final_weights(self, stage):
        new = factors(stage.model)
        updates = [new[key.removesuffix("A") + "B"] @ a for key, a in new.items() if key.endswith("lora_A")]
        self.size = sum(u.abs().sum() for u in updates).item()
        assert all(torch.equal(w, self.past[key]) for key, w in factors(stage.model, PAST).items())
        super().final_weights(stage)


def test_updates_are_smaller_with_the_term_and_earlier_ones_stay(tmp_path):
    sizes = []
    for strength in (0.0, 1e-3):
        method = Watched(strength=strength)
        trainer = trained(tmp_path, model=lora_model(), method=method, stages=2, args={"num_train_epochs": 3})
        sizes.append(method.size)
        assert method.past and any("term/watched_n_lora" in log for log in trainer.state.log_history) == bool(strength)
    assert sizes[1] < 0.8 * sizes[0]
