"""What every method must be, whatever its paper says. A new method is guarded from its first day, with its defaults.

Each method trains the tiny model on two tasks that conflict: every prompt of the first asks for one letter, every
prompt of the second for another, so plain training on the second makes the model give its letter to both.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

import holdfast.runner.loop
from holdfast.api.method import Method
from holdfast.methods import find, known
from holdfast.system.progress import Progress
from holdfast.training.terms import Terms
from tiny import tiny_config

GENERAL = "\n".join(f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw")


@dataclass(frozen=True)
class Case:
    """How a method is guarded.

    Attributes:
        options: what it is run with.
        off: options that switch it off, or why nothing does.
        flops: how many times the matrix arithmetic of `sequential` its second stage may take, all told.
        vectors: memory after two stages at most, in vectors of trainable parameters; rows come on top.
        margin: how much less than `sequential` it forgets at least, as a mean over three seeds; None where its page
            says that it need not, or where it needs another model or optimizer than this, which its own tests have.
        at_test: it acts on the responses, not (only) on the weights.
        training: how it must be trained to contribute and to forget less; at the rate of the other guards the first
            steps of a stage are so large that no gradient of the past says anything about them.
        tuner: instead of its own first one, or full.
    """

    options: dict[str, Any] = field(default_factory=dict)
    off: dict[str, Any] | str = field(default_factory=dict)
    flops: float = 1.01
    vectors: float = 0.0
    margin: float | None = 0.1
    at_test: bool = False
    training: dict[str, Any] = field(default_factory=lambda: {"epochs": 6})
    tuner: Any = None


GENTLE = {"epochs": 16, "learning_rate": 0.01}
GENTLER = {"epochs": 24, "learning_rate": 0.005}
LORA = {"name": "lora", "r": 4, "lora_dropout": 0.0}
TEXTS, CORPUS = {"path": "GENERAL"}, {"path": "CORPUS"}
DRAWN = {"length": 12, "buffer": 2}
SILENT = {"weight": 0, "ce_weight": 0}
CASES: dict[str, Case] = {
    "a_gem": Case(off={"capacity": 0}, flops=2.1, training=GENTLER),
    "cia": Case({"grouping": 0.9, "samples": 8}, {"strength": 0}, vectors=3, at_test=True),
    "der": Case({"ratio": 1.0, "weight": 20.0}, {"weight": 0}, flops=2.2, vectors=2, training=GENTLE),
    "dual_prompt": Case(off={"strength": 0}, flops=1.6, margin=None),
    "ewc": Case({"strength": 2e4, "samples": 8}, {"strength": 0}, flops=1.2, vectors=2, training=GENTLE),
    "gem": Case(off={"capacity": 0}, flops=2.1, training=GENTLER),
    # the other reduction divides by the violations of a micro-batch, however many there are
    "gere": Case(TEXTS | {"weight": 10.0, "reduction": "mean"}, TEXTS | SILENT, flops=2.5, margin=None),
    "gere_ce": Case(TEXTS, TEXTS | {"weight": 0}, flops=2.5, margin=None),
    "gere_kl": Case(TEXTS, TEXTS | SILENT, flops=2.5, margin=None),
    "gere_l1": Case(TEXTS, TEXTS | SILENT, flops=2.5, margin=None),
    "gere_l2": Case(TEXTS, TEXTS | SILENT, flops=2.5, margin=None),
    "hide_lora": Case(
        off="training is that of sequential, and rows are always sorted by task",
        flops=1.2,
        vectors=3.2,
        at_test=True,
        training={"epochs": 24, "learning_rate": 0.02},
        tuner=LORA,
    ),
    "kl_dwn": Case(off={"weight": 0}, flops=1.5, margin=None),
    "kl_pre": Case(DRAWN, DRAWN | {"weight": 0}, flops=2.5, margin=None),
    "kl_replay": Case(CORPUS, CORPUS | {"weight": 0}, flops=2.5, margin=None),
    "l2p": Case(off={"strength": 0, "diversify": False}, flops=1.05, margin=None),
    "lfpt5": Case(
        {"samples": 2}, {"weight": 0, "kl_weight": 0, "lm_weight": 0}, flops=3.3, margin=None, tuner="prompt"
    ),
    "lwf": Case(off={"weight": 0}, flops=1.5, margin=None),
    "mas": Case({"strength": 2.0, "samples": 8}, {"strength": 0}, flops=1.2, vectors=2, training=GENTLE),
    "mbpa": Case(
        {"neighbours": 8, "learning_rate": 0.3, "replay": 0.1},
        {"steps": 0, "replay": 0},
        flops=1.3,
        vectors=1.2,
        at_test=True,
    ),
    "ntp_pre": Case(DRAWN, DRAWN | {"weight": 0}, flops=2.5, margin=None),
    "o_lora": Case(off="it trains a new adapter in each stage, whatever its strengths are", flops=1.3, margin=None),
    "ogd": Case({"samples": 8, "capacity": 12}, {"capacity": 0}, flops=2.1, vectors=12.1, margin=None),
    "osf": Case(off="it always decomposes and projects", flops=1.3, margin=None),
    "rehearsal": Case({"loss": "kl"}, {"weight": 0}, flops=1.7),
    "replace": Case(DRAWN, "it replaces at least one row in a batch", flops=2.5, margin=None),
    "replay": Case({"ratio": 0.5}, {"weight": 0}, flops=1.6),
    "self_replay": Case(CORPUS, CORPUS | {"weight": 0}, flops=2.5, margin=None),
    "seq_lora_merge": Case(off="it merges what its stages trained, and has no strength", vectors=3, margin=None),
    "si": Case({"strength": 1e4}, {"strength": 0}, vectors=2, training=GENTLE),
    "tree_lora": Case(off={"strength": 0}, vectors=2, margin=None),
}
METHODS = {name: cls for name, cls in known().items() if cls.__module__.startswith("holdfast.")}
TRAINED = [name for name, cls in METHODS.items() if cls.schedule == "sequence" and name != "sequential"]


def case(name: str) -> Case:
    return CASES.get(name, Case())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("guards")
    (path / "general.txt").write_text(GENERAL)
    (path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    return path


@pytest.fixture(scope="module")
def trained(folder) -> Callable[..., Path]:
    """Runs a method once for each of its settings and gives the run's directory."""

    def run(name: str, options: dict[str, Any], tuner: Any, seed: int = 0, **training: Any) -> Path:
        settings = json.dumps([name, options, tuner, seed, training], sort_keys=True)
        output = folder / f"{name}-{abs(hash(settings))}"
        if not (output / "matrix.json").exists():
            holdfast.runner.loop.run(
                configuration(folder, output, name, options, tuner, seed, training), Progress(quiet=True)
            )
        return output

    return run


def configuration(folder: Path, output: Path, name: str, options: Any, tuner: Any, seed: int, training: Any) -> Any:
    config = tiny_config(folder, method={"name": name} | with_paths(options, folder), seed=seed, output=str(output))
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"epochs": 3, "save_every": 3} | training
    del config["tuner"]
    return config | ({} if tuner is None else {"tuner": tuner})


def with_paths(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    files = {"GENERAL": "general.txt", "CORPUS": "corpus.jsonl"}
    return {key: str(folder / files[value]) if value in list(files) else value for key, value in options.items()}


def tuner_of(name: str) -> Any:
    """Without dropout, so that runs may be compared."""
    if case(name).tuner is not None:
        return case(name).tuner
    first = (METHODS[name].tuners or ("full",))[0]
    return LORA if first == "lora" else first


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    paths = [p for p in sorted(run.glob(f"stages/{stage}/**/*.safetensors")) if p.parent.name != "method"]
    return {f"{path.parent.name}/{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def responses(run: Path) -> list[str]:
    return [path.read_text() for path in sorted(run.glob("stages/*/responses/*"))]


def terms(run: Path, stage: int) -> list[dict[str, float]]:
    events = (json.loads(line) for line in (run / "events.jsonl").read_text().splitlines())
    return [event["terms"] for event in events if event["stage"] == stage]


@pytest.mark.parametrize("name", METHODS)
def test_it_is_documented(name):
    """One line that says what it is, and a description for every option."""
    cls = METHODS[name]
    assert cls.__doc__ and len(cls.__doc__.splitlines()[0]) <= 120
    for key, option in cls.Options.model_fields.items():
        assert option.description, f"{name}.{key}"


@pytest.mark.parametrize("name", TRAINED)
def test_it_contributes(name, trained, folder, monkeypatch):
    """Each declared term has a gradient, through the loss or added after the backward pass, and something changes."""
    sizes: dict[str, float] = {}
    declared: set[str] = set()
    check, cls = Terms.check_gradient, METHODS[name]

    def with_size(self: Terms, stage: Any, method: Method, term: str, value: torch.Tensor) -> None:
        check(self, stage, method, term, value)
        trained = [p for p in stage.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True)
        sizes[term] = max(sizes.get(term, 0.0), *(float(g.abs().max()) for g in found if g is not None))

    def declares(self: Method, stage: Any) -> Any:
        found = original_declares(self, stage)
        declared.update(found)
        return found

    def after_backward(self: Method, step: Any, gradients: Any) -> Any:
        before = gradients.copy()
        values = original_backward(self, step, gradients)
        change = max(float((g - before.tensors[key]).abs().max()) for key, g in gradients.tensors.items())
        for term in values:
            sizes.setdefault(term, 0.0)
            sizes[term] = max(sizes[term], change)
        return values

    original_declares, original_backward = cls.declares, cls.after_backward
    monkeypatch.setattr(Terms, "check_gradient", with_size)
    monkeypatch.setattr(cls, "declares", declares)
    monkeypatch.setattr(cls, "after_backward", after_backward)
    output = folder / f"contributes-{name}"
    training = case(name).training
    config = configuration(folder, output, name, case(name).options, tuner_of(name), 0, training)
    holdfast.runner.loop.run(config, Progress(quiet=True))
    runs = output, trained("sequential", {}, tuner_of(name), **training)
    for term in declared:
        assert sizes.get(term, 0.0) > 0, term
    changed = not same(*(weights(run, "02-green") for run in runs))
    assert changed or (case(name).at_test and responses(runs[0]) != responses(runs[1]))


@pytest.mark.parametrize("name", TRAINED)
def test_it_is_neutral_at_zero(name, trained):
    """With strength 0 the weights are those of `sequential`, bit for bit."""
    off = case(name).off
    if isinstance(off, str):
        pytest.skip(off)
    method, sequential = (trained(n, o, tuner_of(name)) for n, o in ((name, off), ("sequential", {})))
    for stage in ("01-red", "02-green"):
        assert same(weights(method, stage), weights(sequential, stage)), stage
    assert responses(method) == responses(sequential)


class Killed(BaseException):
    """Takes a run down as a signal would: nothing of its process goes on."""


class Kill(TrainerCallback):
    def __init__(self, stage: int, step: int):
        self.stage, self.step = stage, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if Path(args.output_dir).parent.name.startswith(f"{self.stage:02d}-") and state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("name", TRAINED)
def test_killed_in_stage_two_and_continued_it_is_the_unbroken_run(name, trained, folder, monkeypatch):
    """From what its files say alone; and none of them is a pickle of the method's."""
    options, tuner = case(name).options, tuner_of(name)
    unbroken = trained(name, options, tuner)
    output = folder / f"killed-{name}"
    config = configuration(folder, output, name, options, tuner, 0, {})
    watch = holdfast.runner.stage._Watch.on_step_end
    kill = Kill(2, 5)  # after the checkpoint of step 3

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch(self, args, state, control, **kwargs)
        kill.on_step_end(args, state, control)

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.stage._Watch, "on_step_end", dying)
        with pytest.raises(Killed):
            holdfast.runner.loop.run(config, Progress(quiet=True))
    assert list(output.glob("stages/02-green/checkpoint/checkpoint-3/complete.json"))
    holdfast.runner.loop.run(config, Progress(quiet=True))
    assert same(weights(output, "02-green"), weights(unbroken, "02-green"))
    assert responses(output) == responses(unbroken)
    assert terms(output, 2) == terms(unbroken, 2)
    for method in output.glob("stages/*/method/*"):
        assert method.suffix in (".safetensors", ".json")
    for path in output.glob("stages/*/method/*.safetensors"):
        one, two = load_file(path), load_file(unbroken / path.relative_to(output))
        assert same(one, two), path.name


@pytest.mark.parametrize("name", TRAINED)
def test_its_arithmetic_and_memory_are_what_its_page_says(name, folder, monkeypatch):
    train = holdfast.runner.loop.train_stage
    counted: dict[tuple[str, int], int] = {}

    def count(setup: Any, stage: Any, *args: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            steps = train(setup, stage, *args)
        counted[method, stage.index] = counter.get_total_flops()
        return steps

    monkeypatch.setattr(holdfast.runner.loop, "train_stage", count)
    parameters = 0
    for method, options in ((name, case(name).options), ("sequential", {})):
        output = folder / f"cost-{name}-{method}"
        holdfast.runner.loop.run(
            configuration(folder, output, method, options, tuner_of(name), 0, {}), Progress(quiet=True)
        )
        parameters = json.loads((output / "run.json").read_text())["parameters"]["trainable"]
    assert counted[name, 2] <= case(name).flops * counted["sequential", 2], counted[name, 2] / counted["sequential", 2]
    states = [load_file(path) for path in (folder / f"cost-{name}-{name}").glob("stages/02-green/method/*.safetensors")]
    floats = sum(t.numel() for state in states for t in state.values() if t.is_floating_point())
    assert floats <= case(name).vectors * parameters, floats / parameters


@pytest.mark.parametrize("name", TRAINED)
def test_gradient_accumulation_changes_nothing(name, trained):
    """A step of one micro-batch of eight rows, and of four of two; plain SGD, since Adam blows rounding up."""
    options, tuner = case(name).options, tuner_of(name)
    plain = {"optimizer": "sgd", "learning_rate": 0.3}
    one, four = (trained(name, options, tuner, micro_batch_size=size, **plain) for size in (8, 2))
    for stage in ("01-red", "02-green"):
        ours = weights(four, stage)
        for key, tensor in weights(one, stage).items():
            torch.testing.assert_close(ours[key], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", TRAINED)
def test_it_forgets_less(name, trained):
    """Less forgetting of the first task than `sequential`, by the margin, as a mean over three seeds."""
    margin = case(name).margin
    if margin is None:
        pytest.skip("it need not here")
    means = []
    for method, options in ((name, case(name).options), ("sequential", {})):
        found = []
        for seed in range(3):
            run = trained(method, options, tuner_of(name), seed, **case(name).training)
            found.append(json.loads((run / "matrix.json").read_text())["summary"]["forgetting"])
        means.append(sum(found) / 3)
    assert means[0] <= means[1] - margin, means


def test_every_method_is_found_by_name():
    assert all(find(name) is cls for name, cls in METHODS.items())
