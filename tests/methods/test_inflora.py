"""InfLoRA: DualGPM against a plain GPM, A against the paper's equation, what a stage may change, and resuming."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from holdfast.engines.vectors import weights
from holdfast.errors import ConfigError
from holdfast.methods.inflora import InfLoRA, adapted
from holdfast.methods.parts.input_space import InputSpace, input_covariances, spaces_from_state, spaces_state
from holdfast.tuners.lora_factors import factors
from support.lora import logits, lora_model
from support.tiny import tiny_model, tiny_rows, tiny_stage
from support.trained import trained


def inputs(width, rank, seed, tokens=40):
    """Inputs of a task, float64 [width, tokens]: some directions are much stronger than others."""
    torch.manual_seed(seed)
    return (
        torch.randn(width, rank).double()
        @ torch.diag(0.5 ** torch.arange(rank)).double()
        @ torch.randn(rank, tokens).double()
    )


def covariance(h):
    return h @ h.T / h.shape[1]


def plain_gpm(basis, h, share):
    """GPM's update (Saha et al., 2021, equations 8 and 9) with the representation matrix itself and its SVD."""
    rest = h - basis @ basis.T @ h
    u, s, _ = torch.linalg.svd(rest, full_matrices=False)
    total, held, count = h.square().sum(), h.square().sum() - rest.square().sum(), 0
    while held < share * total:
        held, count = held + s[count] ** 2, count + 1
    return torch.cat([basis, u[:, :count]], dim=1)


def projector(columns):
    return columns @ columns.T


@pytest.mark.parametrize("share", [0.7, 0.9, 0.99])
def test_the_space_is_that_of_gpm_whichever_basis_is_stored(share):
    width, space, basis = 10, InputSpace.empty(10), torch.zeros(10, 0).double()
    kinds = []
    for task in range(5):
        h = inputs(width, 4, seed=task)
        space, basis = space.grown(covariance(h), share), plain_gpm(basis, h, share)
        kinds.append(space.is_free)
        free = space.free(torch.device("cpu"))
        assert space.free_directions == free.shape[1] == width - basis.shape[1]
        assert space.basis.shape[1] <= width / 2
        torch.testing.assert_close(projector(free), torch.eye(width).double() - projector(basis), rtol=0, atol=1e-5)
        space = spaces_from_state(spaces_state({"layer": space}), {"layer": width})["layer"]
    assert share < 0.9 or (kinds == sorted(kinds) and len(set(kinds)) == 2)


def test_inputs_that_are_held_already_add_nothing():
    h = inputs(8, 3, seed=0)
    space = InputSpace.empty(8).grown(covariance(h), 1.0)
    assert space.free_directions == 5 and space.grown(covariance(h), 1.0).free_directions == 5
    assert space.grown(torch.zeros(8, 8).double(), 1.0).free_directions == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_space_on_a_gpu_grows():
    first = InputSpace.empty(10).grown(covariance(inputs(10, 2, seed=0)), 1.0)
    second = covariance(inputs(10, 2, seed=1))
    grown = InputSpace(first.basis.cuda(), first.is_free).grown(second.cuda(), 1.0)
    torch.testing.assert_close(projector(grown.basis), projector(first.grown(second, 1.0).basis), rtol=0, atol=1e-5)


@pytest.mark.parametrize("old_rank", [0, 3, 7])
def test_a_holds_the_strongest_right_singular_vectors_of_the_projected_inputs(old_rank):
    width, rank = 10, 2
    space = InputSpace.empty(width)
    if old_rank:
        space = space.grown(covariance(inputs(width, old_rank, seed=1)), 1.0)
    h = inputs(width, width, seed=2)
    a = space.strongest_free(covariance(h), rank)
    rest = h.T @ projector(space.free(torch.device("cpu")))  # H_t (I - M M^T)
    _, _, v = torch.linalg.svd(rest)
    torch.testing.assert_close(a.abs(), v[:rank].abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.eye(rank).double(), rtol=0, atol=1e-6)


def test_where_fewer_directions_are_free_than_the_rank_the_other_rows_are_zero():
    space = InputSpace.empty(6).grown(covariance(inputs(6, 5, seed=1, tokens=60)), 1.0)
    a = space.strongest_free(covariance(inputs(6, 6, seed=2)), 3)
    assert space.free_directions == 1 and a[0].norm().item() == pytest.approx(1) and not a[1:].any()


def test_covariances_are_those_of_a_plain_loop_over_unpadded_rows():
    model, rows = lora_model(), tiny_rows(7, seed=4)
    stage = tiny_stage(model, rows, micro_batch_size=3)
    seen = {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: seen[name].append(args[0][0]))
        for name, layer in adapted(model).items()
    ]
    expected = {name: torch.zeros(layer.in_features, layer.in_features) for name, layer in adapted(model).items()}
    model.eval()
    for row in rows:
        seen = {name: [] for name in expected}
        model(input_ids=torch.tensor([row["input_ids"]]))
        for name, [x] in seen.items():
            for token in x.detach():
                expected[name] += token[:, None] * token
    for hook in hooks:
        hook.remove()
    model.train()
    tokens = sum(len(row["input_ids"]) for row in rows)
    found = input_covariances(stage, adapted(model), rows, "inflora")
    assert found.keys() == expected.keys() and model.training
    for name, c in found.items():
        torch.testing.assert_close(c.float(), expected[name] / tokens, rtol=1e-4, atol=1e-5)


class Watched(InfLoRA):
    """Records the new A at both ends of a stage, and what is trained."""

    name = "watched_inflora"

    def before_stage(self, stage):
        super().before_stage(stage)
        self.begin = {key: w.clone() for key, w in factors(stage.model).items()}
        self.trained = set(weights(stage.model).tensors)

    def final_weights(self, stage):
        self.end = {key: w.clone() for key, w in factors(stage.model).items()}
        super().final_weights(stage)


def test_only_b_is_trained_and_old_rows_get_the_same_logits(tmp_path):
    """Two short rows fill a part of each layer's inputs, of which all is held: nothing that they meet may change."""
    old, method = tiny_rows(2, seed=5, length=4), Watched(threshold=1.0)
    trainer = trained(tmp_path, rows=old, model=lora_model(lora_dropout=0.1), method=method, args={"max_steps": 4})
    model = trainer.model
    batch = {"input_ids": torch.tensor([old[0]["input_ids"]])}
    before = logits_of(model, batch)
    spaces = dict(method.spaces)
    trainer.train_dataset = tiny_rows(16, seed=6)
    moved = logits(model)
    trainer.train()
    assert all(name.endswith("lora_B.default.weight") for name in method.trained)
    for key, w in method.end.items():
        begin = method.begin[key]
        assert torch.equal(w, begin) == key.endswith("lora_A"), key
        if key.endswith("lora_A"):
            space = spaces[key.removesuffix(".lora_A")]
            assert 0 < space.free_directions < w.shape[1]
            old_directions = torch.eye(w.shape[1]) - projector(space.free(w.device)).float()
            assert (w @ old_directions).abs().max() < 1e-5
        else:
            assert not begin.any()
    assert (logits(model) - moved).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(model, batch), before, rtol=0, atol=1e-4)
    assert moved_by_plain_lora(old, batch, tmp_path) > 0.1
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def moved_by_plain_lora(old, batch, folder):
    """How far the same training without the method moves the logits of an old row, at most."""
    trainer = trained(folder, rows=old, model=lora_model(lora_dropout=0.1), args={"max_steps": 4})
    before = logits_of(trainer.model, batch)
    trainer.train_dataset = tiny_rows(16, seed=6)
    trainer.train()
    return (logits_of(trainer.model, batch) - before).abs().max()


def logits_of(model, batch):
    model.eval()
    with torch.no_grad():
        result = model(**batch).logits
    model.train()
    return result


def test_the_share_grows_by_stage(tmp_path):
    small, large = (
        trained(tmp_path, model=lora_model(), stages=2, method=InfLoRA(threshold=0.5, growth=growth)).methods[0]
        for growth in (0.0, 0.4)
    )
    layers = [(small.spaces[name].free_directions, space.free_directions) for name, space in large.spaces.items()]
    assert all(a >= b for a, b in layers) and any(a > b for a, b in layers)


def test_a_first_stage_that_is_continued_ends_as_the_unbroken_one(tmp_path):
    """PEFT trains all of an adapter that it loads."""
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "run", model=lora_model(lora_dropout=0.2), method="inflora", args=args)
    method = InfLoRA()
    broken = trained(tmp_path / "run", model=lora_model(lora_dropout=0.2), method=method, args=args, stages=0)
    broken.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for key, w in factors(whole.model).items():
        assert torch.equal(w, factors(broken.model)[key]), key


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (tiny_model, {}, "one LoRA adapter"),
        (lambda: moved(lora_model()), {}, "needs a new adapter, whose B is zero"),
        (lora_model, {"stage_index": 2}, "stage 2 begins, but the inputs of 0 stages are known"),
    ],
)
def test_what_it_cannot_begin_with_is_refused(model, options, reason, tmp_path):
    with pytest.raises(ConfigError, match=reason):
        trained(tmp_path, model=model(), method="inflora", **options)


def moved(model):
    for w in factors(model).values():
        w.add_(0.1)
    return model


def test_a_full_space_is_refused_before_the_next_stage(tmp_path):
    trainer = trained(tmp_path, model=lora_model(), method={"name": "inflora", "threshold": 1.0})
    with pytest.raises(ConfigError, match=r"fill every dimension .* lower ones leave more"):
        trainer.train()


def test_an_expert_that_does_not_receive_every_token_is_refused():
    class Half(torch.nn.Module):
        """Gives its layer every other token."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)

        def forward(self, x):
            return torch.nn.functional.pad(self.layer(x[:, ::2]), (0, 0, 0, x.shape[1] - len(x[0, ::2])))

    model = tiny_model()
    model.model.layers[0].mlp = Half()
    model = get_peft_model(model, LoraConfig(target_modules=["layer"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match="layer does not receive every token"):
        InfLoRA().before_stage(tiny_stage(model, tiny_rows(4)))
