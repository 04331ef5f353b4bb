"""CLoRA: the penalty against its formula, its directions, what the null space means, and resuming."""

from __future__ import annotations

import pytest
import torch

from holdfast.api.stage import Step
from holdfast.engines.vectors import gradients
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.clora import CLoRA
from holdfast.tuners.lora_factors import factors
from support.lora import equals_penalty, lora_model, shake
from support.tiny import tiny_model, tiny_stage
from support.trained import trained


def begun(**options):
    model, method = lora_model(), CLoRA(**options)
    stage = tiny_stage(model, [])
    method.before_stage(stage)
    shake(model, seed=1)
    return model, method, stage


@pytest.mark.parametrize("directions", [None, 3])
def test_value_and_gradient_are_those_of_a_plain_loop(directions):
    model, method, stage = begun(strength=0.7, directions=directions)
    new = {key: w.clone().requires_grad_() for key, w in factors(model).items()}
    loss = torch.zeros(())
    for key, w in new.items():
        for row in w if key.endswith("lora_A") else w.T:
            for direction in method.fixed[key].T:
                loss = loss + 0.7 / 2 * (row * direction).sum() ** 2
    equals_penalty(method, stage, new, loss)


def test_directions_are_orthonormal_of_the_right_number_and_of_each_layer_its_own():
    model, method, _ = begun()
    for key, w in factors(model).items():
        p = method.fixed[key]
        assert p.shape == ((w.shape[1], w.shape[1] // 2) if key.endswith("lora_A") else (len(w), len(w) // 2))
        torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]), rtol=0, atol=1e-5)
    of_one_shape = [p for p in method.fixed.values() if p.shape == (16, 8)]
    assert len(of_one_shape) > 3 and not any(torch.equal(of_one_shape[0], p) for p in of_one_shape[1:])


def test_a_factor_that_is_not_trained_has_no_term():
    model, method = lora_model(), CLoRA()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    stage = tiny_stage(model, [])
    method.before_stage(stage)
    shake(model, seed=1)
    [value] = method.after_backward(Step(stage, 0, 4, 1, logged=True), gradients(model)).values()
    expected = sum((method.fixed[key].T @ w).square().sum() / 2 for key, w in factors(model).items() if "lora_B" in key)
    assert value == pytest.approx(float(expected), rel=1e-5)


def test_they_are_those_of_the_runs_first_seed_in_every_stage_and_process():
    model, method, stage = begun()
    first = dict(method.fixed)
    method.after_stage(stage)
    again = CLoRA()
    again.load_state(method.state(), model)
    for other in (method, again):
        later = tiny_stage(model, [], index=2)
        later.seed = 77
        other.before_stage(later)
        assert all(torch.equal(p, first[key]) for key, p in other.fixed.items())


class Watched(CLoRA):
    """Records, of every layer, how much of the update meets the fixed directions, at the end of a stage's training."""

    name = "watched_clora"

    def final_weights(self, stage):
        model, self.shares = stage.model, []
        new = factors(model)
        for key, a in new.items():
            if key.endswith("lora_A"):
                other = key.removesuffix("A") + "B"
                update = new[other] @ a
                p_a, p_b = self.fixed[key], self.fixed[other]
                self.shares += [(update @ p_a).norm() / update.norm(), (p_b.T @ update).norm() / update.norm()]


def test_the_update_leaves_the_directions_alone_and_without_the_penalty_it_does_not(tmp_path):
    shares = []
    for strength in (0.0, 100.0):
        method = Watched(strength=strength)
        trained(tmp_path, model=lora_model(), method=method, stages=2, args={"num_train_epochs": 12})
        shares.append(torch.stack(method.shares).mean().item())
    assert shares[0] > 0.6 and shares[1] < 0.25, shares


def test_what_it_cannot_work_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="needs LoRA adapters"):
        trained(tmp_path, model=tiny_model(), method="clora")
    with pytest.raises(ConfigError, match=r"directions is 17, but .*lora_A has 16 dimensions: at most 16"):
        trained(tmp_path, model=lora_model(), method={"name": "clora", "directions": 17})
    with pytest.raises(ConfigError, match="cannot be applied together: it sets A"):
        build([("clora", {}), ("inflora", {})])
