"""The hooks change what they should and nothing else."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

from holdfast.api.method import Method
from holdfast.api.stage import Extra
from holdfast.data.collate import Collator
from holdfast.engines.process import Process
from holdfast.errors import ConfigError, MethodError, NonFiniteLossError
from holdfast.methods.replay import Replay
from holdfast.training.extra_rows import ExtraRows
from holdfast.training.terms import Terms
from holdfast.training.trainer import continual
from support.tiny import tiny_model, tiny_rows
from support.trained import options, trained, vector


def test_without_a_method_it_is_the_plain_trainer(tmp_path):
    """Up to rounding, since the head is applied to supervised tokens alone."""
    plain, ours = trained(tmp_path, Trainer), trained(tmp_path)
    torch.testing.assert_close(vector(plain.model), vector(ours.model), rtol=1e-5, atol=1e-6)


def test_each_stage_begins_with_a_new_optimizer(tmp_path):
    """AdamW's averages of the last stage's gradients are gone, as in a trainer of its own for each stage."""

    def learn(trainer, seed):
        torch.manual_seed(seed)
        trainer.train_dataset = tiny_rows(8, seed=seed)
        trainer.train()
        return trainer

    one = learn(learn(trained(tmp_path, stages=0), 1), 2)
    model = tiny_model()
    each = [learn(trained(tmp_path, model=model, stages=0), seed) for seed in (1, 2)]
    assert torch.equal(vector(one.model), vector(each[-1].model))
    assert {int(entry["step"]) for entry in one.optimizer.state.values()} == {2}


def test_an_optimizer_that_the_user_gave_keeps_its_state(tmp_path):
    model = tiny_model()
    mine = torch.optim.AdamW(model.parameters(), lr=1e-2)
    trained(tmp_path, model=model, rows=tiny_rows(8), stages=2, optimizers=(mine, None))
    assert {int(entry["step"]) for entry in mine.state.values()} == {4}


class Recorder(Replay):
    """Replay that notes what it was asked for and what came."""

    name = "recorder"

    def __init__(self, **changes):
        super().__init__(**changes)
        self.asked, self.came = [], {}

    def extra_rows(self, step):
        extra = super().extra_rows(step)
        if extra is not None:
            self.asked.append((step.rows, len(extra.rows)))
        return extra

    def loss_terms(self, step, batch, outputs):
        if self.name in step.rehearsed:
            rows = len(step.rehearsed[self.name].labels)
            self.came[step.index] = self.came.get(step.index, 0) + rows
        return super().loss_terms(step, batch, outputs)


def test_replay_is_the_same_at_any_accumulation(tmp_path):
    """18 rows in steps of 8, 8 and 2: the extra rows hold per step, and so does the trajectory."""
    results, counts = [], []
    for micro in (8, 4, 2, 1):
        recorder = Recorder(ratio=0.5)
        trainer = trained(
            tmp_path,
            args={"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro, "max_grad_norm": 0},
            method=recorder,
            stages=2,
        )
        results.append(vector(trainer.model))
        counts.append((recorder.asked, recorder.came))
    assert counts[0] == ([(8, 4), (8, 4), (2, 1)], {0: 4, 1: 4, 2: 1})
    assert all(count == counts[0] for count in counts)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-3, atol=1e-4)
    plain = trained(tmp_path, args={"per_device_train_batch_size": 8, "max_grad_norm": 0}, stages=2)
    assert (results[0] - vector(plain.model)).abs().max() > 1e-3


def test_replace_keeps_the_size_of_a_step_and_counts_the_tokens_that_are_there(tmp_path):
    seen = []

    class Watched(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append((self.state.global_step, inputs["input_ids"], inputs["labels"], num_items_in_batch))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    past = [{"input_ids": [60, 61, 62, 63, 60, 61], "labels": [-100, 61, 62, 63, 60, 61]}] * 4
    rows = [{key: [min(t, 59) for t in row[key]] for key in row} for row in tiny_rows(16)]
    replay = Replay(way="replace", ratio=0.25)
    for stage_rows in (past, rows):
        trained(
            tmp_path,
            continual(Watched),
            rows=stage_rows,
            args={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            method=replay,
        )
    seen = seen[1:]  # the past task was one step of one micro-batch
    for step in (0, 1):
        batches = [(ids, labels, items) for index, ids, labels, items in seen if index == step]
        replaced = sum(int((ids >= 60).any(dim=1).sum()) for ids, _, _ in batches)
        assert (sum(len(ids) for ids, _, _ in batches), replaced) == (8, 2)
        supervised = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in batches)
        assert all(int(items) == supervised for _, _, items in batches)


def test_rows_that_replace_others_lie_where_these_do():
    """On a device that is not the one on which rows are collated."""
    batch = {key: t.to("meta") for key, t in Collator(0)(tiny_rows(4)).items()}
    extra_rows = ExtraRows(tiny_model(), Collator(0), Process.this(), 0)
    for count in (1, 4):
        [found] = extra_rows._replace([batch], [4], Extra(tiny_rows(count, seed=1), "replace"), random.Random(0))
        assert len(found["labels"]) == 4 and {t.device.type for t in found.values()} == {"meta"}


class Penalty(Method):
    """Squared norm of the weights, as a loss term."""

    name = "penalty"
    form = "good"

    def declares(self, stage):
        return () if self.form == "undeclared" else ("penalty",)

    def loss_terms(self, step, batch, outputs):
        norm = sum((p**2).sum() for p in step.stage.model.parameters())
        return {
            "good": {"penalty": 0.1 * norm},
            "detached": {"penalty": norm.detach()},
            "zero": {"penalty": 0 * norm},
            "absent": {},
            "undeclared": {"penalty": norm},
        }[self.form]


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ("detached", "has no gradient"),
        ("zero", "exactly zero"),
        ("absent", "never returned"),
        ("undeclared", "did not declare"),
    ],
)
def test_a_term_that_does_nothing_is_an_error(form, reason, tmp_path):
    method = Penalty()
    method.form = form
    with pytest.raises(MethodError, match=reason):
        trained(tmp_path, method=method)


def test_a_stage_that_was_continued_is_checked_over_all_its_steps():
    stage, process = SimpleNamespace(index=2, task="red"), Process.this()
    for values, contributes in (([0.0, 0.0], False), ([0.0, 0.5], True)):
        terms = Terms(["penalty"])
        terms.remember([{"loss": 1.0, "term/penalty": value} for value in values], steps=4)
        if contributes:
            terms.check(stage, process)
        else:
            with pytest.raises(MethodError, match="in all 4 steps"):
                terms.check(stage, process)


def test_a_term_that_may_rest_is_a_warning(tmp_path, caplog):
    class Resting(Penalty):
        form = "zero"

        def may_rest(self, stage):
            return self.declares(stage)

    trained(tmp_path, method=Resting())
    assert "the loss term 'penalty' was exactly zero in all" in caplog.text
    resting = Resting()
    resting.form = "absent"
    with pytest.raises(MethodError, match="never returned"):
        trained(tmp_path, method=resting)


def test_a_term_is_a_mean_over_micro_batches_and_is_logged(tmp_path):
    whole = trained(tmp_path, args={"per_device_train_batch_size": 8, "max_grad_norm": 0}, method=Penalty())
    parts = trained(
        tmp_path,
        args={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0},
        method=Penalty(),
    )
    torch.testing.assert_close(vector(whole.model), vector(parts.model), rtol=1e-3, atol=1e-4)
    for trainer in (whole, parts):
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert len(logs) == 3
        for log in logs:
            assert log["loss"] == pytest.approx(log["term/task"] + log["term/penalty"], rel=1e-4)
    one, two = (t.state.log_history[0] for t in (whole, parts))
    assert one["term/penalty"] == pytest.approx(two["term/penalty"], rel=1e-4)


def test_rows_without_a_supervised_token_are_told(tmp_path):
    rows = [*tiny_rows(1), *(row | {"labels": [-100] * len(row["labels"])} for row in tiny_rows(8))]
    with pytest.raises(NonFiniteLossError, match="No token of these rows is supervised: all their labels are -100"):
        trained(tmp_path, rows=rows, method=Penalty())


def test_a_nan_stops_before_the_weights_are_touched_and_names_the_rows(tmp_path):
    class Poison(Method):
        name = "poison"

        def declares(self, stage):
            return ("poison",)

        def loss_terms(self, step, batch, outputs):
            return {"poison": outputs.logits.sum() * (float("nan") if step.index == 1 else 1e-6)}

    model, weights_then = tiny_model(), []

    class Keep(Method):
        name = "keep"

        def after_step(self, step, weights):
            weights_then.append(vector(model).clone())

    rows = [row | {"row": position} for position, row in enumerate(tiny_rows(18))]
    with pytest.raises(NonFiniteLossError, match=r"stage 1 \(red\), step 2, rows (\d+, ){3}\d+: .*poison nan"):
        trained(tmp_path, rows=rows, model=model, method=[Poison(), Keep()], task="red")
    assert len(weights_then) == 1 and torch.equal(weights_then[0], vector(model))


def test_an_infinite_gradient_stops_before_the_weights_are_touched(tmp_path):
    class Explode(Method):
        name = "explode"

        def after_backward(self, step, gradients):
            gradients.scale_(float("inf"))
            return {}

    model = tiny_model()
    before = vector(model).clone()
    rows = [row | {"row": position} for position, row in enumerate(tiny_rows(18))]
    args = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(NonFiniteLossError, match=r"step 1, rows (\d+, ){3}\d+: .*gradient norm"):
        trained(tmp_path, rows=rows, model=model, method=Explode(), args=args)
    assert torch.equal(before, vector(model))


def test_extra_rows_may_come_from_anywhere(tmp_path):
    class General(Method):
        name = "general_rows"

        def extra_rows(self, step):
            return Extra(tiny_rows(2, seed=9), "beside")

        def declares(self, stage):
            return ("general",)

        def loss_terms(self, step, batch, outputs):
            return {"general": step.rehearsed[self.name].logits.logsumexp(-1).mean()}

    trainer = trained(tmp_path, method=[General(), "sequential"])
    assert all(log["term/general"] > 0 for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("joint", "'joint' learns all tasks at once, .* put the rows of all tasks into one train_dataset"),
        ({"name": "icl", "shots": 2}, "'icl' trains nothing and acts only where `holdfast run` answers test rows"),
        (["frozen"], "'frozen' trains nothing"),
        (["replay", "joint"], "'joint' learns all tasks at once, so it cannot be applied together with 'replay'"),
        (["replay", "replay"], "'replay' stands twice"),
        (3, r"method: must be a name, .*, not 3$"),
        (None, r"method: must be a name, .*, not None$"),
        ({"ratio": 0.1}, r"method: must be a name, .*, not {'ratio': 0.1}$"),
        (["replay", 3], r"method: must be a name, .*, not 3$"),
    ],
)
def test_a_method_that_cannot_act_in_the_trainer_is_refused(method, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        continual(Trainer)(model=tiny_model(), args=options(tmp_path), method=method)
