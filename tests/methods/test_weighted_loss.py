"""EAFT, TALR and FLOW: the weights against each paper's formula, token by token."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from holdfast.api.stage import Step
from holdfast.errors import MethodError
from holdfast.methods.eaft import EAFT
from holdfast.methods.flow import FLOW
from holdfast.methods.talr import TALR
from holdfast.runner.run import run
from holdfast.system.progress import Progress
from holdfast.training.method_state import load_states, save_states
from support.tiny import pad_rows, tiny_config, tiny_model, tiny_rows, tiny_stage
from support.trained import trained, vector


def step_of(model, rows):
    stage = tiny_stage(model, rows)
    stage.rows_a_step = 6
    return stage, Step(stage, 0, len(rows), 1, True)


def outputs_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def sharp(scale=30.0):
    """A model whose predictions differ in how sure they are."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(scale)
    return model


def supervised(batch):
    return [(b, s) for b, s in (batch["labels"] != -100).nonzero().tolist() if s]


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_k": 500, "exponent": 2.0}])
def test_eaft_weighs_by_the_entropy_of_the_most_likely_tokens(options):
    model, batch = sharp(), pad_rows(tiny_rows(7))
    method = EAFT(**options)
    outputs = outputs_of(model, batch)
    weights = method.loss_weights(step_of(model, [])[1], batch, outputs)
    k = min(options.get("top_k", 20), 64)
    found = []
    for b, s in supervised(batch):
        top = sorted(outputs.logits[b, s - 1].softmax(-1).tolist(), reverse=True)[:k]
        top = [p / sum(top) for p in top]
        entropy = -sum(p * math.log(p) for p in top if p > 0) / math.log(k)
        found.append(entropy ** options.get("exponent", 1.0))
        assert float(weights[b, s]) == pytest.approx(found[-1], rel=1e-4, abs=1e-6)
    assert 0 <= 10 * min(found) < max(found) <= 1


def test_talr_weighs_by_the_probability_and_a_temperature_of_the_last_step():
    model, rows = sharp(), tiny_rows(7)
    method, batch = TALR(floor=0.3), pad_rows(rows)
    stage, step = step_of(model, rows)
    method.before_stage(stage)

    def means(some):
        nats, tokens = stage.losses(some)
        return [loss / count for loss, count in zip(nats, tokens, strict=True)]

    first = stage.sample(6, stage.random("talr"))
    assert method.tau == pytest.approx(statistics.median(means(first)), rel=1e-5)
    model.eval()
    outputs = outputs_of(model, batch)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 7))]
    tau, found = method.tau, []
    for half in halves:
        weights = method.loss_weights(step, half, outputs_of(model, half))
        for b, s in supervised(half):
            number = b if half is halves[0] else b + 3
            p = float(outputs.logits[number, s - 1].detach().softmax(-1)[batch["labels"][number, s]])
            found.append(max(p ** (1 / tau), 0.3))
            assert float(weights[b, s]) == pytest.approx(found[-1], rel=1e-3)
    assert min(found) == 0.3 and max(found) > 0.4
    method.after_step(step, None)
    assert method.tau == pytest.approx(statistics.median(means(rows)), rel=1e-5)
    assert method.watched() == {"talr/temperature": method.tau}


def test_the_temperature_of_talr_goes_on_after_a_restart(tmp_path):
    method = TALR()
    method.tau = 0.1234567890123
    save_states([method], tmp_path)
    again = TALR()
    load_states([again], tmp_path, tiny_model())
    assert again.tau == method.tau
    given = TALR(temperature=0.7)
    load_states([given], tmp_path, tiny_model())
    assert given.tau == 0.7


def test_the_temperature_of_talr_is_of_rows_with_an_answer_and_above_zero():
    model, rows = sharp(), tiny_rows(5)
    rows[2] = rows[2] | {"labels": [-100] * len(rows[2]["labels"])}
    method, batch = TALR(), pad_rows(rows)
    stage, step = step_of(model, rows)
    method.before_stage(stage)
    first = method.tau
    method.loss_weights(step, batch, outputs_of(model, batch))
    method.after_step(step, None)
    assert method.tau == pytest.approx(first, rel=1e-5)  # both over the four rows
    method.means = [0.0] * 3  # all is known by heart
    method.after_step(step, None)
    assert method.loss_weights(step, batch, outputs_of(model, batch)).isfinite().all()


@pytest.mark.parametrize("temperature", [None, 0.7])
def test_flow_weighs_rows_by_their_loss_before_the_stage(temperature):
    model, rows = sharp(3.0), tiny_rows(9)
    method = FLOW(temperature=temperature)
    stage, step = step_of(model, rows)
    method.before_stage(stage)
    nats, tokens = stage.losses(rows)
    losses = [loss / count for loss, count in zip(nats, tokens, strict=True)]
    tau = temperature or statistics.median(losses)
    with torch.no_grad():  # training goes on
        for p in model.parameters():
            p.add_(0.1)
    other = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    order = [4, 0, 7]
    batch = pad_rows([*(rows[i] for i in order), other])
    weights = method.loss_weights(step, batch, None)
    for b, i in enumerate(order):
        assert weights[b, 1].item() == pytest.approx(math.exp(-losses[i] / tau), rel=1e-5)
    assert weights[3].tolist() == [1.0] * weights.shape[1]  # no row of the task


def test_flow_knows_the_rows_that_share_a_sequence():
    model, rows = tiny_model(), tiny_rows(5)
    method = FLOW()
    stage, step = step_of(model, rows)
    method.before_stage(stage)
    ids = [token for row in rows for token in row["input_ids"]]
    labels = [label for row in rows for label in [-100, *row["labels"][1:]]]
    positions = [place for row in rows for place in range(len(row["input_ids"]))]
    batch = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
    }
    weights, alone = method.loss_weights(step, batch, None)[0], []
    for row in rows:
        alone += [method.loss_weights(step, pad_rows([row]), None)[0, 0].item()] * len(row["input_ids"])
    assert weights.tolist() == alone and len(set(alone)) == 5


def test_flow_says_that_it_found_no_row(tmp_path):
    method = FLOW()
    trainer = trained(tmp_path, method=method)
    before = vector(trainer.model)
    method_before = method.before_stage

    def other_rows(stage):
        method_before(stage)
        method.weights = {}

    method.before_stage = other_rows
    with pytest.raises(MethodError, match="no row of any batch was a row of the task"):
        trainer.train()
    assert not torch.equal(before, vector(trainer.model))


@pytest.mark.parametrize("name", ["eaft", "talr", "flow"])
def test_micro_batches_change_nothing(name, tmp_path):
    ends = []
    for number, changes in enumerate(({}, {"micro_batch_size": 2})):
        config = tiny_config(tmp_path, method=name, output=str(tmp_path / f"run{number}"))
        config["stream"]["order"] = ["red"]
        config["training"] |= {"epochs": 1, "learning_rate": 1e-2} | changes
        run(config, Progress(quiet=True))
        events = [json.loads(line) for line in (tmp_path / f"run{number}" / "events.jsonl").read_text().splitlines()]
        ends.append([event["terms"]["task"] for event in events])
        assert [[*event.get("watched", ())] for event in events] == [["talr/temperature"] * (name == "talr")] * len(
            events
        )
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
