"""OSF: what a stage preserves stays as it is, against dense decompositions; plain PEFT loads what is saved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import holdfast.runner.loop
import holdfast.runner.run
import holdfast.runner.stage
from holdfast import tuners
from holdfast.api.stage import Step
from holdfast.config.section import Named
from holdfast.engines.vectors import gradients, weights
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.osf import OSF, Dominant, layer_similarity, osf_layers
from holdfast.system.progress import Progress
from support.resumed import results
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapted(dtype=torch.float32, seed=0, **options):
    model = tiny_model(seed).to(dtype)
    return tuners.build(Named(name="osf", **options)).prepare(model)


def dense(model):
    """The effective adapted matrices, float64, by the name of their layer; all other weights by their names."""
    matrices = {}
    for name, layer, adapter in osf_layers(model):
        base = layer.get_base_layer().weight.detach().double()
        matrices[name.partition(".osf_svd_params")[0]] = base + layer.get_delta_weight(adapter).detach().double()
    return matrices


def train(model, method, index=1, steps=12, optimizer="adamw", seed=None):
    """Train a stage without a Trainer; return the matrices before and after it."""
    rows = tiny_rows(8, seed=index if seed is None else seed)
    stage = tiny_stage(model, rows, index=index)
    before = dense(model)
    method.before_stage(stage)
    trained = [p for p in model.parameters() if p.requires_grad]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    stepper = kind(trained, lr=2e-2, weight_decay=0.1)
    take_steps(stage, method, stepper, rows, steps)
    return before, dense(model)


def take_steps(stage, method, stepper, rows, steps):
    """The steps and the end of a stage that has begun, without a Trainer."""
    model = stage.model
    for i in range(steps):
        stepper.zero_grad()
        model(**stage.collate(rows[i % 4 : i % 4 + 4])).loss.backward()
        step = Step(stage, i, 4, 1, False)
        method.after_backward(step, gradients(model))
        stepper.step()
        method.after_step(step, weights(model))
    method.final_weights(stage)
    method.after_stage(stage)


def leak(before, after, share):
    """The share of a matrix's change in its dominant directions, of output and input; 1: all of it."""
    u, _, v = torch.linalg.svd(before, full_matrices=False)
    rank, change = round(share * min(before.shape)), after - before
    both = (u[:, :rank].T @ change).norm(), (change @ v[:rank].T).norm()
    return max(float(part / change.norm()) for part in both)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_dominant_directions_stay_through_optimizer_steps(optimizer):
    model = adapted(effective_rank=0.25)
    before, after = train(model, OSF(target=0.5), optimizer=optimizer)
    assert len(before) == 14
    for name, matrix in before.items():
        assert leak(matrix, after[name], 0.5) < 1e-4, name
        assert (after[name] - matrix).norm() > 1e-2 * matrix.norm(), "nothing was learned"
        assert leak(matrix, after[name], 0.8) > 0.05, "more is preserved than was asked for"


def test_projected_gradients_alone_do_not_keep_them_under_adam():
    """Weights are projected, too, since PEFT's adapter drifts without it."""
    model = adapted(effective_rank=0.5)
    method = OSF(minimum=0.0, target=0.0)
    method.after_step = lambda step, weights: None
    before, after = train(model, method)
    assert min(leak(matrix, after[name], 0.5) for name, matrix in before.items()) > 0.02


def test_what_the_optimizer_receives_is_projected():
    model = adapted(effective_rank=0.25)
    method, rows = OSF(target=0.5), tiny_rows(8)
    stage = tiny_stage(model, rows)
    method.before_stage(stage)
    matrices = dense(model)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)  # as if another method had added to it
    method.after_backward(Step(stage, 0, 8, 1, False), gradients(model))
    for name, layer, adapter in osf_layers(model):
        matrix = matrices[name.partition(".osf_svd_params")[0]]
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        rank, factors = min(matrix.shape) // 2, layer.osf_svd_params[adapter]
        new = rank - layer.effective_rank[adapter]
        assert new > 0
        assert (u[:, :rank].T @ factors["U_low"].grad.double()).abs().max() < 1e-5
        assert (factors["V_low"].grad.double() @ v[:rank].T).abs().max() < 1e-5
        for part in (factors["U_low"].grad[:, :new], factors["S_low"].grad[:new], factors["V_low"].grad[:new]):
            assert not part.any()
        assert all(factors[key].grad.any() for key in ("U_low", "S_low", "V_low"))


def test_each_stage_preserves_the_dominant_directions_of_the_weights_it_begins_with():
    model, method = adapted(effective_rank=1), OSF(target=0.4, growth=0.2, minimum=0.0)
    first, moved = None, 0.0
    for index, target in ((1, 0.4), (2, 0.6), (3, 0.8)):
        shares = {name: target * method._importance(name, model) for name in dense(model)}
        before, after = train(model, method, index=index, steps=30)
        first = first or before
        for name, matrix in before.items():
            rank = round(shares[name] * min(matrix.shape))
            if 0 < rank < min(matrix.shape):
                assert leak(matrix, after[name], rank / min(matrix.shape)) < 1e-3, (index, name)
            if index == 3:
                moved = max(moved, leak(first[name], after[name], 0.4))
    assert moved > 0.05, "the first weights' directions were preserved all along, not the new ones'"


def test_the_decomposition_at_the_end_of_a_stage_leaves_the_model_as_it_is():
    model, method = adapted(), OSF(target=0.5)
    ends = []
    original = method.final_weights
    method.final_weights = lambda stage: (ends.append(dense(model)), original(stage))
    _, after = train(model, method)
    for name, matrix in ends[0].items():
        torch.testing.assert_close(after[name], matrix, rtol=0, atol=1e-5 * float(matrix.norm()))
    for _, layer, adapter in osf_layers(model):
        factors = layer.osf_svd_params[adapter]
        u, s, v = (factors[key].detach() for key in ("U_low", "S_low", "V_low"))
        torch.testing.assert_close(u.T @ u, torch.eye(len(s)), rtol=0, atol=1e-5)
        torch.testing.assert_close(v @ v.T, torch.eye(len(s)), rtol=0, atol=1e-5)
        assert (s >= 0).all() and (s.diff() <= 0).all()


def test_importance_is_the_cosine_similarity_of_a_layers_input_and_output():
    model, rows = adapted(), tiny_rows(6)
    found = layer_similarity(tiny_stage(model, rows, micro_batch_size=4), rows)
    expected = torch.zeros(2, dtype=torch.float64)
    for row in rows:
        states = model(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
        for layer in range(2):
            expected[layer] += F.cosine_similarity(states[layer][0], states[layer + 1][0], dim=-1).mean().double() / 6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_rank_follows_importance_and_target():
    model = adapted(effective_rank=0.25)
    ranks = {}
    for index, importance in ((1, []), (2, [1.5, 0.5]), (3, [1.5, 0.5])):
        method = OSF(minimum=0.25, target=0.5, growth=0.125)
        method.load_state({"importance": importance}, model)
        method.before_stage(tiny_stage(model, [], index=index))
        ranks[index] = [method.preserved[name].left.shape[1] for name, *_ in osf_layers(model) if "mlp" in name]
    # of 16 directions: 0.5; 0.25 + (1.5 and 0.5) * 0.375; 0.25 + (1.5 and 0.5) * 0.5
    assert ranks == {1: [8] * 6, 2: [13] * 3 + [7] * 3, 3: [16] * 3 + [8] * 3}


def test_a_layer_that_is_preserved_whole_does_not_change():
    model, method = adapted(), OSF(target=1.0)
    before, after = train(model, method, steps=4)
    for name, matrix in before.items():
        torch.testing.assert_close(after[name], matrix, rtol=0, atol=1e-6)


def test_bases_are_orthonormal_where_the_model_is_bfloat16():
    """PEFT rounds them to the model's type; a projection with such a basis would scale the weights at every step."""
    model, method = adapted(torch.bfloat16), OSF(target=0.6)
    method.before_stage(tiny_stage(model, []))
    for kept in method.preserved.values():
        for columns in (kept.left, kept.right):
            assert columns.dtype == torch.float32
            torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1]), rtol=0, atol=1e-5)
    train(model, method, steps=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run by name, and the logits of its model after each stage."""
    folder, logits = tmp_path_factory.mktemp("osf"), []
    config = tiny_config(folder, method={"name": "osf", "target": 0.5}, tuner="osf")
    batch = {key: value for key, value in pad_rows(tiny_rows(6)).items() if key != "labels"}
    original = holdfast.runner.loop.save_states

    def watched(methods, path):
        original(methods, path)
        logits.append(model_of[-1](**batch).logits.detach())

    model_of = []
    load = holdfast.runner.load.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holdfast.runner.loop, "save_states", watched)
        patch.setattr(holdfast.runner.loop, "load_model", lambda setup: model_of.append(load(setup)) or model_of[-1])
        holdfast.runner.run.run(config, Progress(quiet=True))
    return folder, batch, logits


def test_plain_peft_loads_every_stage_and_gives_the_same_logits(finished):
    folder, batch, logits = finished
    assert len(logits) == 3
    for path, expected in zip(sorted((folder / "run" / "stages").glob("0[1-3]-*/adapter")), logits, strict=True):
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), path).eval()
        torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-4, atol=1e-5)
        merged = plain.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    assert (logits[1] - logits[0]).abs().max() > 1e-2 and (logits[2] - logits[1]).abs().max() > 1e-2


class Killed(BaseException):
    """Ends a run at once: nothing in the run catches it."""


def test_a_run_killed_within_a_stage_ends_with_the_same_numbers(finished, monkeypatch):
    folder, *_ = finished
    config = tiny_config(folder, method={"name": "osf", "target": 0.5}, tuner="osf", output=str(folder / "broken"))
    config["training"]["save_every"] = 4
    watch = holdfast.runner.stage.StageWatch.on_step_end
    for stage, step in [(2, 5), (3, 2)]:

        def dying(self, args, state, control, stage=stage, step=step, **kwargs):
            watch(self, args, state, control, **kwargs)
            if (self.stage.index, state.global_step) == (stage, step):
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", dying)
            with pytest.raises(Killed):
                holdfast.runner.run.run(config, Progress(quiet=True))
    holdfast.runner.run.run(config, Progress(quiet=True))
    one, two = results(folder / "run"), results(folder / "broken")
    for key in one:
        assert one[key] == two[key], key


# Whole matrices


def whole(model):
    """The matrices of the decoder layers, float64, and all other weights, by name."""
    tensors = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    inner = {name for name, t in tensors.items() if t.dim() == 2 and ".layers." in name}
    return {n: t for n, t in tensors.items() if n in inner}, {n: t for n, t in tensors.items() if n not in inner}


def train_whole(model, method, index=1, steps=8, optimizer="adamw"):
    """Train a stage of whole weights without a Trainer; return the matrices before and after it."""
    rows = tiny_rows(8, seed=index)
    stage = tiny_stage(model, rows, index=index)
    (before, rest), kind = whole(model), {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    method.before_stage(stage)
    rates = {"lr": 2e-2, "weight_decay": 0.1} if optimizer == "adamw" else {"lr": 1.0, "weight_decay": 1e-3}
    take_steps(stage, method, kind(model.parameters(), **rates), rows, steps)
    after, rest_after = whole(model)
    assert all(torch.equal(t, rest_after[name]) for name, t in rest.items()), "embeddings or norms moved"
    return before, after


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("project", [None, "block", "both"])
def test_what_is_projected_of_whole_matrices_stays_in_every_stage(project, optimizer):
    """Against a separate decomposition of each stage's first weights."""
    model, method = tiny_model(), OSF(target=0.5, project=project)
    for index in (1, 2):
        shares = {name: method._share(name, tiny_stage(model, [], index=index)) for name in whole(model)[0]}
        before, after = train_whole(model, method, index, optimizer=optimizer)
        assert len(before) == 14
        for name, matrix in before.items():
            u, _, vt = torch.linalg.svd(matrix)
            k = round(shares[name] * min(matrix.shape))
            change = u.T @ (after[name] - matrix) @ vt.T
            size = change.norm()
            assert size > 1e-3 * matrix.norm(), "nothing was learned"
            assert change[:k, :k].norm() < 1e-4 * size
            beside = max(change[:k, k:].norm(), change[k:, :k].norm())
            assert beside < 1e-4 * size if project == "both" else beside > 0.05 * size, name


@pytest.mark.parametrize(("project", "free"), [("block", 0.36), ("both", 0.04)])
def test_what_a_square_matrix_is_left_at_the_papers_target(project, free):
    """The rank of the projection, column by column; both projections give nothing more when applied again."""
    dominant = Dominant.of(torch.randn(20, 20), 0.8)
    basis = torch.eye(400).reshape(400, 20, 20).clone()
    for row in basis:
        (dominant.remove_block_ if project == "block" else dominant.remove_both_)(row)
    projection = basis.reshape(400, 400).double()
    assert float(projection.trace()) / 400 == pytest.approx(free, abs=1e-4)
    torch.testing.assert_close(projection @ projection, projection, rtol=0, atol=1e-5)
    torch.testing.assert_close(projection, projection.T, rtol=0, atol=1e-5)


def test_the_printed_projection_is_the_papers():
    torch.manual_seed(0)
    matrix, gradient = torch.randn(6, 9), torch.randn(6, 9)
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    expected = gradient - u[:, :4] @ u[:, :4].T @ gradient @ vt[:4].T @ vt[:4]
    Dominant.of(matrix, 4 / 6).remove_block_(gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_a_matrix_of_which_nothing_is_free_stays_bit_for_bit():
    model, method = tiny_model(), OSF(target=1.0)
    before, after = train_whole(model, method, steps=2)
    square = [name for name, t in before.items() if t.shape[0] == t.shape[1]]
    assert square and all(torch.equal(before[name], after[name]) for name in square)
    assert any(not torch.equal(t, after[name]) for name, t in before.items()), "of others something is free"


def test_block_is_refused_with_the_adapter(tmp_path):
    with pytest.raises(ConfigError, match="works with full, not with 'osf', since project is block"):
        holdfast.runner.run.run(tiny_config(tmp_path, method={"name": "osf", "project": "block"}, tuner="osf"))
    with pytest.raises(ConfigError, match="project block takes whole matrices"):
        OSF(project="block").before_stage(tiny_stage(adapted(effective_rank=0.25), tiny_rows(2)))


def test_a_model_without_the_adapter_is_refused():
    stage = tiny_stage(get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear")), tiny_rows(2))
    with pytest.raises(ConfigError, match="OSFConfig"):
        OSF().before_stage(stage)


def test_another_tuner_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="works with full or osf"):
        holdfast.runner.run.run(tiny_config(tmp_path, method="osf", tuner="lora"))


@pytest.mark.parametrize("other", ["cia", "ewc", "ogd"])
def test_what_remembers_single_weights_is_refused(other):
    """The factors of a matrix change after each stage."""
    with pytest.raises(ConfigError, match="cannot be applied together"):
        build([("osf", {}), (other, {})])
    build([("osf", {}), ("replay", {})])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"effective_rank": 0}, "effective_rank"),
        ({"effective_rank": 0.01}, "positive integer"),
        ({"effective_rank": 1.0}, "nothing would be trained"),
        ({"effective_ranks": 4}, "did you mean 'effective_rank'"),
    ],
)
def test_a_tuner_that_cannot_train_says_why(options, message):
    with pytest.raises(ConfigError, match=message):
        adapted(**options)


def test_any_other_option_of_peft_may_be_given():
    model = adapted(effective_rank=4, rank_pattern={"mlp": 0.5}, target_modules=list(TARGETS))
    ranks = {name: layer.effective_rank[adapter] for name, layer, adapter in osf_layers(model)}
    assert len(ranks) == 14 and {r for n, r in ranks.items() if "mlp" in n} == {8}
    assert {r for n, r in ranks.items() if "mlp" not in n} == {4}
