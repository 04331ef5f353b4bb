"""TreeLoRA: the tree, the bandit and the regularised update against plain loops, and runs that use them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from holdfast import continual, run
from holdfast.api.stage import Step
from holdfast.data.collate import Collator
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import gradients, weights
from holdfast.errors import ConfigError
from holdfast.methods.parts.gradient_tree import (
    Group,
    LoraLayers,
    TreeSearch,
    build_tree,
    direction,
    distance,
    pull_cosine,
    pull_l1,
)
from holdfast.methods.tree_lora import TreeLoRA
from holdfast.training.method_state import load_states, save_states
from support.tiny import tiny_config, tiny_model, tiny_rows, tiny_stage

NORMS = pytest.mark.parametrize("norm", [1, 2])
LAYERS, WIDTH = 4, 200
HORIZON = 1250  # rounds of the paper: 5,000 rows a task, batches of 4, one epoch


def lora_model(seed=0, **changes):
    model = tiny_model(seed, **changes)
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))


def planted(members, norm, seed=0, within=0.3):
    """Cluster centres, and the direction of one task's gradient for each member of a cluster."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(max(members) + 1, LAYERS, WIDTH, generator=chance)
    noise = [within * torch.randn(LAYERS, WIDTH, generator=chance) for _ in members]
    return centres, [direction(centres[m] + n, norm) for m, n in zip(members, noise, strict=True)]


# --- directions and distances


@NORMS
def test_distance_is_half_the_norm_between_unit_directions(norm):
    torch.manual_seed(norm)
    a, b = torch.randn(LAYERS, 7), torch.randn(LAYERS, 7)
    found = distance(direction(a, norm), direction(b, norm), norm)
    for layer in range(LAYERS):
        x, y = a[layer].tolist(), b[layer].tolist()
        nx, ny = (sum(abs(v) ** norm for v in vector) ** (1 / norm) for vector in (x, y))
        plain = sum(abs(u / nx - v / ny) ** norm for u, v in zip(x, y, strict=True)) ** (1 / norm) / 2
        assert float(found[layer]) == pytest.approx(plain, rel=1e-5)
    assert distance(direction(a, norm), direction(-3 * a, norm), norm) == pytest.approx(torch.ones(LAYERS))
    assert float(distance(direction(a, norm), direction(5 * a, norm), norm).max()) < 1e-6
    if norm == 2:
        cosine = torch.cosine_similarity(a, b, dim=-1)
        torch.testing.assert_close(found, ((1 - cosine) / 2).sqrt())


# --- the tree


@NORMS
@pytest.mark.parametrize("within", [0.1, 1.0])
@pytest.mark.parametrize("members", [[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 1, 0, 1], [1, 0, 1, 1, 1, 1, 1, 0]])
def test_the_first_split_recovers_two_planted_clusters(norm, members, within):
    """Halves by the median distance to the mean could not: both clusters are equally far from it, or one is smaller."""
    for seed in range(5):
        tree = build_tree(planted(members, norm, seed, within)[1], norm)
        found = {frozenset(child.tasks) for child in tree.children}
        assert found == {frozenset(k for k, m in enumerate(members) if m == cluster) for cluster in (0, 1)}


@NORMS
def test_every_one_of_four_planted_clusters_is_a_node(norm):
    members = [k % 4 for k in range(12)]
    tree = build_tree(planted(members, norm)[1], norm)
    nodes = {node.tasks for node in every(tree)}
    for cluster in range(4):
        assert tuple(k for k, m in enumerate(members) if m == cluster) in {tuple(sorted(tasks)) for tasks in nodes}


def every(group):
    return [group, *(node for child in group.children for node in every(child))]


@NORMS
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_the_tree_ends_in_single_tasks_and_knows_its_spread(norm, count):
    directions = planted(list(range(count)), norm, seed=count)[1]
    tree = build_tree(directions, norm)
    assert sorted(node.tasks[0] for node in every(tree) if not node.children) == list(range(count))
    for node in every(tree):
        assert bool(node.children) == (len(node.tasks) > 1)
        assert sorted(task for child in node.children for task in child.tasks) == sorted(
            node.tasks if node.children else []
        )
        assert all(child.layer > node.layer for child in node.children if child.children) or count > LAYERS
        for layer in range(LAYERS):
            pairs = [
                float(distance(directions[a][layer], directions[b][layer], norm))
                for a in node.tasks
                for b in node.tasks
            ]
            assert node.spread[layer] == pytest.approx(max(pairs), abs=1e-6)


def test_a_layer_that_tells_no_tasks_apart_is_passed_over():
    directions = planted([0, 1, 0, 1], 1)[1]
    for task in directions:
        task[0] = directions[0][0]
    tree = build_tree(directions, 1)
    assert tree.layer == 1 and {child.tasks for child in tree.children} == {(0, 2), (1, 3)}
    same = build_tree([directions[0]] * 3, 1)
    assert [child.tasks for child in same.children] == [(0,), (1,), (2,)]


def test_the_tree_survives_json():
    tree = build_tree(planted([0, 1, 2, 0, 1], 1)[1], 1)
    assert Group.from_plain(json.loads(json.dumps(asdict(tree)))) == tree


# --- the bandit


def three_tasks():
    """Two tasks in a group of spread 0.1, and one apart; one layer."""
    pair = Group((0, 1), (0.1,), 0, (Group((0,), (0.0,)), Group((1,), (0.0,))))
    return Group((0, 1, 2), (0.6,), 0, (pair, Group((2,), (0.0,)))), pair


def test_lower_bounds_by_hand():
    tree, pair = three_tasks()
    search = TreeSearch(tree, exploration=2.0)
    assert search.lower_bound(tree, 0) == -math.inf and search.choose() == 0
    for task, residual in [(0, 0.3), (0, 0.5), (2, 0.9), (0, 0.4)]:
        search.observe(task, [residual])
    # Round 5; task 0: mean 0.4 over 3 rounds; task 2: 0.9 over 1; task 1 not seen.
    leaf = 0.4 - 2 * math.sqrt(math.log(5) / 3)
    assert search.lower_bound(pair.children[0], 0) == pytest.approx(leaf)
    assert search.lower_bound(pair.children[1], 0) == -math.inf
    assert search.lower_bound(tree.children[1], 0) == pytest.approx(0.9 - 2 * math.sqrt(math.log(5)))
    # The group's bound comes from its pooled rounds, since one child has none.
    assert search.lower_bound(pair, 0) == pytest.approx(leaf - 0.1)
    assert search.choose() == 2
    search.observe(2, [0.9])
    for _ in range(300):
        search.observe(2, [0.9])
    assert search.choose() == 1  # the pair is now the better one, and in it the task that was never tried
    for _ in range(2000):
        search.observe(0, [0.4])
        search.observe(1, [0.3])
    # Now the children's bound is higher than the pooled one less the spread, about 0.35 - 0.1.
    rounds = 4 + 301 + 4000 + 1
    best = 0.3 - 2 * math.sqrt(math.log(rounds) / 2000)
    assert best > 0.35 - 2 * math.sqrt(math.log(rounds) / 4003) - 0.1
    assert search.lower_bound(pair, 0) == pytest.approx(best)
    assert search.choose() == 1


def test_each_level_decides_by_its_own_layer():
    leaves = [Group((task,), (0.0, 0.0)) for task in range(4)]
    left = Group((0, 1), (0.0, 1.0), 1, (leaves[0], leaves[1]))
    right = Group((2, 3), (0.0, 1.0), 1, (leaves[2], leaves[3]))
    search = TreeSearch(Group((0, 1, 2, 3), (1.0, 1.0), 0, (left, right)), exploration=0.0)
    # By layer 0 the right group is nearest, and there task 3 by layer 1; task 0 has the lowest residual of layer 1.
    for task, residuals in enumerate([(0.9, 0.0), (0.9, 0.9), (0.1, 0.8), (0.1, 0.5)]):
        search.observe(task, residuals)
    assert search.choose() == 3


@NORMS
@pytest.mark.parametrize("members", [[0, 1, 0, 1, 0, 1, 0, 1], [0, 1, 1, 1, 0, 1, 1, 1]])
def test_most_pulls_are_on_the_right_cluster(norm, members):
    """Stochastic gradients of a task from cluster 0, noisier than they are long, over the paper's horizon."""
    centres, past = planted(members, norm)
    tree = build_tree(past, norm)
    leaves = Group(tree.tasks, tree.spread, 0, tuple(Group((k,), (0.0,) * LAYERS) for k in tree.tasks))
    share = {}
    for name, groups in [("tree", tree), ("flat", leaves)]:
        search, mean = TreeSearch(groups, exploration=2.0), torch.zeros(LAYERS, WIDTH)
        chance = torch.Generator().manual_seed(1)
        for t in range(HORIZON):
            gradient = centres[0] + 2 * torch.randn(LAYERS, WIDTH, generator=chance)
            mean.lerp_(gradient, 1 / (t + 1))
            task = search.choose()
            search.observe(task, distance(direction(mean, norm), past[task], norm).tolist())
        share[name] = sum(n for n, m in zip(search.rounds, members, strict=True) if m == 0) / HORIZON
    assert share["tree"] > 0.8
    assert share["tree"] > share["flat"]


# --- the regularised update


def test_l1_pull_is_the_proximal_step_and_a_bounded_gradient_of_the_gap():
    torch.manual_seed(0)
    current = direction(torch.randn(LAYERS, 50), 1).double().requires_grad_()
    past = direction(torch.randn(LAYERS, 50), 1).double()
    bound = torch.full((LAYERS, 1), 0.004, dtype=torch.float64)
    step = pull_l1(current.detach(), past, bound)
    (current - past).abs().sum().backward()
    far = (current - past).abs() > bound
    assert far.any() and not far.all()
    torch.testing.assert_close(step[far], (-bound * current.grad)[far])
    torch.testing.assert_close((current + step)[~far], past[~far])
    grid = torch.linspace(-0.1, 0.1, 20001, dtype=torch.float64)
    for entry in range(10):
        x, k = float(current[0, entry].detach()), float(past[0, entry])
        best = grid[((grid - x) ** 2 / 2 + 0.004 * (grid - k).abs()).argmin()]
        assert x + float(step[0, entry]) == pytest.approx(float(best), abs=2e-5)


def test_cosine_pull_is_along_the_gradient_of_the_cosine():
    torch.manual_seed(0)
    mean = torch.randn(LAYERS, 50, dtype=torch.float64, requires_grad=True)
    past = torch.randn(LAYERS, 50, dtype=torch.float64)
    torch.cosine_similarity(mean, past, dim=-1).sum().backward()
    length = mean.detach().norm(dim=-1, keepdim=True)
    step = pull_cosine(direction(mean.detach(), 2), direction(past, 2), 0.3)
    torch.testing.assert_close(step, 0.3 * length * mean.grad)


@NORMS
def test_no_pull_lowers_the_product_or_explodes(norm):
    """Also where the product is negative or almost zero, and for the same and for opposite directions."""
    torch.manual_seed(0)
    past = direction(torch.randn(200, 40) ** 3, norm)
    current = direction(torch.randn(200, 40) ** 3, norm)
    current[:40], current[40:80] = -past[:40], past[40:80]
    nearly = torch.randn(40, 40)
    nearly -= (nearly * past[80:120]).sum(-1, keepdim=True) * past[80:120] / (past[80:120] ** 2).sum(-1, keepdim=True)
    current[80:120] = direction(nearly, norm)
    product = (current * past).sum(-1)
    assert (product < -1e-3).sum() > 50 and (product.abs() < 1e-6).sum() >= 40
    if norm == 1:
        step = pull_l1(current, past, torch.full((200, 1), 0.5 / 40))
        assert (step.abs() <= 0.5 / 40).all()
        assert (((current + step - past).abs().sum(-1)) <= (current - past).abs().sum(-1) + 1e-6).all()
    else:
        step = pull_cosine(current, past, 0.5)
        assert (step.norm(dim=-1) <= 0.5 + 1e-5).all()
    assert ((step * past).sum(-1) >= -1e-6).all()


def test_where_plain_l1_would_drive_a_negative_product_down_the_pull_does_not():
    """Most entries agree with the past ones and exceed them; one, much longer, is opposite."""
    past = torch.tensor([[0.4] + [0.6 / 39] * 39])
    current = torch.tensor([[-0.3] + [0.7 / 39] * 39])
    bound = torch.tensor([[0.001]])
    assert (current * past).sum() < -0.1
    assert (torch.clamp(past - current, -bound, bound) * past).sum() < 0
    step = pull_l1(current, past, bound)
    assert (step * past).sum() > 0 and step[0, 0] == 0.001 and not step[0, 1:].any()


# --- the method


def lora_gradients(model, seed):
    """Random gradients as a live view, which is what the trainer passes."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    return gradients(model)


def trained_once(model, past=1, **options):
    """A method after some stages of two steps each, in the middle of the next."""
    method = TreeLoRA(**options)
    for t in range(1, past + 1):
        stage = tiny_stage(model, [], t)
        method.before_stage(stage)
        for index in range(2):
            method.after_backward(Step(stage, index, 4, 1, True), lora_gradients(model, 10 * t + index))
        method.after_stage(stage)
    stage = tiny_stage(model, [], past + 1)
    method.before_stage(stage)
    return method, stage


def by_layer(vector):
    """The plain way: both LoRA weights of every projection of a layer, one after another."""
    parts = {layer: [] for layer in (0, 1)}
    for name, t in vector.tensors.items():
        parts[int(name.split(".layers.")[1].split(".")[0])].append(t.flatten())
    return [torch.cat(parts[layer]) for layer in (0, 1)]


def test_what_is_remembered_is_the_mean_gradient_of_a_and_b():
    model = lora_model()
    method, _ = trained_once(model, past=2)
    for t in (1, 2):
        mean = weights(model).zeros_like()
        for index in range(2):
            mean.add_(lora_gradients(model, 10 * t + index), 0.5)
        for layer, plain in enumerate(by_layer(mean)):
            torch.testing.assert_close(method.past[t - 1][layer], plain / plain.abs().sum())
    rows = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(past.numel() for past in method.past) == 2 * rows
    names = list(weights(model).tensors)
    assert any("lora_A" in name for name in names) and any("lora_B" in name for name in names)


@pytest.mark.parametrize("kind", ["l1", "cosine"])
def test_the_gradient_is_changed_by_the_regularisers_gradient(kind):
    """Against autograd, layer by layer, of |m - m_k|_1 and of the cosine."""
    model, strength = lora_model(), 0.4
    method, stage = trained_once(model, distance=kind, strength=strength)
    before = lora_gradients(model, 99).copy()
    live = gradients(model)
    values = method.after_backward(Step(stage, 0, 4, 1, True), live)
    gaps = []
    for layer, (old, new) in enumerate(zip(by_layer(before), by_layer(live), strict=True)):
        mean = old.clone().requires_grad_()  # after one step the mean is that step's gradient
        past = method.past[0][layer]
        change = new - old
        assert change.abs().max() > 0
        if kind == "l1":
            target = past * mean.detach().abs().sum()
            (mean - target).abs().sum().backward()
            size = strength * mean.detach().abs().mean()
            far = (mean - target).abs() > size
            torch.testing.assert_close(change[far], -size * mean.grad[far], rtol=1e-3, atol=1e-6)
            assert (new - target).abs().sum() < (old - target).abs().sum()
            gaps.append(float((old - target).abs().sum() / old.abs().sum() / 2))
        else:
            torch.cosine_similarity(mean, past, dim=0).backward()
            torch.testing.assert_close(change, strength * old.norm() ** 2 * mean.grad, rtol=1e-3, atol=1e-6)
            cosines = [float(torch.cosine_similarity(v, past, dim=0)) for v in (old, new)]
            assert cosines[1] > cosines[0]
            gaps.append(math.sqrt((1 - cosines[0]) / 2))
    assert values == {"tree_lora": pytest.approx(strength * sum(gaps) / 2, rel=1e-4)}


@pytest.mark.parametrize("kind", ["l1", "cosine"])
def test_the_regularised_mean_gradient_comes_nearer_and_rises_less_against_the_past(kind):
    """The optimizer's gradients are, on average over many noisy steps, nearer to the past task's direction."""
    model = lora_model()
    method, stage = trained_once(model, distance=kind)
    plain, applied = (weights(model).zeros_like() for _ in range(2))
    centre = lora_gradients(model, 5).copy()
    for index in range(50):
        live = lora_gradients(model, 1000 + index)
        live.add_(centre)
        plain.add_(live, 1 / 50)
        method.after_backward(Step(stage, index, 4, 1, False), live)
        applied.add_(live, 1 / 50)
    for layer, (old, new) in enumerate(zip(by_layer(plain), by_layer(applied), strict=True)):
        past = method.past[0][layer]
        assert (new * past).sum() > (old * past).sum()
        if kind == "l1":
            target = past * old.abs().sum()
            assert (new - target).abs().sum() < 0.9 * (old - target).abs().sum()
        else:
            assert torch.cosine_similarity(new, past, dim=0) > torch.cosine_similarity(old, past, dim=0) + 0.1


@pytest.mark.parametrize("kind", ["l1", "cosine"])
def test_opposite_and_absent_gradients_stay_finite(kind):
    model = lora_model()
    method, stage = trained_once(model, distance=kind, strength=1.0)
    for index, scale in enumerate([-1.0, -1e-12, 0.0]):
        live = lora_gradients(model, 10)
        for t in live:
            t.mul_(scale)
        before = live.copy()
        method.after_backward(Step(stage, index, 4, 1, True), live)
        for old, new, past in zip(by_layer(before), by_layer(live), method.past[0], strict=True):
            assert torch.isfinite(new).all()
            assert (new * past).sum() >= (old * past).sum() - 1e-6
            assert (new - old).norm() <= 2 * (by_layer(lora_gradients(model, 10))[0].norm())


def test_layers_of_different_widths():
    """Rows of zeros at the end of narrow layers change nothing, and LoRA outside numbered layers is a layer."""
    torch.manual_seed(0)
    shapes = {
        "model.embed.lora_embedding_A.default": (3, 5),
        "model.layers.0.q.lora_A.default.weight": (2, 8),
        "model.layers.0.q.lora_B.default.weight": (4, 2),
        "model.layers.10.q.lora_A.default.weight": (2, 3),
        "model.head.weight": (4, 4),
    }
    vector = Shards({name: torch.randn(shape) for name, shape in shapes.items()})
    layers = LoraLayers(vector)
    matrix = layers.matrix(vector)
    assert matrix.shape == (3, 24) and layers.widths.flatten().tolist() == [24, 6, 15]
    names = list(shapes)
    torch.testing.assert_close(matrix[1, :6], vector.tensors[names[3]].flatten())
    torch.testing.assert_close(matrix[2, :15], vector.tensors[names[0]].flatten())
    assert not matrix[1, 6:].any() and not matrix[2, 15:].any()
    old = vector.copy()
    layers.add_(vector, 2 * matrix)
    for name in names:
        torch.testing.assert_close(vector.tensors[name], old.tensors[name] * (1 if name == "model.head.weight" else 3))


def test_a_model_of_different_widths_trains():
    model = tiny_model()
    targets = r".*layers\.0\..*_proj|.*layers\.1\..*q_proj"
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    method, stage = trained_once(model, past=3)
    live = lora_gradients(model, 7)
    before = live.copy()
    assert method.after_backward(Step(stage, 0, 4, 1, True), live)["tree_lora"] > 0
    assert all((live.tensors[name] != t).any() for name, t in before.tensors.items())


def test_strength_0_leaves_the_gradient_as_it_is():
    model = lora_model()
    method, stage = trained_once(model, strength=0.0)
    assert method.declares(stage) == () and method.past
    live = lora_gradients(model, 3)
    before = live.copy()
    assert method.after_backward(Step(stage, 0, 4, 1, True), live) == {}
    assert all(torch.equal(live.tensors[name], t) for name, t in before.tensors.items())


def test_the_first_stage_is_untouched_and_declares_nothing():
    model = lora_model()
    method, stage = trained_once(model, past=0)
    live = lora_gradients(model, 3)
    before = live.copy()
    assert method.after_backward(Step(stage, 0, 4, 1, True), live) == {} and method.declares(stage) == ()
    assert all(torch.equal(live.tensors[name], t) for name, t in before.tensors.items())


@pytest.mark.parametrize("kind", ["l1", "cosine"])
def test_state_continues_bit_for_bit_in_the_middle_of_a_stage(kind, tmp_path):
    model = lora_model()
    method, stage = trained_once(model, past=3, distance=kind)
    for index in range(7):
        method.after_backward(Step(stage, index, 4, 1, False), lora_gradients(model, 200 + index))
    save_states([method], tmp_path)
    fresh = TreeLoRA(distance=kind)
    fresh.before_stage(stage)
    load_states([fresh], tmp_path, model)
    assert fresh.search.rounds == method.search.rounds and sum(fresh.search.rounds) == 7
    results = []
    for each in (method, fresh):
        values = []
        for index in range(7, 14):
            live = lora_gradients(model, 200 + index)
            values.append(each.after_backward(Step(stage, index, 4, 1, True), live)["tree_lora"])
            values += [t.clone() for t in live]
        each.after_stage(stage)
        results.append((values, each.search, each.tree, each.past))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    assert results[0][2] == results[1][2]
    assert all(torch.equal(a, b) for a, b in zip(results[0][3], results[1][3], strict=True))


def test_a_stage_that_is_continued_from_its_checkpoint_equals_the_unbroken_one(tmp_path):
    def trainer(model):
        args = TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=6, save_steps=2, per_device_train_batch_size=4,
            learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip
        return continual(Trainer)(
            model=model, args=args, train_dataset=tiny_rows(12), data_collator=Collator(0), method="tree_lora"
        )

    whole = trainer(lora_model())
    for seed in (0, 1, 2):
        save_states(whole.methods, tmp_path / "method")
        start = {name: t.clone() for name, t in weights(whole.model).tensors.items()}
        whole.train_dataset = tiny_rows(12, seed=seed)
        whole.train()
    broken = trainer(lora_model(seed=1))
    for name, t in weights(broken.model).tensors.items():
        t.copy_(start[name])
    broken.model.load_state_dict({n: p for n, p in whole.model.state_dict().items() if "lora_" not in n}, strict=False)
    load_states(broken.methods, tmp_path / "method", broken.model)
    broken.stage_index, broken.train_dataset = 3, tiny_rows(12, seed=2)
    broken.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    for name, t in weights(whole.model).tensors.items():
        assert torch.equal(t, weights(broken.model).tensors[name]) and not torch.equal(t, start[name])
    a, b = whole.methods[0].state(), broken.methods[0].state()
    assert a.keys() == b.keys() and a["tree"] == b["tree"]
    assert all(torch.equal(a[key], b[key]) for key in a if key.startswith("past/"))


def test_a_model_without_lora_is_refused(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = continual(Trainer)(
        model=tiny_model(), args=args, train_dataset=tiny_rows(8), data_collator=Collator(0), method="tree_lora"
    )
    with pytest.raises(ConfigError, match=r"tree_lora.*LoRA"):
        trainer.train()
    with pytest.raises(ConfigError, match=r"tree_lora.*lora"):
        run(tiny_config(tmp_path, method="tree_lora", tuner="full"))


def test_a_run_with_nothing_but_defaults(tmp_path):
    config = tiny_config(tmp_path, method="tree_lora")
    del config["tuner"]
    config["training"] |= {"epochs": 2}
    matrix = run(config)
    assert len(matrix["scores"]) == 4
    out = Path(config["output"])
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert all("tree_lora" not in event["terms"] for event in events if event["stage"] == 1)
    assert all(0 < event["terms"]["tree_lora"] < 0.5 for event in events if event["stage"] > 1)
    last = sorted(out.glob("stages/03-*/method/tree_lora.json"))[0]
    state = json.loads(last.read_text())
    assert state["tasks"] == 3 and len(state["tree"]["tasks"]) == 3
