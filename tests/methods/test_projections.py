"""GEM, A-GEM and OGD against plain linear algebra: what may not rise does not, and nothing else is taken away."""

from __future__ import annotations

import copy
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainingArguments

from holdfast import ContinualTrainer
from holdfast.api.stage import Step
from holdfast.data.collate import Collator
from holdfast.engines.shards import Shards
from holdfast.engines.vectors import gradient_of, gradients, weights
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.a_gem import AveragedGEM
from holdfast.methods.gem import GEM
from holdfast.methods.ogd import OGD
from holdfast.methods.parts.projection import gem_dual, principal_directions
from holdfast.training.method_state import load_states, save_states
from support.tiny import pad_rows, tiny_model, tiny_rows, tiny_stage

PROJECTIONS = {
    "gem": (GEM, {}),
    "gem margin 0": (GEM, {"margin": 0.0}),
    "a_gem": (AveragedGEM, {}),
    "ogd": (OGD, {"samples": 5, "capacity": 8}),
    "ogd_plus": (OGD, {"variant": "ogd_plus", "samples": 5, "capacity": 8}),
}
projections = pytest.mark.parametrize("kind", PROJECTIONS)


def made(kind, **changes):
    cls, options = PROJECTIONS[kind]
    return cls(**options | changes)


def flat(vector: Shards) -> np.ndarray:
    """A vector, float64 [entries]."""
    return torch.cat([t.detach().double().flatten() for t in vector]).numpy()


def flat_stack(stack: Shards) -> np.ndarray:
    """A stack, float64 [count, entries]."""
    return torch.cat([t.double().reshape(len(t), -1) for t in stack], dim=1).numpy()


def mean_loss(model, rows):
    batch = pad_rows(rows)
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def loss_gradient(model, rows):
    return flat(gradient_of(mean_loss(model, rows), model))


def true_logits(model, row):
    """Sum of the right tokens' logits, one by one."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    labels = row["labels"]
    return sum(logits[s - 1, labels[s]] for s in range(1, len(labels)) if labels[s] != -100)


def output_gradients(model, rows):
    """[rows, entries], each of unit length."""
    found = np.stack([flat(gradient_of(true_logits(model, row), model)) for row in rows])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def set_gradients(model, vector):
    """Accumulated gradients = a vector [entries]."""
    start = 0
    for p in model.parameters():
        p.grad = torch.tensor(vector[start : start + p.numel()]).reshape(p.shape).to(p.dtype)
        start += p.numel()


def shift_weights(model, scale, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))


def after_stages(method, model, tasks, rows=6):
    """The method after some stages, between which the weights changed, and the rows of each task."""
    streams = [tiny_rows(rows, seed=t) for t in range(1, tasks + 1)]
    for t, stream in enumerate(streams, start=1):
        method.after_stage(tiny_stage(model, stream, index=t))
        shift_weights(model, 0.02, seed=t)
    return streams


def next_step(model, tasks, rows=6, micro_batches=1):
    return Step(tiny_stage(model, [], index=tasks + 1), 0, rows, micro_batches, logged=True)


# --- the vectors' algebra and GEM's dual program ---


def test_stacks_of_vectors_are_matrices():
    torch.manual_seed(0)
    vectors = [Shards({"a": torch.randn(3, 2), "b": torch.randn(5), "c": torch.randn(())}) for _ in range(4)]
    matrix = np.stack([flat(v) for v in vectors])
    stack = Shards.stack(vectors[:3])
    np.testing.assert_allclose(flat_stack(stack), matrix[:3])
    np.testing.assert_allclose(stack.gram().numpy(), matrix[:3] @ matrix[:3].T, rtol=1e-14)
    np.testing.assert_allclose(stack.products(vectors[3]).numpy(), matrix[:3] @ matrix[3], rtol=1e-5, atol=1e-6)
    mix = torch.randn(2, 3, dtype=torch.float64)
    np.testing.assert_allclose(flat_stack(stack.combined(mix)), mix.numpy() @ matrix[:3], rtol=1e-6, atol=1e-6)
    both = stack.joined(Shards.stack(vectors[3:]))
    np.testing.assert_allclose(flat_stack(both), matrix)
    changed = vectors[3].copy().add_combined_(stack, mix[0])
    np.testing.assert_allclose(flat(changed), matrix[3] + mix[0].numpy() @ matrix[:3], rtol=1e-5, atol=1e-6)


def best_active_set(k, c, margin):
    """The QP's solution by trying every set of constraints that could be active."""
    best = None
    for is_free in itertools.product([False, True], repeat=len(c)):
        free, bound = ([i for i, yes in enumerate(is_free) if yes == which] for which in (True, False))
        v = np.full(len(c), margin)
        if free:
            right = -c[free] - k[np.ix_(free, bound)] @ v[bound]
            v[free] = np.linalg.lstsq(k[np.ix_(free, free)], right, rcond=None)[0]
        value = 0.5 * v @ k @ v + c @ v
        if (v >= margin - 1e-9).all() and (best is None or value < best):
            best = value
    return best


@pytest.mark.parametrize("margin", [0.0, 0.5, 3.0])
def test_gem_dual_is_the_solution_of_the_quadratic_program(margin):
    chance = np.random.default_rng(0)
    bound = 0
    for trial in range(300):
        tasks, size = chance.integers(1, 6), chance.integers(1, 9)
        g, past = chance.normal(size=size), chance.normal(size=(tasks, size))
        if trial % 5 == 0:
            past[-1] = 2 * past[0]  # the same constraint twice: a singular program
        if trial % 7 == 0:
            past[0] = 0
        if trial % 11 == 0:
            g = -past.sum(axis=0)
        if trial % 13 == 0:
            past = past + 10 * chance.normal(size=size)  # nearly parallel constraints
        vectors = np.vstack([past, g])
        v = gem_dual(vectors @ vectors.T, margin)
        projected = g + past.T @ v
        slack, multipliers = v - margin, past @ projected
        size_of = np.linalg.norm(g) + v @ np.linalg.norm(past, axis=1)
        assert (slack >= 0).all()
        assert (multipliers >= -1e-12 * size_of**2).all()  # every constraint <g~, g_k> >= 0
        assert np.abs(slack * multipliers).max() <= 1e-12 * size_of**2 * max(1, v.max())
        value = 0.5 * v @ (past @ past.T) @ v + (past @ g) @ v
        assert value == pytest.approx(best_active_set(past @ past.T, past @ g, margin), abs=1e-8 * size_of**2)
        bound += int((slack == 0).any() and (slack > 0).any())
    assert bound > 50, "too few programs with some constraints active and others not"


def test_gem_dual_does_not_depend_on_the_scale_of_a_constraint():
    chance = np.random.default_rng(1)
    past, g, scales = chance.normal(size=(4, 30)), chance.normal(size=30), 10.0 ** np.array([-6, -2, 3, 6])
    g = g - 2 * past.sum(axis=0)
    plain, scaled = np.vstack([past, g]), np.vstack([scales[:, None] * past, g])
    one = g + past.T @ gem_dual(plain @ plain.T, 0.0)
    other = g + (scales[:, None] * past).T @ gem_dual(scaled @ scaled.T, 0.0)
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert np.linalg.norm(one - g) > 1


@pytest.mark.parametrize("tasks", [20, 60])
def test_gem_dual_of_many_tasks_leaves_no_constraint_violated(tasks):
    chance = np.random.default_rng(2)
    for trial in range(10):
        past = chance.normal(size=(tasks, 15 * (1 + trial % 2) * 5)) + trial * chance.normal(
            size=15 * (1 + trial % 2) * 5
        )
        g = chance.normal(size=past.shape[1]) - past.mean(axis=0)
        vectors = np.vstack([past, g])
        v = gem_dual(vectors @ vectors.T, 0.5)
        size = np.linalg.norm(g) + v @ np.linalg.norm(past, axis=1)
        assert (past @ (g + past.T @ v) / np.linalg.norm(past, axis=1)).min() > -1e-12 * size


def deficient(tasks, size, kind, chance, entries=200):
    """Past gradients [tasks, entries] that span ``size`` dimensions but for float32's rounding, and a gradient."""
    past, g = chance.normal(size=(tasks, size)) @ chance.normal(size=(size, entries)), chance.normal(size=entries)
    if kind == "inside":
        g = chance.normal(size=tasks) @ past
    if kind == "duplicates":
        past[1], past[2], past[3] = past[0], -past[0], 2 * past[0]
    if kind == "zeros":
        past[: tasks // 2] = 0
    if kind == "nearly":
        past += 1e-5 * chance.normal(size=past.shape)
    return past.astype(np.float32), g.astype(np.float32)


@pytest.mark.parametrize("margin", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["outside", "inside", "duplicates", "zeros", "nearly"])
@pytest.mark.parametrize(("tasks", "size"), [(6, 3), (40, 10)])
def test_gem_of_gradients_that_depend_on_each_other(tasks, size, kind, margin, monkeypatch):
    """KKT conditions, to float32's rounding, of the gradient that the optimizer gets."""
    chance, method, bound = np.random.default_rng(3), GEM(margin=margin), 0
    method.memory.rows.append({})
    for _ in range(15):
        past, g = deficient(tasks, size, kind, chance)
        if (past @ g >= 0).all():
            g = -g
        monkeypatch.setattr(method, "past_gradients", lambda step, past=past: Shards({"w": torch.tensor(past)}))
        gradient = Shards({"w": torch.tensor(g)})
        method.after_backward(None, gradient)
        past, projected = past.astype(np.float64), gradient.tensors["w"].double().numpy()
        lengths = np.linalg.norm(past, axis=1)
        v = gem_dual(Shards({"w": torch.tensor(np.vstack([past, g]))}).gram().numpy(), margin)
        whole = np.linalg.norm(g + margin * past.sum(axis=0))
        multipliers = past @ projected / np.where(lengths == 0, 1.0, lengths) / whole
        assert multipliers.min() >= -2e-7, "a constraint is violated"
        assert (v >= margin).all() and (v * lengths).max() < 1e6 * whole, "coefficients without bound"
        assert np.linalg.norm(projected) <= (1 + 1e-6) * whole
        np.testing.assert_allclose(projected, g + v @ past, rtol=0, atol=1e-6 * whole)
        gap = (v - margin) * lengths @ multipliers  # 0 at the optimum: |G^T u + d|^2 is this far above it
        assert abs(gap) <= 1e-3 * whole
        bound += int((v > margin).any())
    assert bound, "no constraint was active"


def test_gem_of_one_task_twice_is_gem_of_it_once():
    chance = np.random.default_rng(4)
    past, g = chance.normal(size=(3, 30)), chance.normal(size=30)
    g -= past.sum(axis=0)
    found = []
    for rows in (past, past[[0, 1, 2, 0, 0, 2]]):
        vectors = np.vstack([rows, g])
        found.append(g + gem_dual(vectors @ vectors.T, 0.0) @ rows)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-10)


# --- GEM ---


def gem_in_conflict(margin, tasks=4):
    """GEM with a gradient that conflicts with some past tasks; the true gradients of these, [tasks, entries]."""
    model = tiny_model()
    method = GEM(margin=margin, batch_size=6)
    streams = after_stages(method, model, tasks)
    past = np.stack([loss_gradient(model, rows) for rows in streams])
    torch.manual_seed(3)
    noise = 0.05 * torch.randn(past.shape[1]).double().numpy()
    set_gradients(model, past[0] - 1.5 * past[1] - 0.2 * past[2] + noise)
    return model, method, streams, past


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_gem_satisfies_every_constraint_and_takes_away_no_more(margin):
    model, method, _, past = gem_in_conflict(margin)
    g = flat(gradients(model))
    assert (past @ g < 0).any() and (past @ g > 0).any()
    values = method.after_backward(next_step(model, 4), gradients(model))
    projected = flat(gradients(model))
    assert values == {"gem/violated": float((past @ g < 0).sum())}
    size = np.linalg.norm(projected) * np.linalg.norm(past, axis=1)
    assert (past @ projected >= -1e-6 * size).all()
    v = np.linalg.lstsq(past.T, projected - g, rcond=None)[0]
    np.testing.assert_allclose(past.T @ v, projected - g, atol=1e-6)  # only past gradients were added
    assert (v >= margin - 1e-4).all()
    assert np.abs((v - margin) * (past @ projected)).max() < 1e-4 * (past @ past.T).max()
    if margin == 0:  # the nearest: no other feasible gradient that random mixtures find is nearer
        chance = np.random.default_rng(0)
        for _ in range(200):
            other = g + past.T @ np.abs(chance.normal(size=4))
            if (past @ other >= 0).all():
                assert np.linalg.norm(other - g) >= np.linalg.norm(projected - g) - 1e-6


def test_gem_step_raises_no_past_loss_to_first_order():
    model, method, streams, _ = gem_in_conflict(0.0)
    g = flat(gradients(model))
    start = copy.deepcopy(model).double()
    before = [mean_loss(start, rows).item() for rows in streams]

    def losses_after(direction, size=1e-4):
        moved, at = copy.deepcopy(start), 0
        with torch.no_grad():
            for p in moved.parameters():
                part = direction[at : at + p.numel()]
                p.sub_(size * torch.tensor(part).reshape(p.shape) / np.linalg.norm(direction))
                at += p.numel()
        return [mean_loss(moved, rows).item() for rows in streams]

    raised = [after - loss for after, loss in zip(losses_after(g), before, strict=True)]
    assert max(raised) > 1e-6
    method.after_backward(next_step(model, 4), gradients(model))
    kept = [after - loss for after, loss in zip(losses_after(flat(gradients(model))), before, strict=True)]
    assert max(kept) < 1e-2 * max(raised)


def test_gem_leaves_a_gradient_without_conflict_untouched():
    model, method, _, past = gem_in_conflict(0.5)
    set_gradients(model, past.T @ np.linalg.solve(past @ past.T, np.ones(4)))
    before = gradients(model).copy()
    assert method.after_backward(next_step(model, 4), gradients(model)) == {"gem/violated": 0.0}
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before.tensors[name])


def each(stack: Shards) -> list[Shards]:
    return [stack.like(dict(zip(stack.tensors, row, strict=True))) for row in zip(*stack, strict=True)]


def test_gem_has_one_gradient_a_past_task_from_its_own_stored_rows():
    model = tiny_model()
    method = GEM(capacity=12)
    streams = after_stages(method, model, 3)
    set_gradients(model, np.ones(sum(p.numel() for p in model.parameters())))
    found = each(method.past_gradients(next_step(model, 3)))
    assert len(found) == 3
    assert all(torch.all(p.grad == 1) for p in model.parameters())
    for gradient, rows in zip(found, streams, strict=True):
        stored = [row for row in method.memory.rows if row in rows]
        assert len(stored) == 4
        np.testing.assert_allclose(flat(gradient), loss_gradient(model, stored), rtol=1e-3, atol=1e-6)
    few = each(method.past_gradients(next_step(model, 3, rows=2)))  # as many memory rows as the step has task rows
    stored = [row for row in method.memory.rows if row in streams[0]]
    pairs = [loss_gradient(model, pair) for pair in itertools.combinations(stored, 2)]
    assert min(np.abs(flat(few[0]) - pair).max() for pair in pairs) < 1e-6


# --- A-GEM ---


def a_gem_after_a_stage(model, **options):
    method = AveragedGEM(batch_size=6, **options)
    method.after_stage(tiny_stage(model, tiny_rows(6)))
    return method, method.memory.rows


@pytest.mark.parametrize("policy", ["quota", "reservoir"])
def test_a_gem_is_its_equation(policy):
    model = tiny_model()
    method, memory = a_gem_after_a_stage(model, policy=policy)
    r = loss_gradient(model, memory)
    torch.manual_seed(0)
    set_gradients(model, 0.1 * torch.randn(len(r)).double().numpy() - r)  # mostly against the memory
    g = flat(gradients(model))
    assert g @ r < 0
    values = method.after_backward(next_step(model, 1), gradients(model))
    after = flat(gradients(model))
    assert values == {"a_gem/projected": 1.0}
    np.testing.assert_allclose(after, g - (g @ r) / (r @ r) * r, atol=1e-6)
    assert abs(after @ r) < 1e-5 * abs(g @ r)
    with torch.no_grad():
        loss = mean_loss(model, memory).item()
        for p in model.parameters():
            p.sub_(1e-3 * p.grad / np.linalg.norm(after))
        assert mean_loss(model, memory).item() <= loss + 1e-6


def test_a_gem_leaves_a_gradient_without_conflict_untouched():
    model = tiny_model()
    method, memory = a_gem_after_a_stage(model)
    mean_loss(model, memory).backward()
    before = gradients(model).copy()
    values = method.after_backward(next_step(model, 1), gradients(model))
    assert values == {"a_gem/projected": 0.0}
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before.tensors[name])


@pytest.mark.parametrize("size", [0.0, 1e-44, 1e-30])
def test_a_gem_of_a_memory_that_is_learned(size, monkeypatch):
    """Its gradient is so small that its square is 0 in float32."""
    model = tiny_model()
    method, _ = a_gem_after_a_stage(model)
    reference = Shards({"w": torch.tensor([3.0, 4.0]) * size})
    step = next_step(model, 1)
    monkeypatch.setattr(type(step.stage), "gradient", lambda self, rows: reference)
    gradient = Shards({"w": torch.tensor([-2.0, 1.0])})
    method.after_backward(step, gradient)
    expected = [-1.76, 1.32] if size > 1e-38 else [-2.0, 1.0]
    torch.testing.assert_close(gradient.tensors["w"], torch.tensor(expected))


def test_gem_with_one_past_task_is_a_gem():
    model = tiny_model()
    found = []
    for method in (GEM(batch_size=6, margin=0.0), AveragedGEM(batch_size=6)):
        method.after_stage(tiny_stage(model, tiny_rows(6)))
        r = loss_gradient(model, method.memory.rows)
        torch.manual_seed(0)
        set_gradients(model, 0.1 * torch.randn(len(r)).double().numpy() - r)
        method.after_backward(next_step(model, 1), gradients(model))
        found.append(flat(gradients(model)))
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


# --- OGD ---


def orthogonality(stack):
    matrix = flat_stack(stack)
    return np.abs(matrix @ matrix.T - np.eye(len(matrix))).max()


def test_ogd_basis_is_orthonormal_after_100_stored_directions():
    model = tiny_model()
    method = OGD(samples=20, capacity=200)
    after_stages(method, model, 7, rows=20)
    assert 100 < len(method.strengths) <= 140
    assert orthogonality(method.basis) < 1e-5
    assert all(t.dtype == torch.float32 and len(t) == len(method.strengths) for t in method.basis)


def test_ogd_basis_stays_orthonormal_and_bounded_while_full():
    model = tiny_model()
    method = OGD(samples=20, capacity=30)
    for t in range(8):
        method.after_stage(tiny_stage(model, tiny_rows(20, seed=t), index=t + 1))
        shift_weights(model, 0.02, seed=t)
        assert len(method.strengths) == min(20 * (t + 1), 30)
        assert orthogonality(method.basis) < 1e-5


def test_directions_of_nearly_dependent_vectors_are_orthonormal():
    torch.manual_seed(0)
    common = torch.randn(4000)
    vectors = [Shards({"w": common + 10.0**-k * torch.randn(4000)}) for k in range(6) for _ in range(5)]
    vectors += [vectors[0].copy().scale_(3.0), vectors[0].zeros_like()]
    basis, strengths = principal_directions(Shards.stack(vectors), torch.ones(32, dtype=torch.float64), 32)
    assert orthogonality(basis) < 1e-5
    matrix = flat_stack(Shards.stack(vectors))[:-1]
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    rest = matrix - matrix @ flat_stack(basis).T @ flat_stack(basis)
    assert np.linalg.norm(rest, axis=1).max() < 1e-4 * strengths[0]
    assert 15 < len(strengths) < 31


def test_ogd_projects_onto_the_complement_of_the_stored_gradients():
    model = tiny_model()
    rows = tiny_rows(12)
    stored = output_gradients(model, rows)
    method = OGD(samples=12)
    method.after_stage(tiny_stage(model, rows))
    torch.manual_seed(0)
    set_gradients(model, stored.sum(axis=0) + 0.1 * torch.randn(stored.shape[1]).double().numpy())
    g = flat(gradients(model))
    values = method.after_backward(next_step(model, 1), gradients(model))
    after = flat(gradients(model))
    span = stored.T @ np.linalg.lstsq(stored.T, g, rcond=None)[0]
    np.testing.assert_allclose(after, g - span, atol=1e-5)
    assert values["ogd/removed"] == pytest.approx((span @ span) / (g @ g), rel=1e-5)
    assert np.abs(flat_stack(method.basis) @ after).max() < 1e-6 * np.linalg.norm(g)
    assert np.abs(stored @ after).max() < 1e-5 * np.linalg.norm(g) < np.abs(stored @ g).min()


def test_ogd_step_changes_no_stored_output_to_first_order():
    model = tiny_model()
    rows = tiny_rows(6)
    method = OGD()
    method.after_stage(tiny_stage(model, rows))
    mean_loss(model, tiny_rows(6, seed=9)).backward()

    def largest_change(size):
        moved = copy.deepcopy(model).double()
        with torch.no_grad():
            before = torch.stack([true_logits(moved, row) for row in rows])
            for p, q in zip(moved.parameters(), model.parameters(), strict=True):
                p.sub_(size * q.grad.double())
            return (torch.stack([true_logits(moved, row) for row in rows]) - before).abs().max().item()

    raw = largest_change(1e-4)
    method.after_backward(next_step(model, 1), gradients(model))
    assert largest_change(1e-4) < 1e-2 * raw
    assert largest_change(1e-2) / largest_change(1e-3) > 50  # what is left is of second order


def test_a_full_ogd_basis_keeps_the_strongest_directions_of_all_gradients():
    model = tiny_model()
    one, two = tiny_rows(10, seed=1), tiny_rows(10, seed=2)
    method = OGD(samples=10, capacity=14)
    first = output_gradients(model, one)
    method.after_stage(tiny_stage(model, one))
    np.testing.assert_allclose(method.strengths.numpy(), np.linalg.svd(first, compute_uv=False), rtol=1e-4)
    shift_weights(model, 0.05)
    second = output_gradients(model, two)
    method.after_stage(tiny_stage(model, two, index=2))
    _, strengths, directions = np.linalg.svd(np.vstack([first, second]), full_matrices=False)
    np.testing.assert_allclose(method.strengths.numpy(), strengths[:14], rtol=1e-3)
    overlap = np.linalg.svd(flat_stack(method.basis) @ directions[:14].T, compute_uv=False)
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def test_ogd_plus_takes_past_rows_gradients_again():
    outside = {}
    for variant in ("ogd", "ogd_plus"):
        model = tiny_model()
        method = OGD(variant=variant, samples=6, capacity=40)
        [one] = after_stages(method, model, 1)
        shift_weights(model, 0.2, seed=7)
        method.after_stage(tiny_stage(model, tiny_rows(6, seed=2), index=2))
        stored = output_gradients(model, one)  # of the first task at the second stage's weights
        basis = flat_stack(method.basis)
        outside[variant] = np.linalg.norm(stored - stored @ basis.T @ basis, axis=1)
        assert len(method.memory) == (12 if variant == "ogd_plus" else 0)
    assert outside["ogd_plus"].max() < 1e-4 and outside["ogd"].min() > 1e-2


def test_ogd_plus_memory_is_bounded():
    model = tiny_model()
    method = OGD(variant="ogd_plus", samples=6, capacity=10)
    after_stages(method, model, 4)
    assert len(method.memory) == 10 and set(method.memory.tasks) == {1, 2, 3, 4}
    assert len(method.strengths) == 10


def test_ogd_passes_over_a_row_with_nothing_to_predict():
    model = tiny_model()
    method = OGD()
    method.after_stage(tiny_stage(model, [*tiny_rows(3), {"input_ids": [5, 6], "labels": [5, -100]}]))
    assert len(method.strengths) == 3
    assert all(torch.isfinite(t).all() for t in method.basis)


# --- in training ---


def trainer(model, folder, method, rows, steps=1, **changes):
    options = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    } | changes
    return ContinualTrainer(
        model=model, args=TrainingArguments(**options), train_dataset=rows, data_collator=Collator(0), method=method
    )


def learn(trained, *tasks):
    """Train on each task in turn."""
    for rows in tasks:
        trained.train_dataset = rows
        trained.train()


def opposed(rows):
    """The same prompts with other answers."""
    return [{**row, "labels": [y if y == -100 else 3 + (y + 17) % 60 for y in row["labels"]]} for row in rows]


@projections
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_optimizer_gets_the_projected_gradient(kind, accumulation, tmp_path):
    """With plain SGD the weights move by -learning_rate * g~, once a step, however many micro-batches there are."""
    model, old = tiny_model(), tiny_rows(8, seed=1)
    new = opposed(old)
    for _ in range(10):
        for p, g in zip(model.parameters(), gradient_of(mean_loss(model, old), model), strict=True):
            p.data.sub_(0.5 * g)
    method = made(kind)
    method.after_stage(tiny_stage(model, old))
    basis = flat_stack(method.basis) if kind.startswith("ogd") else None
    shift_weights(model, 0.02)
    g, r, start = loss_gradient(model, new), loss_gradient(model, old), flat(weights(model).copy())
    size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    trained = trainer(model, tmp_path, method, new, **size)
    trained.stage_index = 2
    trained.train()
    assert g @ r < 0
    expected = {
        "gem": lambda: g + max(0.5, -(g @ r) / (r @ r)) * r,
        "gem margin 0": lambda: g - (g @ r) / (r @ r) * r,
        "a_gem": lambda: g - (g @ r) / (r @ r) * r,
        "ogd": lambda: g - basis.T @ (basis @ g),
        "ogd_plus": lambda: g - basis.T @ (basis @ g),
    }[kind]()
    assert np.abs(expected - g).max() > 1e-2
    np.testing.assert_allclose((start - flat(weights(model))) / 0.1, expected, atol=1e-5)


@projections
def test_state_continues_identically_in_a_fresh_method(kind, tmp_path):
    model = tiny_model()
    method = made(kind)
    after_stages(method, model, 3)
    save_states([method], tmp_path)
    other = made(kind)
    load_states([other], tmp_path, model)
    results = []
    for each in (method, other):
        mean_loss(model, opposed(tiny_rows(6, seed=1))).backward()
        values = each.after_backward(next_step(model, 3), gradients(model))
        results.append((values, gradients(model).copy()))
        each.after_stage(tiny_stage(model, tiny_rows(6, seed=8), index=4))
        model.zero_grad()
    assert results[0][0] == results[1][0]
    for one, two in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, two)
    one, two = method.state(), other.state()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]


@pytest.mark.parametrize("kind", ["gem", "a_gem", "ogd"])
def test_capacity_0_is_sequential_bit_for_bit(kind, tmp_path):
    ends = []
    for method in ("sequential", {"name": kind, "capacity": 0}):
        model = tiny_model()
        learn(trainer(model, tmp_path, method, [], steps=3, optim="adamw_torch"), tiny_rows(16), tiny_rows(16, seed=1))
        ends.append(weights(model).copy())
    for one, two in zip(*ends, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("pair", list(itertools.permutations(["gem", "a_gem", "ogd", "osf"], 2)))
def test_one_projection_would_undo_the_other(pair):
    with pytest.raises(ConfigError, match="cannot be applied together"):
        build([(name, {}) for name in pair])


def function_of(task, tokens=16):
    """Rows [task, filler, token] -> the task's own permutation of the tokens."""
    answers, chance = list(range(40, 40 + tokens)), random.Random(task)
    chance.shuffle(answers)
    cells = [(chance.randrange(3, 10), chance.randrange(tokens)) for _ in range(96)]
    return [{"input_ids": [10 + task, z, 20 + t, answers[t]], "labels": [-100] * 3 + [answers[t]]} for z, t in cells]


def experienced(seed):
    """A model that has learned other such tasks, and then task 0."""
    model = tiny_model(seed, hidden_size=32, intermediate_size=64)
    optimizer, chance = torch.optim.Adam(model.parameters(), 3e-3), random.Random(seed)
    for rows, steps in (([row for task in range(2, 10) for row in function_of(task)], 200), (function_of(0), 60)):
        for _ in range(steps):
            optimizer.zero_grad()
            mean_loss(model, chance.sample(rows, 32)).backward()
            optimizer.step()
    return model


def forgotten(start, method, folder):
    """Nats by which task 0's loss rises while small steps of plain SGD learn task 1; task 1's loss at the end."""
    model = copy.deepcopy(start)
    trained = trainer(model, folder, method, function_of(1), 80, per_device_train_batch_size=16, learning_rate=0.01)
    trained.methods[0].after_stage(tiny_stage(model, function_of(0)))
    trained.stage_index, before = 2, mean_loss(model, function_of(0)).item()
    trained.train()
    return mean_loss(model, function_of(0)).item() - before, mean_loss(model, function_of(1)).item()


@pytest.mark.slow
def test_each_forgets_less_than_sequential(tmp_path):
    starts = [experienced(seed) for seed in range(2)]
    methods = ("sequential", "gem", "a_gem", "ogd")
    found = {name: [forgotten(start, name, tmp_path) for start in starts] for name in methods}
    assert all(learned < 0.3 for results in found.values() for _, learned in results)
    mean = {name: sum(forgetting for forgetting, _ in results) / 2 for name, results in found.items()}
    assert mean["sequential"] > 1
    for name, share in {"gem": 0.1, "a_gem": 0.85, "ogd": 0.85}.items():
        assert mean[name] < share * mean["sequential"], name
