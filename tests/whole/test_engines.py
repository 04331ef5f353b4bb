"""Every method on every engine: two processes, after two stages, are where one process is.

The whole table is slow (`PYTHONPATH=tests python -m support.engine_table` writes it into docs/engines.md); `make test`
takes a selection in which every method and every engine stands.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.runner import setup
from support.engine_table import ENGINES, LONGER, apart, compare, config_of, done, error, launch, logged, prepare, rows
from support.guards import terms
from support.paths import DOCS

PAGE = DOCS / "engines.md"


SELECTED = {
    "ddp": ["der-lora", "gem-full", "lwf-full"],
    "fsdp2": ["ewc-full", "gere_kl-lora", "gem-lora"],
    "zero1": ["ogd-full"],
    "zero2": ["lwf-full", "o_lora-lora"],
    "zero3": ["cia-full", "gere-full"],
}


def needed(engines: Iterable[str]) -> list[str]:
    """The engines for which all is installed."""
    there = importlib.util.find_spec("deepspeed") is not None
    return [engine for engine in engines if there or not engine.startswith("zero")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("engines"))


def needs(engine: str) -> None:
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed, which `make test` installs (docs/launch.md)")


def test_two_processes_are_where_one_is(folder):
    cells = [(*name.split("-"), engine) for engine in needed(SELECTED) for name in SELECTED[engine]]
    for cell, found in compare(folder, cells).items():
        assert found.equal, (cell, found)
        if cell[0] in LONGER:
            output = Path(config_of(folder, cell[2], 2, *cell[:2])["output"])
            assert any(value for step in terms(output, 2) for name, value in step.items() if name != "task"), cell


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_so_they_are_with_every_method(engine, folder):
    needs(engine)
    found = compare(folder, [(*row, engine) for row in rows()])
    assert not {cell: apart for cell, apart in found.items() if not apart.equal}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_and_in_bfloat16(engine, folder):
    """Two micro-batches in each process; and with precision bfloat16 the loss terms are near those of one process."""
    needs(engine)
    ways = {"accumulated": {"micro_batch_size": 2, "batch_size": 8}, "bfloat16": {"precision": "bfloat16"}}
    pairs = {}
    for method in ("ewc", "gem", "gere_kl"):
        for way, training in ways.items():
            pair = [config_of(folder, name, n, method, "full", **training) for name, n in ((None, 1), (engine, 2))]
            pairs[method, way] = [config | {"output": f"{config['output']}-{way}"} for config in pair]
    alone, together = zip(*pairs.values(), strict=True)
    launch([config for config in alone if not done(config)], 1, folder)
    launch(list(together), 2, folder)
    for (method, way), pair in pairs.items():
        found = apart(*pair)
        near = found.equal if way == "accumulated" else not found.error and found.terms < 0.2
        assert near, (method, way, found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_killed_and_continued_by_another_number_of_processes(engine, folder):
    """A run of two, one of which is killed in the second stage, ends with the same numbers in three."""
    needs(engine)
    unbroken = config_of(folder, None, 1, "ewc", "full", batch_size=12, micro_batch_size=4)
    unbroken["output"] += "-unbroken"
    if not done(unbroken):
        launch([unbroken], 1, folder)
    killed = config_of(folder, engine, 2, "ewc", "full", batch_size=12, micro_batch_size=2)
    killed["output"] += "-killed"
    launch([killed], 2, folder, "kill", 2, 4)
    assert not done(killed) and not error(killed)
    launch([killed], 3, folder)
    assert apart(unbroken, killed).equal, apart(unbroken, killed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_three_processes_between_which_no_weight_is_divided_evenly(engine, folder):
    """The tied embedding, of which FSDP2 makes several units, too."""
    needs(engine)
    one = config_of(folder, None, 1, "sequential", "full", batch_size=12, micro_batch_size=4)
    three = config_of(folder, engine, 3, "sequential", "full", batch_size=12, micro_batch_size=2)
    for config in (one, three):
        config["output"] += "-three"
    launch([config for config in [one] if not done(config)], 1, folder)
    launch([three], 3, folder)
    assert apart(one, three).equal, apart(one, three)


EXPLODE = """
from holdfast import Method

class Explode(Method):
    name = "explode"

    def after_backward(self, step, gradients):
        if step.index == 1:
            gradients.scale_(float("inf"))
        return {}
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero0", "zero2", "zero3"])
def test_an_infinite_gradient_stops_before_the_weights_are_touched(engine, folder):
    needs(engine)
    (folder / "explode.py").write_text(EXPLODE)
    config = config_of(folder, engine, 2, "sequential", "full")
    config |= {"output": f"{config['output']}-explodes", "method": {"name": str(folder / "explode.py")}}
    launch([config], 2, folder)
    assert "stage 1 (red), step 2" in error(config) and "gradient norm inf" in error(config)
    [first] = logged(Path(config["output"]), 1)
    assert 0 < first["norm"] < 100


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_what_methods_keep_is_divided(engine, folder):
    """Each of two processes holds about half of what one holds; a step asks for a few small sums, and for nothing
    whole."""
    needs(engine)
    found, methods = {}, ("ewc", "gem", "ogd", "cia")
    for name, processes in ((None, 1), (engine, 2)):
        configs = {m: config_of(folder, name, processes, m, "full", save_every=99) for m in methods}
        for config in configs.values():
            config["output"] += "-counted"
        launch(list(configs.values()), processes, folder, "count")
        for method, config in configs.items():
            assert not error(config), error(config)
            found[method, processes] = json.loads(Path(config["output"], "counts.json").read_text())
    for method in methods:
        one, two = found[method, 1], found[method, 2]
        assert two["entries"] <= 0.6 * one["entries"], method
        assert two["sums"] <= 12 * two["steps"] and two["gathers"] == 0, (method, two)


def test_the_page_has_every_row_and_engine():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    [header] = [line for line in lines if line.startswith("| method |")]
    assert [cell.strip(" `") for cell in header.split("|")[3:-1]] == list(ENGINES)
    table = {tuple(cell.strip(" `") for cell in line.split("|")[1:3]): line for line in lines if line.startswith("| `")}
    assert set(table) == set(rows())
    for row, line in table.items():
        cells = dict(zip(ENGINES, line.split("|")[3:-1], strict=True))
        for engine, cell in cells.items():
            assert cell.strip().startswith("yes"), (row, engine)


def test_an_older_transformers_is_refused_where_it_would_fail(folder, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.18.1")
    with pytest.raises(ConfigError, match=r"fsdp2 needs transformers 5.23 or newer, and this is 5.18.1"):
        setup.prepare(setup.resolve(load_config(config_of(folder, "fsdp2", 2, "sequential", "full"))))
