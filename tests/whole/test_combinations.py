"""Methods that are applied together: the hooks compose, and a pair that cannot is refused with the reason."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import pytest

import holdfast.runner.run
from holdfast.config.run import load_config
from holdfast.errors import ConfigError, MethodError
from holdfast.methods import build
from holdfast.runner.setup import resolve
from holdfast.system.progress import Progress
from support.guards import GENERAL, TRAINED, case, configuration, terms, with_paths
from support.resumed import results

TOGETHER = [
    ("replay", "ewc"),
    ("cia", "gere"),
    ("replay", "gere_kl"),
    ("o_lora", "replay"),
    ("l2p", "replay"),
    ("ewc", "gem"),
    ("kl_pre", "replace"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("together")
    (path / "general.txt").write_text(GENERAL)
    (path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    return path


def settings(folder, pair):
    config = configuration(folder, folder / "+".join(pair), "sequential", {}, None, 0, {"epochs": 2})
    config["evaluation"]["bootstrap"] = 0
    return config | {"method": [{"name": name} | with_paths(case(name).options, folder) for name in pair]}


@pytest.mark.parametrize("pair", TOGETHER, ids="+".join)
def test_two_together(pair, folder):
    """Both train along: every term that one of them logs alone is in the log of both."""
    config = settings(folder, pair)
    holdfast.runner.run.run(config, Progress(quiet=True))
    logged = {term for event in terms(Path(config["output"]), 2) for term in event}
    for name in pair:
        alone = settings(folder, (name,)) | {"output": f"{config['output']}-{name}"}
        alone["tuner"] = resolve(load_config(config)).config.tuner.model_dump()
        holdfast.runner.run.run(alone, Progress(quiet=True))
        assert {term for event in terms(Path(alone["output"]), 2) for term in event} <= logged


@pytest.mark.parametrize("pair", [("ewc", "si"), ("gem", "mas"), ("lwf", "cia")], ids="+".join)
def test_the_order_of_a_list_says_nothing(pair, folder):
    """Bit for bit: si sees the loss's gradient without ewc's, gem projects mas's, lwf's teacher has cia's weights."""
    runs = []
    for methods in (pair, pair[::-1]):
        config = settings(folder, methods) | {"output": str(folder / ("order+" + "+".join(methods)))}
        holdfast.runner.run.run(config, Progress(quiet=True))
        runs.append(results(Path(config["output"])))
    for key in ("weights", "responses", "steps"):
        assert runs[0][key] == runs[1][key], key


def test_each_takes_its_turn():
    names = ["gem", "replay", "si", "ewc"]
    assert [method.name for method in build([(name, {}) for name in names])] == ["si", "replay", "ewc", "gem"]


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("gem", "a_gem"), "would undo the constraints"),
        (("o_lora", "ewc"), "cannot be applied together"),
        (("joint", "replay"), "learns all tasks at once"),
        (("icl", "replay"), "trains nothing"),
        (("ssr", "gain_lora"), "exchanges what is trained"),
        (("l2p", "o_lora"), "no tuner suits them all: .*'l2p' needs prompt_pool"),
        (("replay", "replay"), "stands twice"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_a_pair_that_cannot_is_refused_with_the_reason(pair, reason, folder):
    for methods in (pair, pair[::-1]):
        with pytest.raises(ConfigError, match=reason) as refused:
            resolve(load_config(settings(folder, methods) | {"output": "x"}))
        assert "method" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("pair", combinations(TRAINED, 2), ids="+".join)
def test_every_pair_trains_or_is_refused(pair, folder):
    """Or says that a term had nothing to do, as where the rows of either task choose prompts of their own."""
    config = settings(folder, pair)
    try:
        resolve(load_config(config))
    except ConfigError:
        return
    try:
        holdfast.runner.run.run(config, Progress(quiet=True))
    except MethodError as error:
        assert "was exactly zero" in str(error)
