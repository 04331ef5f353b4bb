"""What every method must be, whatever its paper says. A new method is guarded from its first day, with its defaults.

Each method trains the tiny model on two tasks that conflict: every prompt of the first asks for one letter, every
prompt of the second for another, so plain training on the second makes the model give its letter to both.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import TrainerCallback

import holdfast.runner.loop
import holdfast.runner.run
from holdfast.api.method import Method
from holdfast.methods import find
from holdfast.system.progress import Progress
from holdfast.training.terms import Terms
from support.guards import (
    GENERAL,
    METHODS,
    TRAINED,
    case,
    configuration,
    responses,
    same,
    terms,
    tuner_of,
    weights,
)
from support.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("guards")
    (path / "general.txt").write_text(GENERAL)
    (path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    return path


class Operations(TorchDispatchMode):
    """Counts floating-point operations as torch's FlopCounterMode does, without asking which module they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.whole: set[Any] = set()
        """Operators that consist of no others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, of = kwargs or {}, flop_registry.get(func._overloadpacket)
        if of is None and func not in self.whole:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            self.whole.add(func)
        out = func(*args, **kwargs)
        self.count += of(*args, **kwargs, out_val=out) if of else 0
        return out


class Runs:
    """Runs of methods, each of whose settings is trained once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.operations: dict[Path, int] = {}
        """Of a counted run's second stage."""

    def __call__(self, name: str, options: dict[str, Any], tuner: Any, seed: int = 0, **training: Any) -> Path:
        """The run's directory."""
        output = self.place(name, options, tuner, seed, training)
        if not (output / "matrix.json").exists():
            config = configuration(self.folder, output, name, options, tuner, seed, training)
            holdfast.runner.run.run(config, Progress(quiet=True))
        return output

    def place(self, name: str, options: dict[str, Any], tuner: Any, seed: int, training: dict[str, Any]) -> Path:
        settings = json.dumps([name, options, tuner, seed, training], sort_keys=True)
        return self.folder / f"{name}-{abs(hash(settings))}"

    def counted(self, name: str, options: dict[str, Any], tuner: Any) -> Path:
        """The directory of a run whose operations are counted, which changes the last bits of its sums."""
        output = self.folder / f"cost-{name}-{abs(hash(json.dumps(tuner)))}"
        train = holdfast.runner.loop.train_stage

        def count(setup: Any, stage: Any, *args: Any) -> Any:
            if stage.index == 1:
                return train(setup, stage, *args)
            with Operations() as found:
                result = train(setup, stage, *args)
            self.operations[output] = found.count
            return result

        if output not in self.operations:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(holdfast.runner.loop, "train_stage", count)
                config = configuration(self.folder, output, name, options, tuner, 0, {})
                holdfast.runner.run.run(config, Progress(quiet=True))
        return output


def test_operations_are_counted_as_torch_counts_them():
    model, ids = tiny_model(), torch.arange(3, 11)[None]

    def work() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=3)

    with FlopCounterMode(display=False) as expected:
        work()
    with Operations() as found:
        work()
    assert found.count == expected.get_total_flops() > 0


@pytest.fixture(scope="module")
def trained(folder) -> Runs:
    return Runs(folder)


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
    options, tuner, training = case(name).options, tuner_of(name), case(name).training
    shutil.rmtree(trained.place(name, options, tuner, 0, training), ignore_errors=True)
    runs = trained(name, options, tuner, **training), trained("sequential", {}, tuner, **training)
    for term in declared:
        assert sizes.get(term, 0.0) > 0, term
    changed = not same(*(weights(run, "02-green") for run in runs))
    assert changed or (case(name).at_test and responses(runs[0]) != responses(runs[1]))


COUNTED = [
    n if n in ("replay", "lwf", "ewc", "a_gem", "o_lora", "rehearsal") else pytest.param(n, marks=pytest.mark.slow)
    for n in TRAINED
]
GROWN = [n if n == "o_lora" else pytest.param(n, marks=pytest.mark.slow) for n in TRAINED]


@pytest.mark.parametrize("name", GROWN)
def test_an_appended_task_is_learned_as_if_it_had_been_there_from_the_start(name, trained, folder):
    options, tuner, grown = case(name).options, tuner_of(name), folder / f"grown-{name}"
    whole = trained(name, options, tuner)
    config = configuration(folder, grown, name, options, tuner, 0, {})
    for tasks in (["red"], ["red", "green"]):
        config["stream"]["order"] = tasks
        holdfast.runner.run.run(config, Progress(quiet=True))
    for path in sorted(whole.glob("stages/*/*/*")):
        other = grown / path.relative_to(whole)
        if path.suffix == ".safetensors":
            assert same(load_file(path), load_file(other)), path
        elif path.parent.name == "method" or path.parent.parent.name == "02-green":
            assert path.read_text() == other.read_text(), path


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


CONTINUED = ("replay", "kl_replay", "ewc", "gem", "o_lora", "tree_lora", "mbpa", "l2p")
"""`make test` continues these; the others go on from a checkpoint in its grid, each with one tuner."""


@pytest.mark.parametrize(
    "name", [name if name in CONTINUED else pytest.param(name, marks=pytest.mark.slow) for name in TRAINED]
)
def test_killed_in_stage_two_and_continued_it_is_the_unbroken_run(name, trained, folder, monkeypatch):
    """From what its files say alone; and none of them is a pickle of the method's."""
    options, tuner = case(name).options, tuner_of(name)
    unbroken = trained(name, options, tuner)
    output = folder / f"killed-{name}"
    config = configuration(folder, output, name, options, tuner, 0, {"save_every": 3})
    watch = holdfast.runner.stage.StageWatch.on_step_end
    kill = Kill(2, 5)  # after the checkpoint of step 3

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch(self, args, state, control, **kwargs)
        kill.on_step_end(args, state, control)

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", dying)
        with pytest.raises(Killed):
            holdfast.runner.run.run(config, Progress(quiet=True))
    assert list(output.glob("stages/02-green/checkpoint/checkpoint-3/complete.json"))
    holdfast.runner.run.run(config, Progress(quiet=True))
    assert same(weights(output, "02-green"), weights(unbroken, "02-green"))
    assert responses(output) == responses(unbroken)
    assert terms(output, 2) == terms(unbroken, 2)
    for method in output.glob("stages/*/method/*"):
        assert method.suffix in (".safetensors", ".json")
    for path in output.glob("stages/*/method/*.safetensors"):
        one, two = load_file(path), load_file(unbroken / path.relative_to(output))
        assert same(one, two), path.name


@pytest.mark.parametrize("name", COUNTED)
def test_its_arithmetic_and_memory_are_what_its_page_says(name, trained):
    output, plain = (trained.counted(n, o, tuner_of(name)) for n, o in ((name, case(name).options), ("sequential", {})))
    operations, expected = trained.operations[output], trained.operations[plain]
    parameters = json.loads((plain / "run.json").read_text())["parameters"]["trainable"]
    assert operations <= case(name).flops * expected, operations / expected
    states = [load_file(path) for path in output.glob("stages/02-green/method/*.safetensors")]
    floats = sum(t.numel() for state in states for t in state.values() if t.is_floating_point())
    assert floats <= case(name).vectors * parameters, floats / parameters


FORGETS = [
    *((name, case(name).seeds) for name in TRAINED),
    *(pytest.param(name, 3, marks=pytest.mark.slow) for name in TRAINED if case(name).seeds != 3),
]


@pytest.mark.parametrize(("name", "seeds"), FORGETS)
def test_it_forgets_less(name, seeds, trained):
    """Less forgetting of the first task than `sequential`, by the margin, as a mean over seeds."""
    margin = case(name).margin
    if margin is None:
        pytest.skip("it need not here")
    means = []
    for method, options in ((name, case(name).options), ("sequential", {})):
        found = []
        for seed in range(seeds):
            run = trained(method, options, tuner_of(name), seed, **case(name).training)
            found.append(json.loads((run / "matrix.json").read_text())["summary"]["forgetting"])
        means.append(sum(found) / seeds)
    assert means[0] <= means[1] - margin, means


def test_every_method_is_found_by_name():
    assert all(find(name) is cls for name, cls in METHODS.items())
