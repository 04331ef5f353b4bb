"""DER++: both terms against a plain loop, and what its weights switch off."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from holdfast.api.stage import Rehearsed, Step
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.der import DER
from holdfast.methods.der_pp import DERpp
from support.rehearsed import two_stages
from support.tiny import pad_rows, tiny_model, tiny_rows, tiny_stage
from support.trained import vector


def remembering(**options):
    """A method with a memory, and the model, moved since."""
    method, model = DERpp(**{"capacity": 5, "ratio": 1.0, "top": None} | options), tiny_model()
    stage = tiny_stage(model, tiny_rows(9))
    method.after_stage(stage)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return method, model, stage


def rehearsed(model, extra, rows, step):
    """What the trainer gives of some of the extra rows in a micro-batch."""
    batch = pad_rows([extra.rows[i] for i in rows])
    labels = batch["labels"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return Rehearsed([extra.samples[i] for i in rows], labels, logits, (), share=float("nan"))


def test_both_terms_are_those_of_a_loop_over_rows_however_they_fall_into_micro_batches():
    method, model, stage = remembering(weight=0.3, replay_weight=0.7)
    step = Step(stage, 3, 4, 3, True)
    extra = method.extra_rows(step)
    assert len(extra.rows) == 8 and [s < 5 for s in extra.samples] == [True] * 4 + [False] * 4
    squares, nats, counts = 0.0, 0.0, [0, 0]
    for row, sample in zip(extra.rows, extra.samples, strict=True):
        batch = pad_rows([row])
        labels = batch.pop("labels")[0]
        logits = model(**batch).logits[0]
        answer = [s for s in range(1, len(labels)) if labels[s] != -100]
        for place, s in enumerate(answer):
            if sample < 5:
                squares += float((logits[s - 1] - method.answers[sample].logits[place]).square().mean().detach())
                counts[0] += 1
            else:
                nats += float(F.cross_entropy(logits[s - 1], labels[s]).detach())
                counts[1] += 1
    expected = {"der_pp": 0.3 * squares / counts[0], "der_pp/replay": 0.7 * nats / counts[1]}
    total = dict.fromkeys(expected, 0.0)
    for rows in ([0, 1, 2, 4], [3, 5], [6, 7]):
        step.rehearsed = {"der_pp": rehearsed(model, extra, rows, step)}
        for name, term in method.loss_terms(step, {}, None).items():
            assert term.requires_grad
            total[name] += float(term.detach()) / 3  # the trainer's mean over micro-batches
    assert total == pytest.approx(expected, rel=1e-5)


def terms_of(trainer):
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    return {name for name in last if name.startswith("term/der")}


def test_a_weight_of_zero_leaves_the_other_term(tmp_path):
    assert terms_of(two_stages(tmp_path / "both", DERpp())) == {"term/der_pp", "term/der_pp/replay"}
    assert terms_of(two_stages(tmp_path / "replay", DERpp(weight=0))) == {"term/der_pp/replay"}
    assert not terms_of(two_stages(tmp_path / "none", DERpp(weight=0, replay_weight=0)))


def test_without_replay_it_is_der_but_for_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(DERpp, "name", "der")  # the random choices follow from the name
    monkeypatch.setattr(DERpp, "not_with", {})
    ours, theirs = two_stages(tmp_path / "ours", DERpp(replay_weight=0)), two_stages(tmp_path / "theirs", DER())
    assert torch.equal(vector(ours.model), vector(theirs.model))


def test_micro_batches_change_nothing(tmp_path):
    ends = []
    for size in (4, 1):
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = two_stages(tmp_path / str(size), DERpp(ratio=1.0, weight=5.0), **args)
        ends.append(vector(trainer.model))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)


def test_der_beside_it_is_refused():
    with pytest.raises(ConfigError, match="'der_pp' and 'der' cannot be applied together: der_pp has the term of der"):
        build([("der", {}), ("der_pp", {})])
