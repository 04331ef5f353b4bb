"""GainLoRA: the gate against its equation, what it keeps closed, the gated forward pass, test time, and resuming."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from holdfast import load_config
from holdfast.api.rows import prompt
from holdfast.data.collate import pack
from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.methods.gain_lora import GATE, GainLoRA
from holdfast.methods.inflora import adapted
from holdfast.methods.parts.gates import LAYERS, Gate, coefficients, features, pooled_prompts
from holdfast.runner.setup import prepare, resolve
from holdfast.tuners.lora_factors import factors
from support.lora import lora_model
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage
from support.trained import trained


def gate(seed=0, width=16, hidden=6):
    torch.manual_seed(seed)
    shapes = {"first": (hidden, width), "second": (width, hidden), "last": (1, width)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def silu(x):
    return x / (1 + math.exp(-x))


def test_a_coefficient_is_that_of_a_plain_loop():
    weights, pooled = gate(), torch.randn(5, 16)
    for row, found in zip(pooled.tolist(), coefficients(weights, pooled), strict=True):
        p = row
        for name in ("first", "second"):
            p = [silu(sum(w * x for w, x in zip(line, p, strict=True))) for line in weights[name].tolist()]
        [key] = weights["last"].tolist()
        size = math.sqrt(sum(x * x for x in p)) * math.sqrt(sum(w * w for w in key))
        b = 4 * sum(w * x for w, x in zip(key, p, strict=True)) / size
        assert found.item() == pytest.approx(abs(2 / (1 + math.exp(-b)) - 1), abs=1e-5)


def test_a_gate_that_is_orthogonal_is_closed_and_its_gradient_is_that_of_differences():
    weights, pooled = gate(), torch.randn(3, 16)
    key = features(weights, pooled)["last"]
    last = torch.linalg.qr(key.T, mode="complete").Q[:, -1:].T
    assert coefficients(weights | {"last": last}, pooled).abs().max() < 1e-5
    module = Gate(weights).double()
    module(pooled.double()).sum().backward()
    for name, p in module.named_parameters():
        change = torch.zeros_like(p)
        change[0, 1] = 1e-6
        moved = {n: w.double() + (change if n == name else 0) for n, w in weights.items()}
        other = {n: w.double() - (change if n == name else 0) for n, w in weights.items()}
        slope = (coefficients(moved, pooled.double()) - coefficients(other, pooled.double())).sum() / 2e-6
        assert p.grad[0, 1].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-8)


def test_autocast_does_not_change_a_coefficient():
    weights, pooled = gate(), torch.randn(3, 16)
    expected = coefficients(weights, pooled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(coefficients(weights, pooled), expected)


def trained_by_hand(stages, rows, **options):
    """Stages whose branches and gates move at random, as far as the method lets them."""
    model, method = lora_model(), GainLoRA(gate_width=8, **options)
    for t in range(1, stages + 1):
        stage = tiny_stage(model, rows[t - 1], index=t)
        method.before_stage(stage)
        for name, w in weights(model).tensors.items():
            torch.manual_seed(t)
            w.add_(0.3 * torch.randn_like(w) * (1.0 if GATE in name or "lora_B" in name else 0.0))
        method.after_step(None, weights(model))
        yield model, method, stage


def end(method, stage):
    method.final_weights(stage)
    method.after_stage(stage)


def test_the_layer_computes_the_gated_sum_for_each_row():
    rows = [tiny_rows(6, seed=t) for t in (1, 2, 3)]
    branches = []
    for model, method, stage in trained_by_hand(3, rows, threshold=0.5, gate_threshold=0.5):
        branches.append({key: w.clone() for key, w in factors(model).items()})
        if stage.index < 3:
            end(method, stage)
    batch = pad_rows(rows[2])
    name, layer = next(iter(adapted(model).items()))
    seen = {}
    handle = layer.register_forward_hook(lambda layer, args, output: seen.update(x=args[0], y=output))
    model.eval()
    model(**batch)
    handle.remove()
    embedding = model.get_input_embeddings().weight
    for number, row in enumerate(rows[2]):
        ids = prompt(row)
        pooled = embedding[ids].mean(0, keepdim=True)
        gates = [*method.gates, {layer_name: getattr(getattr(model, GATE), layer_name) for layer_name in LAYERS}]
        x = seen["x"][number]
        expected = layer.get_base_layer()(x)
        for branch, weights_of in zip(branches, gates, strict=True):
            a = coefficients(weights_of, pooled).item()
            assert 0 <= a < 1
            expected = (
                expected + a * layer.scaling["default"] * x @ branch[f"{name}.lora_A"].T @ branch[f"{name}.lora_B"].T
            )
        tokens = len(row["input_ids"])
        torch.testing.assert_close(seen["y"][number, :tokens], expected[:tokens], rtol=1e-4, atol=1e-4)


def test_without_labels_the_prompts_of_known_rows_are_the_same():
    rows = tiny_rows(5, seed=1)
    for model, method, _ in trained_by_hand(1, [rows]):
        batch = pad_rows(rows)
        model.eval()
        with torch.no_grad():
            known = model(**batch).logits
            batch.pop("labels")
            assert torch.equal(model(**batch).logits, known)
            batch["input_ids"] = batch["input_ids"].clone()
            batch["input_ids"][:, -1] += 1  # unknown rows: all tokens count
            assert method.gating.now.shape == (5, 1)


class Watched(GainLoRA):
    """Records the coefficients of rows when a stage begins and ends."""

    name = "watched_gain_lora"

    def look(self, model, rows):
        pooled = pooled_prompts(model, rows, pad_rows, 4)
        with torch.no_grad():
            return getattr(model, GATE)(pooled)

    def before_stage(self, stage):
        super().before_stage(stage)
        self.begin = self.look(stage.model, self.old), self.look(stage.model, stage.rows)

    def final_weights(self, stage):
        self.end = self.look(stage.model, self.old), self.look(stage.model, stage.rows)
        super().final_weights(stage)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_the_new_gate_stays_closed_for_old_prompts_and_their_logits_do_not_change(optimizer, tmp_path):
    old, method = tiny_rows(3, seed=5), Watched(gate_threshold=1.0, threshold=0.9, gate_width=12)
    method.old = old
    args = {"max_steps": 6, "optim": optimizer, "weight_decay": 0.1, "learning_rate": 0.03}
    trainer = trained(tmp_path, rows=old, model=lora_model(), method=method, args=args)
    batch = {key: t for key, t in pad_rows(old).items() if key != "labels"}
    before = logits_of(trainer.model, batch)
    trainer.train_dataset = tiny_rows(16, seed=6)
    trainer.train()
    (old_begin, new_begin), (old_end, new_end) = method.begin, method.end
    assert old_begin.max() < 1e-4 and old_end.max() < 1e-4
    assert new_begin.max() > 0.05 and (new_end - new_begin).abs().max() > 1e-4
    torch.testing.assert_close(logits_of(trainer.model, batch), before, rtol=0, atol=1e-3)
    assert method.gating.model is trainer.model and not hasattr(trainer.model, GATE)


def logits_of(model, batch):
    model.eval()
    with torch.no_grad():
        result = model(**batch).logits
    model.train()
    return result


def test_gate_and_b_are_trained_and_nothing_else(tmp_path):
    for model, _, _ in trained_by_hand(1, [tiny_rows(4)]):
        names = set(weights(model).tensors)
        assert {name for name in names if "lora_B" not in name} == {f"{GATE}.{name}" for name in LAYERS}


def test_at_test_each_prompt_has_its_coefficients_and_generation_goes_on_with_them():
    rows = [tiny_rows(6, seed=t) for t in (1, 2)]
    for now, method, stage in trained_by_hand(2, rows, threshold=0.5, gate_threshold=0.5):
        end(method, stage)
        model = now
    test = [*rows[0][:3], rows[0][0]]
    model.eval()
    with torch.no_grad():
        expected = [model(**pad_rows([row])).logits for row in test]
        asked = [torch.tensor([prompt(row)]) for row in test]
        greedy = [model.generate(input_ids=ids, max_new_tokens=3, do_sample=False) for ids in asked]
    method.gating.detach()
    evaluation = SimpleNamespace(model=model, collate=pad_rows, batch_size=2)
    with torch.no_grad():
        places = []
        for part in method.at_test(evaluation, test):
            places.append(list(part))
            for i in part:
                batch = pad_rows([test[i]])
                batch.pop("labels")
                torch.testing.assert_close(model(**batch).logits, expected[i], rtol=1e-4, atol=1e-5)
                assert torch.equal(model.generate(input_ids=asked[i], max_new_tokens=3, do_sample=False), greedy[i])
        assert sorted(place for part in places for place in part) == [0, 1, 2, 3] and [0, 3] in places
        assert method.gating.model is None and method.gating.fixed is None
        plain = model(**pad_rows([test[0]])).logits
    assert (plain - expected[0]).abs().max() > 1e-3


def test_a_state_gives_the_same_answers():
    rows = [tiny_rows(6, seed=t) for t in (1, 2)]
    for now, method, stage in trained_by_hand(2, rows):
        end(method, stage)
        model = now
    again = GainLoRA(gate_width=8)
    again.load_state(method.state(), model)
    a, b = method.state(), again.state()
    assert a.keys() == b.keys()
    assert all(torch.equal(t, b[key]) if isinstance(t, torch.Tensor) else t == b[key] for key, t in a.items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"training": {"gradient_checkpointing": True}},
            r"training\.gradient_checkpointing: method gain_lora: a branch",
        ),
        ({"data": {"packing": True}}, r"data\.packing: method gain_lora: needs every row in a sequence of its own"),
    ],
)
def test_a_run_that_it_cannot_work_with_is_refused_before_there_is_a_model(changes, said, tmp_path):
    config = tiny_config(tmp_path, method="gain_lora", tuner={"name": "lora", "r": 4})
    for section, values in changes.items():
        config[section] = config.get(section, {}) | values
    with pytest.raises(ConfigError, match=said):
        prepare(resolve(load_config(config)))


def test_what_it_cannot_work_with_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="one LoRA adapter"):
        trained(tmp_path, model=tiny_model(), method="gain_lora")
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: .*turn it off"):
        trained(tmp_path, model=lora_model(), method="gain_lora", args={"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match=r"method gain_lora: needs every row in a sequence of its own"):
        trained(tmp_path, model=lora_model(), method="gain_lora", rows=pack(tiny_rows(6), 32))
    trainer = trained(tmp_path, model=lora_model(), method={"name": "gain_lora", "gate_threshold": 1.0})
    with pytest.raises(ConfigError, match="fill every input of the gate's last layer"):
        trainer.train()
