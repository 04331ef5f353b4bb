"""Every method on every engine: two processes, after two stages, are where one process is; so are other optimizers.

The whole table is slow (`PYTHONPATH=tests python -m support.engine_table` writes it into docs/engines.md); `make test`
takes a selection in which every engine and every kind of method stands. All of it is done by one start of two processes
and one of one.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from holdfast.config.run import load_config
from holdfast.config.training import TrainingConfig
from holdfast.errors import ConfigError
from holdfast.runner import setup
from support.engine_jobs import Config, alone, copy_of, done, error, follows, job, launch
from support.engine_table import (
    ENGINES,
    TOLERANCE,
    TRAINING,
    Apart,
    Row,
    apart,
    config_of,
    identical,
    logged,
    other_order,
    prepare,
    prove,
    rows,
    settings,
)
from support.guards import LORA
from support.kinds import stream_of
from support.paths import DOCS

PAGE = DOCS / "engines.md"

SELECTED = {
    "ddp": "sequential-adapter",
    "fsdp2": "ogd-full",
    "zero0": "replay-full",
    "zero1": "o_lora-lora",
    "zero2": "ewc-full-accumulation",
    "zero3": "gere_kl-lora",
    "zero3_offload": "lwf-full",
}

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_fused": {"optimizer": "adamw_torch_fused"},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.3, "arguments": {"optim_args": "momentum=0.9"}},
}

GOES_ON = {
    ("adamw_torch", "fsdp2"): "zero3_offload",
    ("sgd", "zero3"): "ddp",
}
"""The engine on which a run of an optimizer and an engine goes on; the slow tests take every pair."""

THERE = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not THERE, reason="TRL is not installed")

BREAKS_AT = 5
"""The step of the last stage from which a run goes on, with the state of the checkpoint after the third."""


def needed(engines: Iterable[str]) -> list[str]:
    """The engines for which all is installed."""
    there = importlib.util.find_spec("deepspeed") is not None
    return [engine for engine in engines if there or not engine.startswith("zero")]


def needs(*engines: str) -> None:
    if len(needed(engines)) < len(engines):
        pytest.skip("needs DeepSpeed, which `make test` installs (docs/launch.md)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("engines"))


def plain(folder: Path, optimizer: str, engine: str | None, processes: int) -> Config:
    config = config_of(folder, engine, processes, Row("sequential", "full"), epochs=2, **OPTIMIZERS[optimizer])
    return follows(config, optimizer)


def optimizer_runs(folder: Path, cases: Iterable[tuple[str, str, str]]) -> Iterable[dict[str, Any]]:
    """Two processes, of (optimizer, engine, the engine that goes on)."""
    for optimizer, engine, other in cases:
        first = plain(folder, optimizer, engine, 2)
        yield job(first, copy=BREAKS_AT)
        yield job(follows(first, "again"), of=copy_of(first))
        yield job(follows(first, other, other), of=copy_of(first))


def budget(folder: Path, engine: str | None, processes: int) -> Config:
    """A run whose budget weighs past and general samples."""
    config = config_of(folder, engine, processes, Row("gere_ce", "full"))
    method = [{"name": "replay", "ratio": 1.0}, config["method"] | {"loss": "kl", "teacher": "start"}]
    config |= {"output": f"{config['output']}-budget", "method": method}
    return config | {"keep": {"general": "20%", "tasks": 0.05, "every": 2, "on_fail": "continue"}}


def of_kind(folder: Path, kind: str, tuner: str, engine: str | None, processes: int) -> Config:
    """A run whose second stage is of another kind; its answers have rewards that differ."""
    place = folder / f"{kind}-{tuner}-{engine}-{processes}"
    place.mkdir(exist_ok=True)
    config = stream_of(place, kind) | {"tuner": LORA if tuner == "lora" else tuner}
    if kind == "grpo":
        config["stream"]["tasks"][1]["reward"] = "support.rewards:early_letters"
    config["training"] |= {"engine": engine, "save_every": 1}
    return config


Pairs = list[tuple[Config, Config]]

NEXT = {"fsdp2": "zero3", "zero3": "ddp"}
"""The engine on which a run of preferences goes on."""


def kinds_on(folder: Path, tuner: str, engine: str, kinds: Iterable[str] = ("dpo", "grpo")) -> Pairs:
    """Pairs of runs with the same numbers: of preferences by pairs on one process and on two, of others on two.

    Each process writes rewarded answers of its own, and KTO compares the rows of a process's micro-batch.
    """
    firsts = {"dpo": (None, 1)}
    return [
        (of_kind(folder, kind, tuner, *firsts.get(kind, ("ddp", 2))), of_kind(folder, kind, tuner, engine, 2))
        for kind in kinds
    ]


KINDS = {"fsdp2": "full", "zero3": "lora"}
"""The engines on which `make test` trains stages of other kinds, and their tuners; the slow tests take all."""


def kind_jobs(pairs: Pairs) -> list[dict[str, Any]]:
    """Do the runs of one process, and give what two are to do."""
    runs = [config for pair in pairs for config in pair]
    alone([config for config in runs if not config["training"]["engine"]])
    first = pairs[0][1]
    other = goes_on(first)
    return [*(job(config, copy=2) for config in runs if config["training"]["engine"]), job(other, of=copy_of(first))]


def goes_on(config: Config) -> Config:
    """The run that goes on from the second step of a run's last stage, on another engine."""
    other = NEXT.get(config["training"]["engine"], "fsdp2")
    return follows(config, other, other)


def check_kinds(pairs: Pairs) -> None:
    one, two = pairs[0]
    assert apart(one, goes_on(two)).equal, apart(one, goes_on(two))
    for one, two in pairs:
        assert apart(one, two).equal, apart(one, two)
        assert max(event["norm"] for event in logged(Path(one["output"]), 2)) > 1e-3, "nothing was learned"


FAULTS = ("gradients are summed", "moments are lost", "gradients are not averaged")
"""The last one ends its processes."""


def with_fault(folder: Path, fault: str) -> Config:
    return follows(plain(folder, "adamw_torch", "ddp", 2), fault.replace(" ", "_"))


@pytest.fixture(scope="module")
def selection(folder: Path) -> dict[tuple[Row, str], Apart]:
    """The cells that `make test` looks at; with them run optimizers, and engines with faults."""
    cells = [(Row(*SELECTED[engine].split("-")), engine) for engine in needed(SELECTED)]
    cases = [(o, e, to) for (o, e), to in GOES_ON.items() if len(needed((e, to))) == 2]
    optimizers = {"adamw_torch", *(optimizer for optimizer, *_ in cases)}
    alone([*(plain(folder, optimizer, None, 1) for optimizer in sorted(optimizers)), budget(folder, None, 1)])
    faults = [job(with_fault(folder, fault), **{"break": fault}) for fault in FAULTS]
    faults[1]["of"] = copy_of(plain(folder, "adamw_torch", "fsdp2", 2))
    others = [one for e in needed(KINDS) if THERE for one in kind_jobs(kinds_on(folder, KINDS[e], e))]
    beside = [*optimizer_runs(folder, cases), job(budget(folder, "ddp", 2)), *others, *faults]
    return prove(folder, cells, beside=(beside, ()))


def test_two_processes_are_where_one_is(selection):
    assert not {cell: found for cell, found in selection.items() if not found.equal}


def test_two_processes_keep_a_budget_as_one_does(folder, selection):
    check_budget(folder, "ddp")


@needs_trl
@pytest.mark.parametrize("engine", KINDS)
def test_stages_of_other_kinds_are_trained_on_an_engine(engine, folder, selection):
    needs(engine)
    check_kinds(kinds_on(folder, KINDS[engine], engine))


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_so_they_are_on_every_engine(tuner, engine, folder):
    needs(engine)
    pairs = kinds_on(folder, tuner, engine, ("dpo", "kto", "grpo"))
    launch(kind_jobs(pairs), 2, folder)
    check_kinds(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_so_does_every_engine(engine, folder):
    needs(engine)
    alone([budget(folder, None, 1)])
    launch([job(budget(folder, engine, 2))], 2, folder)
    check_budget(folder, engine)


def check_budget(folder: Path, engine: str) -> None:
    one, two = budget(folder, None, 1), budget(folder, engine, 2)
    assert apart(one, two).equal, apart(one, two)
    kept = [
        [json.loads(path.read_text())["keep"] for path in sorted(Path(config["output"]).glob("stages/*/stage.json"))]
        for config in (one, two)
    ]
    for ours, theirs in zip(*kept, strict=True):
        assert ours["share"] == theirs["share"]
        for mine, other in zip(ours["constraints"], theirs["constraints"], strict=True):
            assert mine["lost"] == pytest.approx(other["lost"], rel=0.01, abs=1e-4)
            assert mine["multiplier"] == pytest.approx(other["multiplier"], rel=0.01, abs=1e-4)
    assert any(one["multiplier"] for stage in kept[0] for one in stage["constraints"])


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_is_wrong_is_seen(fault, folder, selection):
    """AdamW and clipping hide from the weights how large a gradient is, but not from its norm. Processes whose weights
    drift apart end with an error."""
    found = apart(plain(folder, "adamw_torch", None, 1), with_fault(folder, fault))
    if fault == "gradients are not averaged":
        assert "would not start from the weights that stage 1 ended with" in found.error
    else:
        assert not found.error and found.far > 10 * TOLERANCE, found


def check_optimizer(folder: Path, optimizer: str, engine: str, other: str) -> None:
    one, two = plain(folder, optimizer, None, 1), plain(folder, optimizer, engine, 2)
    assert apart(one, two).equal, apart(one, two)
    assert identical(two, follows(two, "again"))
    on_other = follows(two, other, other)
    assert apart(one, on_other).equal, apart(one, on_other)


@pytest.mark.parametrize(("optimizer", "engine"), GOES_ON)
def test_a_run_goes_on_with_the_same_bits_or_on_another_engine_with_the_same_numbers(
    optimizer, engine, folder, selection
):
    needs(engine, GOES_ON[optimizer, engine])
    check_optimizer(folder, optimizer, engine, GOES_ON[optimizer, engine])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_so_it_does_with_every_optimizer_and_engine(optimizer, folder):
    """And in one process."""
    there = needed(ENGINES)
    cases = [(optimizer, engine, there[number - 2]) for number, engine in enumerate(there)]
    one = plain(folder, optimizer, None, 1)
    alone([one])
    launch(list(optimizer_runs(folder, cases)), 2, folder)
    firsts = {other: plain(folder, optimizer, engine, 2) for _, engine, other in cases}
    alones = {other: follows(first, f"one-{other}", other) for other, first in firsts.items()}
    launch([job(config, of=copy_of(firsts[other])) for other, config in alones.items()], 1, folder)
    for case in cases:
        check_optimizer(folder, *case)
    assert not {other: found for other, c in alones.items() if not (found := apart(one, c)).equal}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_so_they_are_with_every_method(engine, folder):
    needs(engine)
    found = prove(folder, [(row, engine) for row in rows()])
    assert not {cell: apart for cell, apart in found.items() if not apart.equal}


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_rounding_is_far_below_the_tolerance(row, folder):
    """Two runs of one process that differ only in the order of their sums."""
    one, other = config_of(folder, None, 1, row), other_order(folder, row)
    if other is None or row.way == "bfloat16":
        pytest.skip("the micro-batch is part of what it computes, or decides what bfloat16 rounds")
    alone([one, other])
    assert apart(one, other).far < TOLERANCE / 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_accumulated_and_in_bfloat16(engine, folder):
    """With memory in pieces, with a projection and with a teacher; the last two multiply bfloat16's rounding."""
    needs(engine)
    both = [Row(method, "full", way) for method in ("ewc", "gem", "gere_kl") for way in ("accumulation", "bfloat16")]
    found = prove(folder, [(row, engine) for row in both])
    for (row, _), far in found.items():
        loose = row.way == "bfloat16" and row.method != "ewc"
        assert (not far.error and far.terms < 0.2) if loose else far.equal, (row, far)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_killed_and_continued_by_another_number_of_processes(engine, folder):
    """A run of two, one of which is killed in the second stage, ends with the same numbers in three."""
    needs(engine)
    unbroken = config_of(folder, None, 1, Row("ewc", "full"), batch_size=12, micro_batch_size=4)
    unbroken["output"] += "-unbroken"
    alone([unbroken])
    killed = config_of(folder, engine, 2, Row("ewc", "full"), batch_size=12, micro_batch_size=2)
    killed["output"] += "-killed"
    launch([job(killed, kill=[2, 4])], 2, folder)
    assert not done(killed) and "process 1 of 2 was killed" in error(killed)
    launch([job(killed)], 3, folder)
    assert apart(unbroken, killed).equal, apart(unbroken, killed)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_three_processes_between_which_no_weight_is_divided_evenly(engine, folder):
    """The tied embedding, of which FSDP2 makes several units, too."""
    needs(engine)
    one = config_of(folder, None, 1, Row("sequential", "full"), batch_size=12, micro_batch_size=4)
    three = config_of(folder, engine, 3, Row("sequential", "full"), batch_size=12, micro_batch_size=2)
    for config in (one, three):
        config["output"] += "-three"
    alone([one])
    launch([job(three)], 3, folder)
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
    config = config_of(folder, engine, 2, Row("sequential", "full"))
    config |= {"output": f"{config['output']}-explodes", "method": {"name": str(folder / "explode.py")}}
    launch([job(config)], 2, folder)
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
        configs = {m: config_of(folder, name, processes, Row(m, "full"), save_every=99) for m in methods}
        for config in configs.values():
            config["output"] += "-counted"
        launch([job(config, count=True) for config in configs.values()], processes, folder)
        for method, config in configs.items():
            assert not error(config), error(config)
            found[method, processes] = json.loads(Path(config["output"], "counts.json").read_text())
    for method in methods:
        one, two = found[method, 1], found[method, 2]
        assert two["entries"] <= 0.6 * one["entries"], method
        assert two["sums"] <= 12 * two["steps"] and two["gathers"] == 0, (method, two)


def test_the_page_has_every_row_and_engine():
    text = PAGE.read_text(encoding="utf-8")
    lines = text.splitlines()
    [header] = [line for line in lines if line.startswith("| method |")]
    assert [cell.strip(" `") for cell in header.split("|")[4:-1]] == list(ENGINES)
    table = [line for line in lines if line.startswith("| `")]
    assert sorted(map(row_of, table)) == sorted(rows())
    for line in table:
        _, _, _, rounding, *cells, _ = line.split("|")
        assert len(cells) == len(ENGINES) and all(cell.strip().startswith("yes (") for cell in cells), line
        assert not rounding.strip() or "bfloat16" in line or float(rounding) < TOLERANCE / 2
    assert " ".join(settings().split()) in " ".join(text.split())


def row_of(line: str) -> Row:
    method, tuner = (cell.split() for cell in line.split("|")[1:3])
    return Row(*(word.strip("`") for word in (*method, *tuner)))


def test_the_table_is_made_with_what_users_have():
    """Everything that says how a step is made is a default; weight decay is on, since its default is none."""
    chosen, default = TrainingConfig(**TRAINING), TrainingConfig()
    for key in ("optimizer", "schedule", "warmup", "max_grad_norm", "precision", "arguments"):
        assert getattr(chosen, key) == getattr(default, key)
    assert chosen.optimizer.startswith("adamw") and chosen.weight_decay and chosen.max_grad_norm


def test_an_older_transformers_is_refused_where_it_would_fail(folder, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "5.18.1")
    with pytest.raises(ConfigError, match=r"fsdp2 needs transformers 5.23 or newer, and this is 5.18.1"):
        setup.prepare(setup.resolve(load_config(config_of(folder, "fsdp2", 2, Row("sequential", "full")))))
