"""The losses of rehearsal, against published values, finite differences, plain implementations and their properties."""

from __future__ import annotations

import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from holdfast.errors import ConfigError
from holdfast.losses import (
    Divergence,
    Head,
    chunked_kl,
    chunked_next_token_nll,
    classify,
    dynamic_weight,
    kl_divergence,
    l1_loss,
    l2_loss,
    logit_mse,
    margin_loss,
    next_token_nll,
)
from support.paths import GOLDEN, SHARED

DIRECTIONS = ["forward", "reverse"]


def golden(name):
    """The few cases of the repository, and all cases where the full set is present."""
    path = SHARED / "golden" / name if (SHARED / "golden" / name).exists() else GOLDEN / name
    return [
        {key: torch.tensor(value) if isinstance(value, list) else value for key, value in case.items()}
        for case in json.loads(path.read_text())
    ]


def normal(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_logits(hidden, head, bias=None, softcap=None, logit_scale=1.0):
    logits = F.linear(hidden, head, bias) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


# Published values


@pytest.mark.parametrize(
    "case", golden("gere_margin.json"), ids=lambda c: f"{c['pred_hidden'].shape[1]}-w{c['weight']}"
)
def test_margin_loss_and_total_are_the_published_ones(case):
    low, high, mask = case["mean"] - case["std"], case["mean"] + case["std"], case["attention_mask"]
    margin = margin_loss(case["pred_hidden"], classify(case["teacher_hidden"], low, high), low, high, mask)
    nll, count = next_token_nll(case["logits"], case["input_ids"].masked_fill(mask == 0, -100))
    ce = nll / count
    weight = dynamic_weight(ce, margin) if case["weight"] == "dy" else float(case["weight"])
    assert margin.item() == pytest.approx(case["margin_loss"], abs=1e-5)
    assert ce.item() == pytest.approx(case["ce_loss"], abs=1e-5)
    assert (ce + weight * margin).item() == pytest.approx(case["total_loss"], abs=1e-5)


@pytest.mark.parametrize("case", golden("forgetting_losses.json"), ids=lambda c: str(c["tokens"].shape[1]))
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_kl_and_next_token_loss_are_the_published_ones(case, chunk_size):
    """Published: the last position counts as zero and the divisor is batch * seq all the same."""
    tokens, teacher = case["tokens"], case["teacher_logits"]
    student = case["student_logits"].requires_grad_()
    divisor = tokens.numel()
    mask = torch.ones_like(tokens)
    mask[:, -1] = 0
    if chunk_size is None:
        kl, count = kl_divergence(student, teacher, mask)
        nll, _ = next_token_nll(student, tokens)
    else:  # the unit matrix as head makes the hidden states the logits
        unit = Head(torch.eye(student.shape[-1]))
        kl, count = chunked_kl(student, unit, teacher, unit, mask, chunk_size=chunk_size)
        nll, _ = chunked_next_token_nll(student, unit, tokens, chunk_size=chunk_size)
    assert count == mask.sum()
    assert (kl / divisor).item() == pytest.approx(case["kl"], abs=1e-5)
    assert (nll / divisor).item() == pytest.approx(case["next_token_loss"], abs=1e-5)
    (gradient,) = torch.autograd.grad(kl / divisor, student)
    torch.testing.assert_close(gradient, case["kl_gradient_wrt_student_logits"], rtol=1e-4, atol=1e-6)


# Finite differences in float64

MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
LABELS = torch.tensor([[3, 1, -100, 4], [-100, 2, 2, 0]])


def test_finite_differences_of_the_losses_on_logits():
    student, teacher = normal(2, 4, 5).requires_grad_(), normal(2, 4, 5, seed=1)
    for kind in (Divergence(temperature, direction) for temperature in (1.0, 2.0) for direction in DIRECTIONS):
        assert torch.autograd.gradcheck(lambda s, kind=kind: kl_divergence(s, teacher, MASK, kind)[0], (student,))
    assert torch.autograd.gradcheck(lambda s: next_token_nll(s, LABELS)[0], (student,))
    assert torch.autograd.gradcheck(lambda s: logit_mse(s, teacher, MASK), (student,))


def test_finite_differences_of_the_losses_on_hidden_states():
    student, teacher = normal(2, 4, 3).requires_grad_(), normal(2, 4, 3, seed=1)
    low, high = torch.full((3,), -0.4).double(), torch.full((3,), 0.5).double()
    classes = classify(teacher, low, high)
    assert set(classes.flatten().tolist()) == {0, 1, 2}
    for reduction in ("nonzero", "mean"):
        assert margin_loss(student, classes, low, high, MASK, reduction) > 0
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: margin_loss(s, classes, low, high, MASK, r), (student,), eps=1e-7
        )
    assert torch.autograd.gradcheck(lambda s: l1_loss(s, teacher, MASK), (student,))
    assert torch.autograd.gradcheck(lambda s: l2_loss(s, teacher, MASK), (student,))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_finite_differences_of_the_chunked_losses(softcap):
    hidden, head, bias = (normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 4, 3), (5, 3), (5,)]))
    caps = {"softcap": softcap, "logit_scale": 0.7}
    teacher, teacher_head = normal(2, 4, 2, seed=7), Head(normal(5, 2, seed=8), **caps)
    for kind in (Divergence(1.7, direction) for direction in DIRECTIONS):

        def kl(h, w, b, kind=kind):
            return chunked_kl(h, Head(w, b, **caps), teacher, teacher_head, MASK, kind, chunk_size=2)[0]

        assert torch.autograd.gradcheck(kl, (hidden, head, bias))
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_next_token_nll(h, Head(w, b, **caps), LABELS, chunk_size=2)[0], (hidden, head, bias)
    )


# Chunked equals plain: value and every gradient


def assert_same(plain, ours, leaves, rtol=1e-10, atol=1e-12):
    """Both scalars and their gradients, with a factor of the loss that is not 1."""
    torch.testing.assert_close(ours, plain, rtol=rtol, atol=atol)
    expected = torch.autograd.grad(-0.3 * plain, leaves, retain_graph=True)
    for gradient, other in zip(torch.autograd.grad(-0.3 * ours, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=rtol, atol=atol)


MASKS = {"none": None, "some": MASK, "all off": torch.zeros(2, 4, dtype=torch.bool), "one": torch.eye(2, 4)}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, True), (2.0, True), (0.5, False)])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (2.0, 1.0), (3.0, 0.25)])
def test_chunked_kl_equals_plain(mask, direction, temperature, scale, softcap, logit_scale):
    hidden, head, bias = (normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 4, 6), (11, 6), (11,)]))
    teacher, teacher_head, teacher_bias = normal(2, 4, 3, seed=7), normal(11, 3, seed=8), normal(11, seed=9)
    kind = Divergence(temperature, direction, temperature_squared=scale)
    caps = {"softcap": softcap, "logit_scale": logit_scale}
    plain, count = kl_divergence(
        plain_logits(hidden, head, bias, **caps),
        plain_logits(teacher, teacher_head, teacher_bias, **caps),
        mask,
        kind,
    )
    student, other = Head(head, bias, **caps), Head(teacher_head, teacher_bias, **caps)
    for chunk_size in (1, 3, 8, 1000):
        ours, our_count = chunked_kl(hidden, student, teacher, other, mask, kind, chunk_size=chunk_size)
        assert our_count == count == (8 if mask is None else mask.sum())
        assert_same(plain, ours, (hidden, head, bias))
        made = plain_logits(hidden, head, bias, **caps)
        ours, our_count = chunked_kl(
            hidden.detach(), student.detached(), teacher, other, mask, kind, student_logits=made, chunk_size=chunk_size
        )
        assert our_count == count
        assert_same(plain, ours, (hidden, head, bias))


@pytest.mark.parametrize("labels", [LABELS, LABELS.abs() % 5, torch.full((2, 4), -100)], ids=["some", "all", "none"])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (3.0, 0.25)])
def test_chunked_next_token_loss_equals_plain(labels, softcap, logit_scale):
    hidden, head, bias = (normal(*s, seed=i).requires_grad_() for i, s in enumerate([(2, 4, 6), (5, 6), (5,)]))
    caps = {"softcap": softcap, "logit_scale": logit_scale}
    plain, count = next_token_nll(plain_logits(hidden, head, bias, **caps), labels)
    for chunk_size in (1, 4, 1000):
        ours, our_count = chunked_next_token_nll(hidden, Head(head, bias, **caps), labels, chunk_size=chunk_size)
        assert our_count == count
        assert_same(plain, ours, (hidden, head, bias))


@pytest.mark.parametrize("cast", ["bfloat16 weights", "autocast"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_chunked_losses_in_bfloat16(cast, direction):
    """Within bfloat16's rounding of the same logits in float64, and the head's gradient as good as one product's."""
    stored = torch.bfloat16 if cast == "bfloat16 weights" else torch.float32
    hidden, head = normal(2, 40, 16).to(stored).requires_grad_(), normal(300, 16, seed=1).to(stored).requires_grad_()
    teacher, teacher_head = normal(2, 40, 16, seed=2).to(stored), normal(300, 16, seed=3).to(stored)
    labels = torch.randint(300, (2, 40), generator=torch.Generator().manual_seed(0))
    kind = Divergence(direction=direction)
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        kl, _ = chunked_kl(hidden, Head(head), teacher, Head(teacher_head), None, kind, chunk_size=7)
        nll, _ = chunked_next_token_nll(hidden, Head(head), labels, chunk_size=7)
    assert kl.dtype == nll.dtype == torch.float32
    wide, wide_head = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    exact_kl, _ = kl_divergence(wide @ wide_head.T, teacher.double() @ teacher_head.double().T, divergence=kind)
    exact_nll, _ = next_token_nll(wide @ wide_head.T, labels)
    for ours, exact in ((kl, exact_kl), (nll, exact_nll)):
        assert ours.item() == pytest.approx(exact.item(), rel=5e-3)
        gradients = torch.autograd.grad(ours / 80, (hidden, head))
        for gradient, expected in zip(gradients, torch.autograd.grad(exact / 80, (wide, wide_head)), strict=True):
            assert gradient.dtype == stored
            assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_head_gradient_does_not_lose_small_chunks_in_bfloat16():
    """Summed up in bfloat16, 1,000 equal contributions stop at 256 times the first."""
    tokens = 1000
    hidden, head = torch.ones(1, tokens, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    head.requires_grad_()
    labels = torch.zeros(1, tokens, dtype=torch.int64)
    chunked_next_token_nll(hidden, Head(head), labels, chunk_size=1)[0].backward()
    torch.testing.assert_close(head.grad.flatten(), torch.tensor([-499.5, 499.5], dtype=torch.bfloat16))


def test_factor_of_the_loss_is_not_rounded_to_the_weights_type():
    hidden = normal(1, 3, 8, dtype=torch.bfloat16).requires_grad_()
    head, labels = normal(8, 8, seed=1, dtype=torch.bfloat16), torch.zeros(1, 3, dtype=torch.int64)
    loss, _ = chunked_next_token_nll(hidden, Head(head), labels)
    (one,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * 1.00390625, hidden)  # 1 + 2^-8, which bfloat16 rounds to 1
    assert not torch.equal(one, scaled)
    assert torch.equal(scaled, (one.float() * 1.00390625).bfloat16())


def test_chunked_losses_may_be_used_more_than_once():
    hidden, head = normal(2, 4, 6).requires_grad_(), normal(5, 6, seed=1).requires_grad_()
    teacher, teacher_head = normal(2, 4, 6, seed=2), normal(5, 6, seed=3)
    ours, _ = chunked_kl(hidden, Head(head), teacher, Head(teacher_head), None, chunk_size=3)
    plain, _ = kl_divergence(hidden @ head.T, teacher @ teacher_head.T)
    assert_same(plain**2 + 3 * plain, ours**2 + 3 * ours, (hidden, head))
    other, _ = chunked_kl(hidden, Head(head), teacher, Head(teacher_head), None, chunk_size=3)
    first = torch.autograd.grad(other, (hidden, head), retain_graph=True)
    again = torch.autograd.grad(other, (hidden, head))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_one_weight_may_be_both_heads():
    """As with LoRA, where the head is frozen; under autocast both take the same narrow copy."""
    hidden, teacher, head = (
        normal(2, 4, 6).float().requires_grad_(),
        normal(2, 4, 6, seed=1).float(),
        normal(9, 6).float(),
    )
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            shared, _ = chunked_kl(hidden, Head(head), teacher, Head(head), MASK)
            apart, _ = chunked_kl(hidden, Head(head), teacher, Head(head.clone()), MASK)
        assert torch.equal(shared, apart)
        same = zip(torch.autograd.grad(shared, hidden), torch.autograd.grad(apart, hidden), strict=True)
        assert all(torch.equal(a, b) for a, b in same)


def test_gradients_go_only_where_they_are_wanted():
    tensors = [normal(2, 4, 6), normal(5, 6, seed=1), normal(2, 4, 6, seed=2), normal(5, 6, seed=3)]
    student, head, teacher, teacher_head = tensors

    def kl():
        return chunked_kl(student, Head(head), teacher, Head(teacher_head), None)[0]

    assert not kl().requires_grad
    for x in tensors:
        x.requires_grad_()
    with torch.no_grad():
        assert not kl().requires_grad
    gradients = torch.autograd.grad(kl(), tensors, allow_unused=True)
    assert [g is not None for g in gradients] == [True, True, False, False]
    gradients = torch.autograd.grad(
        kl_divergence(tensors[0] @ tensors[1].T, tensors[2] @ tensors[3].T)[0], tensors, allow_unused=True
    )
    assert [g is not None for g in gradients] == [True, True, False, False]


# Memory


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all live storages that were allocated inside; ``peak`` is their maximum."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.counted = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, torch.Tensor):
                self.counted.add(x.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.counted:
                storage = x.untyped_storage()
                self.counted.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, count):
        self.live -= count


def peak_bytes(loss, *leaves):
    with LiveBytes() as memory:
        gradients = torch.autograd.grad(loss() / 7, leaves)
    assert len(gradients) == len(leaves)
    return memory.peak


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_chunked_losses_hold_at_most_a_fifth_of_the_plain_ones(trained):
    """With 128,000 words, and as many chunks as the default size makes of 4,096 tokens."""
    vocab, tokens, width = 128_000, 32, 8
    hidden, head = normal(1, tokens, width, dtype=torch.float32).requires_grad_(), normal(vocab, width).float()
    teacher, teacher_head = normal(1, tokens, width, seed=2).float(), normal(vocab, width, seed=3).float()
    leaves = (hidden, head.requires_grad_()) if trained else (hidden,)
    labels = torch.arange(tokens).unsqueeze(0)
    full = tokens * vocab * 4
    plain = peak_bytes(lambda: kl_divergence(hidden @ head.T, (teacher @ teacher_head.T).detach())[0], *leaves)
    assert plain > 3 * full  # both models' logits and a softmax: the count sees them
    heads = Head(head), Head(teacher_head)
    kl = peak_bytes(lambda: chunked_kl(hidden, heads[0], teacher, heads[1], None, chunk_size=4)[0], *leaves)
    assert kl < plain / 5
    plain = peak_bytes(lambda: next_token_nll(hidden @ head.T, labels)[0], *leaves)
    nll = peak_bytes(lambda: chunked_next_token_nll(hidden, heads[0], labels, chunk_size=4)[0], *leaves)
    assert nll < plain / (3 if trained else 5)  # the head's gradient, which both hold, is a larger share of little


def test_no_gradient_is_made_where_none_is_recorded():
    hidden, head = normal(1, 4, 200, dtype=torch.float32), normal(500, 200).float().requires_grad_()
    with LiveBytes() as memory, torch.no_grad():
        chunked_kl(hidden, Head(head), hidden, Head(head), None)
        chunked_next_token_nll(hidden, Head(head), torch.ones(1, 4, dtype=torch.int64))
    assert memory.peak < head.nbytes / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_margin_loss_holds_no_more_than_two_tensors_of_the_hidden_states_size(dtype):
    hidden, teacher = normal(8, 1024, 16).to(dtype).requires_grad_(), normal(8, 1024, 16, seed=1).to(dtype)
    low, high = torch.full((16,), -0.8), torch.full((16,), 0.8)
    classes = classify(teacher, low, high)
    assert peak_bytes(lambda: margin_loss(hidden, classes, low, high), hidden) < 2.01 * hidden.nbytes


# Properties


def test_kl_is_not_negative_and_zero_only_for_equal_models():
    for direction in DIRECTIONS:
        kind = Divergence(direction=direction)
        for seed in range(5):
            student, teacher = normal(3, 4, 9, seed=seed, scale=3), normal(3, 4, 9, seed=100 + seed, scale=3)
            assert kl_divergence(student, teacher, divergence=kind)[0] > 0
            assert kl_divergence(student, student + 5, divergence=kind)[0].abs() < 1e-12  # a shift changes nothing
    hidden, head = normal(2, 4, 6).float().requires_grad_(), normal(9, 6, seed=1).float().requires_grad_()
    for direction in DIRECTIONS:
        loss, _ = chunked_kl(hidden, Head(head), hidden, Head(head), None, Divergence(2.0, direction))
        assert loss == 0
        assert all(g.abs().max() < 1e-6 for g in torch.autograd.grad(loss, (hidden, head)))


def test_directions_by_hand():
    """Teacher (1/2, 1/2), student (1/4, 3/4)."""
    teacher, student = torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]).log()
    forward, reverse = (kl_divergence(student, teacher, None, Divergence(direction=d))[0].item() for d in DIRECTIONS)
    assert forward == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert reverse == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))


def test_temperature_flattens_and_the_factor_restores_the_size():
    student, teacher = normal(4, 7), normal(4, 7, seed=1)
    plain = kl_divergence(student / 3, teacher / 3)[0]
    for kind, factor in ((Divergence(3.0, temperature_squared=False), 1), (Divergence(3.0), 9)):
        torch.testing.assert_close(kl_divergence(student, teacher, None, kind)[0], factor * plain)


def naive_margin(hidden, teacher, low, high, mask, reduction):
    total, violations, entries = 0.0, 0, 0
    for b in range(hidden.shape[0]):
        for s in range(hidden.shape[1]):
            for d in range(hidden.shape[2]):
                if not mask[b, s]:
                    continue
                h, was, lo, hi = (x.item() for x in (hidden[b, s, d], teacher[b, s, d], low[d], high[d]))
                if was <= lo:
                    value = max(h - lo, 0)
                elif was >= hi:
                    value = max(hi - h, 0)
                else:
                    value = max(h - hi, 0) + max(lo - h, 0)
                total, violations, entries = total + value, violations + (value != 0), entries + 1
    return total / (violations + 1e-8) if reduction == "nonzero" else total / entries


@pytest.mark.parametrize("reduction", ["nonzero", "mean"])
def test_margin_loss_equals_a_plain_loop(reduction):
    hidden, teacher = normal(2, 4, 5), normal(2, 4, 5, seed=1)
    low, high = -normal(5, seed=2).abs(), normal(5, seed=3).abs()
    ours = margin_loss(hidden, classify(teacher, low, high), low, high, MASK, reduction)
    assert ours.item() == pytest.approx(naive_margin(hidden, teacher, low, high, MASK, reduction))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_margin_is_zero_while_the_model_is_its_own_teacher(dtype):
    hidden = normal(3, 50, 16).to(dtype).requires_grad_()
    flat = hidden.detach().double().flatten(end_dim=1)
    low, high = flat.mean(0) - flat.std(0), flat.mean(0) + flat.std(0)
    low[0], high[0] = flat[0, 0], flat[1, 0].maximum(flat[0, 0])  # activations that lie on their threshold
    low[1] = high[1] = 0.0
    classes = classify(hidden, low, high)
    assert classes.dtype == torch.uint8
    assert set(classes.flatten().tolist()) == {0, 1, 2}
    loss = margin_loss(hidden, classes, low, high)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


def test_thresholds_belong_to_the_outer_states():
    low, high = torch.tensor([-1.0]), torch.tensor([1.0])
    values = torch.tensor([[[-2.0], [-1.0], [-0.9], [0.9], [1.0], [2.0]]])
    assert classify(values, low, high).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_nonzero_reduction_does_not_shrink_with_rarer_violations_and_mean_does():
    low, high = -torch.ones(4), torch.ones(4)
    classes = torch.ones(1, 10, 4, dtype=torch.uint8)
    one, many = torch.zeros(1, 10, 4), torch.zeros(1, 10, 4)
    one[0, 0, 0] = 3.0
    many[0, :, 0] = 3.0
    values = [[margin_loss(h, classes, low, high, None, r).item() for h in (one, many)] for r in ("nonzero", "mean")]
    assert values[0] == pytest.approx([2.0, 2.0])
    assert values[1] == pytest.approx([2.0 / 40, 2.0 / 4])


def test_margin_loss_is_that_of_its_tokens_however_many_there_are():
    """More tokens than a chunk, signed classes, and a sum beyond bfloat16's precision."""
    low, high = -torch.ones(3), torch.ones(3)
    hidden = torch.full((5, 700, 3), 3.0, dtype=torch.bfloat16).requires_grad_()
    classes = torch.ones(5, 700, 3, dtype=torch.int8)
    loss = margin_loss(hidden, classes, low, high, reduction="mean")
    assert loss.item() == pytest.approx(2.0)
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16
    torch.testing.assert_close(hidden.grad.float(), torch.full((5, 700, 3), 1 / 10500), rtol=1e-2, atol=0)


def test_dynamic_weight_makes_both_terms_equal_and_carries_no_gradient():
    ce, term = torch.tensor(3.0, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    weight = dynamic_weight(ce, term)
    assert not weight.requires_grad
    assert (weight * term).item() == pytest.approx(3.0)
    assert torch.isfinite(dynamic_weight(ce, torch.tensor(0.0)) * 0)


def test_distances_by_hand():
    hidden, target = torch.tensor([[[1.0, -2.0], [9.0, 9.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[1, 0]])
    assert l1_loss(hidden, target, mask) == 2.0  # (1 + 3) / 2
    assert l2_loss(hidden, target, mask) == 5.0  # (1 + 9) / 2
    assert logit_mse(hidden, target, mask) == 10.0  # 1 + 9, over one position
    assert logit_mse(hidden, target) == pytest.approx((10 + 162) / 2)


UNIT = Head(torch.eye(3).double())
SAMPLES = {
    "l1": lambda h, mask: l1_loss(h, torch.ones_like(h), mask),
    "l2": lambda h, mask: l2_loss(h, torch.ones_like(h), mask),
    "logit_mse": lambda h, mask: logit_mse(h, torch.ones_like(h), mask),
    "margin": lambda h, mask: margin_loss(
        h, torch.ones_like(h, dtype=torch.uint8), -torch.ones(3).double(), torch.ones(3).double(), mask
    ),
    "margin mean": lambda h, mask: margin_loss(
        h, torch.ones_like(h, dtype=torch.uint8), -torch.ones(3).double(), torch.ones(3).double(), mask, "mean"
    ),
    "kl": lambda h, mask: kl_divergence(h, torch.ones_like(h), mask)[0],
    "chunked kl": lambda h, mask: chunked_kl(h, UNIT, torch.ones_like(h), UNIT, mask)[0],
}


@pytest.mark.parametrize("loss", SAMPLES.values(), ids=SAMPLES)
def test_masked_positions_neither_count_nor_spread_nan(loss):
    hidden = normal(2, 4, 3, scale=3)
    expected = loss(torch.cat([hidden[0, :3], hidden[1, 1:]]).unsqueeze(0), None)
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    hidden[mask == 0] = torch.nan  # as padding can be
    hidden.requires_grad_()
    ours = loss(hidden, mask)
    torch.testing.assert_close(ours, expected)
    ours.backward()
    assert not hidden.grad[mask == 0].any()
    assert hidden.grad[mask == 1].any()


@pytest.mark.parametrize("loss", SAMPLES.values(), ids=SAMPLES)
def test_nothing_unmasked_is_zero_with_a_zero_gradient(loss):
    hidden = normal(2, 4, 3).requires_grad_()
    value = loss(hidden, torch.zeros(2, 4))
    value.backward()
    assert value == 0
    assert not hidden.grad.any()


# Bad input


def test_bad_input_is_refused_with_its_reason():
    hidden, head = normal(1, 3, 4), normal(9, 4)
    with pytest.raises(ConfigError, match=r"temperature: 0 .* above 0"):
        Divergence(temperature=0)
    with pytest.raises(ConfigError, match="temperature: nan"):
        Divergence(temperature=math.nan)
    with pytest.raises(ConfigError, match=r"direction: 'foward' .* did you mean 'forward'"):
        Divergence(direction="foward")
    with pytest.raises(ConfigError, match="vocabulary of 7, the student one of 9"):
        chunked_kl(hidden, Head(head), hidden, Head(head[:7]), None)
    with pytest.raises(ConfigError, match="vocabulary of 3, the student one of 4"):
        kl_divergence(hidden, hidden[..., :3])
    with pytest.raises(ConfigError, match="chunk_size: 0"):
        chunked_kl(hidden, Head(head), hidden, Head(head), None, chunk_size=0)
    with pytest.raises(ConfigError, match=r"reduction: 'non_zero' .* did you mean 'nonzero'"):
        margin_loss(hidden, torch.ones(1, 3, 4, dtype=torch.uint8), hidden[0, 0], hidden[0, 0], None, "non_zero")
