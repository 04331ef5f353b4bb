"""What each method's paper says, against plain loops and finite differences."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from holdfast.errors import ConfigError
from holdfast.methods import build, find, known
from holdfast.rehearsal.memory import Memory
from holdfast.training.method_state import load_states, save_states
from support.tiny import pad_rows, tiny_model, tiny_rows, tiny_stage


def mean_loss(model, rows):
    batch = pad_rows(rows)
    logits, labels = model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def test_stage_gradient_is_that_of_the_mean_over_all_tokens_and_leaves_grads_alone():
    model, rows = tiny_model(), tiny_rows(7)
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    found = tiny_stage(model, rows, micro_batch_size=3).gradient(rows)
    assert all(torch.all(p.grad == 7.0) for p in model.parameters())
    model.zero_grad()
    mean_loss(model, rows).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(found.tensors[name], p.grad, rtol=1e-4, atol=1e-6)


def test_a_stages_sample_is_random_repeats_itself_and_takes_no_row_twice():
    stage = tiny_stage(tiny_model(), tiny_rows(12))
    places = [stage.rows.index(row) for row in stage.sample(5, stage.random("a"))]
    assert len(set(places)) == 5 and places != sorted(places)
    assert stage.sample(5, stage.random("a")) == [stage.rows[place] for place in places]
    assert stage.sample(5, stage.random("b")) != stage.sample(5, stage.random("a"))
    assert sorted(map(stage.rows.index, stage.sample(99, stage.random("a")))) == list(range(12))


def test_a_method_holds_no_rows_out_unless_it_says_so():
    assert len(find("ewc")().held_out) == 0


def test_quota_memory_holds_equal_shares():
    memory = Memory(10, "quota")
    for t in range(1, 4):
        memory.add(t, tiny_rows(20, seed=t), random.Random(t))
    assert [memory.tasks.count(t) for t in (1, 2, 3)] == [4, 3, 3]
    memory.add(4, tiny_rows(1, seed=4), random.Random(4))
    assert memory.tasks.count(4) == 1 and len(memory) <= 10


def test_reservoir_keeps_every_row_with_the_same_probability():
    counts = [0] * 40
    rows = [{"input_ids": [i], "labels": [i]} for i in range(40)]
    for seed in range(2000):
        memory = Memory(10, "reservoir")
        chance = random.Random(seed)
        memory.add(1, rows[:25], chance)
        memory.add(2, rows[25:], chance)
        assert len(memory) == 10
        for row in memory.rows:
            counts[row["input_ids"][0]] += 1
    assert all(abs(count / 2000 - 0.25) < 0.05 for count in counts)


def test_sample_repeats_no_row_before_all_were_taken():
    memory = Memory(5, "quota")
    memory.add(1, tiny_rows(5), random.Random(0))
    ids = [tuple(row["input_ids"]) for row in memory.sample(8, random.Random(0))]
    assert len(ids) == 8 and len(set(ids[:5])) == 5 and len(set(ids)) == 5


@pytest.mark.parametrize("name", ["replay", "a_gem", "sequential"])
def test_state_survives_a_restart(name, tmp_path):
    model = tiny_model()
    method = find(name)()
    method.after_stage(tiny_stage(model, tiny_rows(6)))
    save_states([method], tmp_path)
    other = find(name)()
    load_states([other], tmp_path, model)
    one, two = method.state(), other.state()
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
    assert bool(one) == (name != "sequential")


def test_near_names_and_wrong_lists():
    assert {"sequential", "joint", "frozen", "replay", "ewc", "a_gem"} <= set(known())
    with pytest.raises(ConfigError, match="did you mean 'replay'"):
        find("repaly")
    with pytest.raises(ConfigError, match="did you mean 'ratio'"):
        build([("replay", {"rato": 0.5})])
    with pytest.raises(ConfigError, match="all tasks at once"):
        build([("joint", {}), ("ewc", {})])
    with pytest.raises(ConfigError, match="twice"):
        build([("ewc", {}), ("ewc", {})])
