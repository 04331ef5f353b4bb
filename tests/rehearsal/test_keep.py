"""A budget that is kept: the dual step, what a loose and a tight budget do, and that a killed run goes on exactly."""

from __future__ import annotations

import math
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from holdfast.config.keep import KeepConfig
from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.methods import build
from holdfast.rehearsal.keep import Keep
from holdfast.rehearsal.memory import Without
from holdfast.rehearsal.multipliers import LEAST, MOST, UNIT, Lost, Multiplier, loss_rise, probability_fall
from holdfast.rehearsal.samples import general_rows
from holdfast.runner.decisions import strictest
from holdfast.runner.setup import resolve
from support import rehearsed
from support.tiny import tiny_config, tiny_rows, tiny_tokenizer
from support.trained import vector

TEXTS = "\n".join(f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvwxyz")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text(TEXTS)
    return str(path)


def test_the_dual_step_is_an_exponentiated_gradient():
    """A multiplier rises while its budget is broken, falls while it is slack, and is as large as the losses say."""
    chance = random.Random(0)
    for _ in range(200):
        step, damping = chance.uniform(0.01, 2), chance.uniform(0, 2)
        keep, share = KeepConfig(general="2%", step=step, damping=damping), 10 ** chance.uniform(-3, 3)
        multiplier, first = Multiplier.start(share), UNIT / share
        value = first if first >= LEAST else 0.0
        assert multiplier.value == multiplier.weight == value
        for _ in range(20):
            lost = Lost(chance.uniform(-0.02, 0.1), 0.001, limit=chance.uniform(0.01, 0.05))
            ratio = (lost.value + 2 * lost.error) / lost.limit
            multiplier.update(lost.excess(margin=2), keep)
            clipped = min(max(ratio, math.exp(-MOST)), math.exp(MOST))
            before = value
            value = max(first, LEAST) if ratio > 1 and not value else min(value * clipped**step, 10 * first)
            value = value if value >= LEAST else 0.0
            assert multiplier.value == pytest.approx(value)
            assert multiplier.weight == pytest.approx(min(value * clipped**damping, 10 * first))
            if ratio > 1 and first > LEAST:
                assert value > before or value == 10 * first
            elif ratio < 1:
                assert value < before or not value
    for broken in (math.nan, math.inf):  # a loss that is not finite is beyond any budget
        assert Lost(broken, 0.0, 0.02).excess(margin=1) == MOST


def test_what_was_lost_and_its_error():
    chance = np.random.default_rng(0)
    tokens = chance.integers(3, 30, 40).astype(float)
    before = tokens * 2 + chance.normal(0, 1, 40)
    now = before + tokens * 0.1 + chance.normal(0, 1, 40)
    lost = loss_rise(before, now, tokens, 0.1)
    assert lost.value == pytest.approx((now.sum() - before.sum()) / tokens.sum())
    picks = chance.integers(0, 40, (4000, 40))  # the error is that of a bootstrap over samples
    resampled = (now - before)[picks].sum(1) / tokens[picks].sum(1)
    assert lost.error == pytest.approx(resampled.std(), rel=0.15)
    fall = probability_fall(np.array([0.1, 1.0, 3.0]), np.array([0.2, 1.0, 5.0]), 0.02)
    expected = np.exp([-0.1, -1.0, -3.0]) - np.exp([-0.2, -1.0, -5.0])
    assert fall.value == pytest.approx(expected.mean())
    assert fall.error == pytest.approx(expected.std(ddof=1) / 3**0.5)
    assert Lost(0.01, 0.01, 0.02).kept
    assert Lost(0.01, 0.01, 0.02).excess(margin=2) == pytest.approx(math.log(1.5))


def test_rows_that_are_held_out_are_never_rehearsed(tmp_path):
    rows = tiny_rows(20)
    left = Without(rows, [3, 7])
    assert [left[i] for i in range(len(left))] == [row for i, row in enumerate(rows) if i not in (3, 7)]
    [method] = build([("replay", {})])
    keep = Keep({"tasks": 0.1}, [method])
    stages([method, keep], rows=20, folder=tmp_path)
    assert len(keep.samples.rows) == 2 * 4
    assert not [row for row in method.memory.rows if row in keep.samples.rows]


def test_between_what_may_be_lost_now_and_what_is_aimed_at_a_multiplier_stays():
    keep = Keep({"tasks": 0.1, "margin": 0, "glide": 4}, build([("replay", {})]))
    half = SimpleNamespace(stage=SimpleNamespace(steps=20), index=9)  # 0.8 + 4 * 0.5 ** 2 budgets
    found = []
    for lost in (0.04, 0.081, 0.179, 0.36):
        keep.lost = {1: Lost(lost, 0.0, 0.1)}
        found.append(keep._excess(1, half))
    assert found == pytest.approx([math.log(0.4 / 0.8), 0, 0, math.log(3.6 / 1.8)])


@pytest.mark.parametrize(("rows", "samples", "measured"), [(256, 1000, 9), (8, 1000, 8), (256, 30, 18)])
def test_general_samples_that_are_measured_are_a_random_choice_that_is_never_rehearsed(
    tmp_path, texts, rows, samples, measured
):
    """At most a fifth of 48; more only if the file has more than are wanted."""
    [method] = build([("gere_ce", {"path": texts, "samples": samples})])
    keep = Keep({"general": "50%", "rows": rows}, [method])
    stages([method, keep], count=1, folder=tmp_path)
    held, all_rows = (
        [row["input_ids"] for row in rows] for rows in (keep.samples.rows, [*method.rows, *method.held_out])
    )
    assert len(held) == measured and method.size == 48 - measured
    assert not [row for row in method.rows if row["input_ids"] in held]
    assert sorted(all_rows) == sorted(row["input_ids"] for row in general_rows(tiny_tokenizer(), path=texts))
    last = [row["input_ids"] for row in general_rows(tiny_tokenizer(), path=texts)][-measured:]
    assert held != last


def stages(method, rows=24, *, folder, keep=None, count=2, model=None, **args):
    given = {"keep": keep, "count": count, "model": model, "args": {"num_train_epochs": 4} | args}
    return rehearsed.stages(method, folder=folder, rows=rows, **given)


def test_a_loose_budget_costs_nothing(tmp_path, texts):
    """It is sequential training, bit for bit: no sample is rehearsed, and no term is missed."""
    method = {"name": "gere_ce", "path": texts}
    loose = stages(method, count=1, folder=tmp_path, keep={"general": "1000000%"})
    alone = stages("sequential", count=1, folder=tmp_path)
    assert torch.equal(vector(loose.model), vector(alone.model))
    assert loose.cost.tokens == alone.cost.tokens
    assert loose.keep_report()["kept"] and loose.keep_report()["share"] == 1
    with pytest.raises(ConfigError, match="keep_report: needs a budget"):
        alone.keep_report()


@pytest.mark.parametrize("give_back", [True, False])
def test_a_tight_budget_is_kept(tmp_path, texts, give_back):
    method = {"name": "gere_ce", "path": texts, "ratio": 1.0}
    free = stages(method, count=1, folder=tmp_path, keep={"general": "1000000%"}, learning_rate=0.03)
    [lost] = free.keep_report()["constraints"]
    budget = {"general": lost["lost"] / 4, "every": 1, "margin": 0, "give_back": give_back}
    held = stages(method, count=1, folder=tmp_path, keep=budget, learning_rate=0.03)
    [one] = held.keep_report()["constraints"]
    assert lost["lost"] > 0 and one["lost"] < 0.5 * lost["lost"]
    assert one["kept"] or not give_back
    multipliers = [log["keep/general/multiplier"] for log in held.state.log_history if "keep/general/lost" in log]
    losses = [log["keep/general/lost"] for log in held.state.log_history if "keep/general/lost" in log]
    assert max(multipliers) > 0
    for before, now, rise in zip(multipliers, multipliers[1:], losses[1:], strict=False):
        assert now >= before if rise > budget["general"] else now <= before


@pytest.mark.parametrize(
    ("method", "keep", "said"),
    [
        ("sequential", {"general": "2%"}, r"keep\.general: .*gere_ce or kl_replay"),
        ("replay", {"general": "2%"}, r"keep\.general: .*\(replay\)"),
        ({"name": "replay", "way": "replace"}, {"tasks": 0.02}, r"keep\.tasks: .*beside"),
        ("joint", {"tasks": 0.02}, r"keep\.tasks: .*replay"),
        ("replay", {}, r"keep: .*gives no budget"),
        ("replay", {"tasks": "0%"}, r"keep\.tasks: .*above 0"),
        ("replay", {"tasks": "much"}, r"keep\.tasks: .*a share, such as 5%"),
        ("replay", {"task": 0.1}, r"keep\.task: .*tasks"),
    ],
)
def test_a_budget_that_nothing_can_keep_is_refused_with_what_to_write(tmp_path, method, keep, said):
    with pytest.raises(ConfigError) as error:
        resolve(load_config(tiny_config(tmp_path, method=method) | {"keep": keep}))
    assert re.search(said, str(error.value)), error.value


def test_what_is_done_where_several_limits_are_exceeded():
    assert strictest(["continue", "rollback"]) == "rollback"
    assert strictest(["rollback", "stop"]) == "stop"
    assert strictest([]) == "continue"
