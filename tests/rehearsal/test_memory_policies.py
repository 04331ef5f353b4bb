"""Which rows a memory keeps: each policy against a plain ranking of the rows."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.methods.rehearsal import Rehearsal
from holdfast.methods.replay import Replay
from holdfast.rehearsal.memory import Memory
from holdfast.rehearsal.ranking import k_center
from support.lora import killed_in_stage_2_equals_unbroken
from support.tiny import tiny_model, tiny_rows, tiny_stage


def move(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))


def plain(model, row, supervised):
    """The mean loss of some tokens of a row, by itself."""
    ids = torch.tensor(row["input_ids"])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[None]).logits[0]
    places = [s for s in range(1, len(ids)) if supervised(row, s)]
    return sum(float(F.cross_entropy(logits[s - 1], ids[s])) for s in places) / len(places)


def best(rows, score, count):
    return sorted(range(len(rows)), key=lambda i: -score(rows[i]))[:count]


@pytest.mark.parametrize("policy", ["surprise", "loss"])
@pytest.mark.parametrize("preset", [Rehearsal, Replay])
def test_the_rows_with_the_highest_loss_are_kept_before_or_after_the_stage(policy, preset):
    """Of all tokens before the stage, or of the answer's after it; a later task shortens the choice from its end."""
    method, model = preset(policy=policy, capacity=6), tiny_model()
    expected = []
    for index, quota in ((1, 6), (2, 3)):
        rows = tiny_rows(10, seed=index)
        stage = tiny_stage(model, rows, index=index)
        ranked_before = best(rows, lambda row: plain(model, row, lambda row, s: True), 6)
        method.before_stage(stage)
        move(model, seed=index)
        ranked_after = best(rows, lambda row: plain(model, row, lambda row, s: row["labels"][s] != -100), 6)
        assert ranked_before != ranked_after
        method.after_stage(stage)
        ranked = ranked_before if policy == "surprise" else ranked_after
        expected = [(stage, place) for stage, place in expected if expected.index((stage, place)) < quota]
        expected += [(index, place) for place in ranked[:quota]]
        assert list(zip(method.memory.tasks, method.memory.places, strict=True)) == expected
        for place, row in zip(method.memory.places[-quota:], method.memory.rows[-quota:], strict=True):
            assert row["input_ids"] == rows[place]["input_ids"] and row["labels"] == rows[place]["labels"]


def farthest(points, count):
    """The greedy choice, distance by distance."""
    mean = points.mean(0)
    chosen = [min(range(len(points)), key=lambda i: float((points[i] - mean).norm()))]
    while len(chosen) < count:
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float((points[i] - points[j]).norm()) for j in chosen)))
    return chosen


def test_diverse_rows_cover_the_others():
    torch.manual_seed(0)
    points = torch.randn(30, 4)
    assert k_center(points, 9) == farthest(points, 9)
    groups = torch.cat([torch.randn(20, 4) * 0.01 + 10 * i for i in range(3)])
    assert sorted(place // 20 for place in k_center(groups, 3)) == [0, 1, 2]
    assert sorted(k_center(torch.zeros(4, 2), 4)) == [0, 1, 2, 3]


def test_the_place_of_a_row_is_its_mean_hidden_state():
    method, model, rows = Rehearsal(policy="diversity", capacity=4), tiny_model(), tiny_rows(11)
    stage = tiny_stage(model, rows)
    method.before_stage(stage)
    move(model, seed=1)
    points = []
    for row in rows:
        with torch.no_grad():
            outputs = model.eval()(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True)
        points.append(outputs.hidden_states[-1][0].mean(0))
    method.after_stage(stage)
    assert method.memory.places == farthest(torch.stack(points), 4)


def test_a_preference_is_kept_in_order_and_quota_stays_random():
    rows = tiny_rows(8)
    memory = Memory(4, "loss")
    memory.add(1, rows, random.Random(0), [7, 2, 5, 0, 1])
    assert memory.places == [7, 2, 5, 0]
    memory.add(2, rows, random.Random(0), [3, 6, 4])
    assert memory.tasks == [1, 1, 2, 2] and memory.places == [7, 2, 3, 6]
    by_chance = Memory(4, "quota")
    by_chance.add(1, rows, random.Random(0))
    assert by_chance.places == random.Random(0).sample(range(8), 4)


@pytest.mark.parametrize("policy", ["surprise", "loss", "diversity"])
def test_other_sources_have_no_policy(policy):
    with pytest.raises(ConfigError, match="policy: would change nothing, since source current has no memory"):
        build([("rehearsal", {"source": "current", "loss": "kl", "policy": policy})])


def test_killed_in_stage_2_and_continued_it_keeps_the_same_rows(tmp_path):
    """Surprise is measured before the stage, also where it goes on from its middle."""
    killed_in_stage_2_equals_unbroken(tmp_path, {"name": "replay", "policy": "surprise", "capacity": 8})
