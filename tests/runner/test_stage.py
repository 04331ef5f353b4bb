"""A stage of a run: the arguments that it trains with."""

from __future__ import annotations

import itertools

import pytest

from holdfast import load_config, run
from holdfast.errors import ConfigError
from holdfast.runner.stage import stage_seed
from holdfast.system.progress import Progress
from support.tiny import tiny_config


@pytest.mark.parametrize("seed", [0, 1, 4294, 4295, 12345, 2**32 - 1])
def test_no_two_stages_shuffle_with_the_same_seed(seed):
    first = [stage_seed(seed, stage) for stage in range(1, 100)]
    assert all(0 <= value < 2**32 - 1000 for value in first)
    assert all(after - before >= 1000 for before, after in itertools.pairwise(first))


def test_any_seed_that_is_accepted_trains(tmp_path):
    changes = {"stream": {"path": str(tmp_path / "tasks"), "order": ["red"]}, "seed": 2**32 - 1}
    config = tiny_config(tmp_path, **changes)
    config["training"] |= {"max_steps": 1}
    assert run(load_config(config), Progress(quiet=True))["tasks"] == ["red"]
    with pytest.raises(ConfigError, match="seed: must be less than 4294967296"):
        load_config(config, ["seed=4294967296"])
