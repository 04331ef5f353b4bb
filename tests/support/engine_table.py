"""Every method on every engine, beside one process: the runs, and how far their results lie apart.

`PYTHONPATH=tests python -m support.engine_table FOLDER > docs/engines.md` runs all of it and writes the page; runs that
stand in the folder are not run again.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from holdfast.config.training import TrainingConfig
from holdfast.system.files import read_jsonl
from support.engine_jobs import Config, alone, copy_of, done, error, follows, job, launch
from support.guards import GENERAL, LORA, METHODS, case, configuration, tuner_of, weights

ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3_offload")
TRAINING = {
    "epochs": 3,
    "batch_size": 10,
    "micro_batch_size": 5,
    "learning_rate": 0.03,
    "weight_decay": 0.1,
    "save_every": 3,
}
"""Steps of 10, 10 and 4 rows, so that with two processes the last one is uneven. One process takes two micro-batches to
a step, two processes one each. All else that changes a number is as a user has it who sets nothing."""

OTHER = {"micro_batch_size": 2}
"""The same run of one process with its sums in another order: what rounding does to a row."""

BREAKS = (4, 5, 2)
"""Steps of the last stage from which one process goes on, row by row: after its first checkpoint, or before it."""

TUNERS = {
    "adalora": {"init_r": 4, "target_r": 2, "lora_dropout": 0.0, "tinit": 1, "tfinal": 2},
    "adapter": {},
    "freeze": {"blocks": 1},
    "ia3": {},
    "moe_lora": {"r": 4, "experts": 2, "lora_dropout": 0.0},
    "p_tuning": {"num_virtual_tokens": 3},
    "prefix": {"num_virtual_tokens": 3},
}
"""Those that no method of the table asks for, with sequential training, without dropout."""

WAYS: dict[str, dict[str, Any]] = {
    "": {},
    "accumulation": {"batch_size": 20},
    "bfloat16": {"precision": "bfloat16"},
}
"""How a row is trained otherwise: each of two processes takes two micro-batches to a step; mixed precision."""

WHOLE = ("full", "freeze", "osf")
SLOWER = 0.01
"""The learning rate of adapters and prompts."""

LONGER = {"gem": 8, "a_gem": 8}
"""Epochs, until the second task's gradient turns against the first one's, so that there is something to hold back."""

GENTLER = {("gem", "full"): 3, ("a_gem", "full"): 3, ("gem", "lora"): 2, ("a_gem", "lora"): 2}
GENTLER |= {("gere", "full"): 3, ("gere", "lora"): 3, ("replace", "full"): 3, ("replace", "lora"): 3}
GENTLER |= {("kl_dwn", "lora"): 3, ("inflora", "lora"): 3, ("gain_lora", "lora"): 3}
"""The learning rate is divided by it, so that rounding decides no constraint, takes no state across a margin, and does
not grow from step to step."""

OPTIONS: dict[str, dict[str, Any]] = {"mbpa": {"learning_rate": 0.03}}
"""Options of a method here, so that rounding decides no answer: MbPA's steps before each answer are small."""

EVEN = {"moe_lora": {"batch_size": 8, "micro_batch_size": 4}}
"""Load balance is that of a micro-batch, so that it must be the same one."""

TOLERANCE = 5e-3
"""Of weights, beside how far their tensor moved in a stage, and of loss terms."""

BFLOAT16 = 2e-2
"""The same in bfloat16, where a weight's last float32 bit may turn a bit of bfloat16, 2^-9 of it."""


class Row(NamedTuple):
    """A line of the table."""

    method: str
    tuner: str
    way: str = ""


Cell = tuple[Row, str]
"""(row, engine)."""


def rows() -> list[Row]:
    """Each method with its first tuner or full, those that take any with LoRA, too; each tuner; each way."""
    own = [(name, name_of(tuner_of(name))) for name in METHODS]
    with_lora = [(name, "lora") for name, cls in METHODS.items() if not cls.tuners]
    plain = sorted({*own, *with_lora, *(("sequential", name) for name in TUNERS)})
    return [*(Row(*row) for row in plain), *(Row("ewc", "full", way) for way in WAYS if way)]


def name_of(tuner: Any) -> str:
    return tuner["name"] if isinstance(tuner, dict) else tuner


def config_of(folder: Path, engine: str | None, processes: int, row: Sequence[str], **training: Any) -> Config:
    """The run of a row on an engine; None: one process, whatever there are."""
    method, tuner, way = Row(*row)
    output = folder / f"{engine or 'one'}-{processes}" / "-".join(filter(None, (method, tuner, way)))
    own = tuner_of(method)
    chosen = own if name_of(own) == tuner else LORA if tuner == "lora" else {"name": tuner} | TUNERS.get(tuner, {})
    rate = (TRAINING["learning_rate"] if tuner in WHOLE else SLOWER) / GENTLER.get((method, tuner), 1)
    settings = TRAINING | {"learning_rate": rate, "epochs": LONGER.get(method, TRAINING["epochs"])}
    settings |= EVEN.get(tuner, {}) | WAYS[way]
    settings |= {"engine": engine} | training
    options = case(method).options | OPTIONS.get(method, {})
    return configuration(folder, output, method, options, chosen, 0, settings)


def other_order(folder: Path, row: Row) -> Config | None:
    """One process with its sums in another order; None where a micro-batch is part of what is computed."""
    return None if row.tuner in EVEN else follows(config_of(folder, None, 1, row, **OTHER), "other")


def prepare(folder: Path) -> Path:
    """The texts that some methods rehearse."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "general.txt").write_text(GENERAL)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    return folder


def trains(config: Config) -> bool:
    return Path(config["output"], "events.jsonl").exists()


@dataclass
class Apart:
    """How far two runs lie apart.

    Attributes:
        weights: of both stages, L2, as a share of how far their tensor moved.
        terms: of the loss, and of the gradient's norm, as a share of it.
        scores: whether the score matrices are equal.
        error: of the run that failed.
        tolerance: up to which they are equal.
    """

    weights: float
    terms: float
    scores: bool
    error: str = ""
    tolerance: float = TOLERANCE

    @property
    def far(self) -> float:
        return max(self.weights, self.terms)

    @property
    def equal(self) -> bool:
        return not self.error and self.scores and self.far <= self.tolerance

    def __or__(self, other: Apart) -> Apart:
        """The worse of both."""
        weights, terms = max(self.weights, other.weights), max(self.terms, other.terms)
        return Apart(weights, terms, self.scores and other.scores, self.error or other.error, self.tolerance)


def logged(run: Path, stage: int) -> list[dict[str, float]]:
    """Each step's loss terms, and the norm of its gradient."""
    events = [event for event in read_jsonl(run / "events.jsonl") if event["stage"] == stage]
    return [event["terms"] | {"norm": event["grad_norm"]} for event in events]


def products(run: Path, stage: str) -> dict[str, torch.Tensor]:
    """A stage's weights; of OSF's trained singular triplets their product, which neither their signs nor the order of
    equal ones changes."""
    tensors = weights(run, stage)
    for name in [name for name in tensors if name.endswith(".U_low")]:
        u, s, v = (tensors.pop(name.removesuffix("U_low") + part) for part in ("U_low", "S_low", "V_low"))
        tensors[name.removesuffix(".U_low")] = (u.double() * s.double()) @ v.double()
    return tensors


def moved(run: Path) -> dict[str, float]:
    """How far each tensor moved in the last stage, L2; of one that did not move or was not there before, its size."""
    *earlier, last = stages(run)
    before, after, found = products(run, earlier[-1]) if earlier else {}, products(run, last), {}
    for name, w in after.items():
        known = name in before and before[name].shape == w.shape
        found[name] = float((w.double() - before[name].double()).norm()) if known else 0.0
        found[name] = found[name] or float(w.double().norm())
    return found


def stages(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("stages/*/stage.json"))


def apart(one: Config, other: Config) -> Apart:
    """Compare the results of two configurations."""
    for config in (one, other):
        if not done(config):
            return Apart(0, 0, False, error(config) or "it did not end")
    first, second = (Path(config["output"]) for config in (one, other))
    tolerance = BFLOAT16 if one["training"].get("precision") == "bfloat16" else TOLERANCE
    found = Apart(0.0, 0.0, True, tolerance=tolerance)
    distance = moved(first) if trains(one) else {}
    for stage in stages(first) if trains(one) else []:
        theirs = products(second, stage)
        for name, w in products(first, stage).items():
            if w.shape != theirs[name].shape:
                return Apart(0, 0, False, f"{name}: {w.shape} and {theirs[name].shape}")
            far = float((w.double() - theirs[name].double()).norm())
            found.weights = max(found.weights, far / max(distance.get(name, float(w.double().norm())), 1e-6))
        index = int(stage[:2])
        for ours, theirs_now in zip(logged(first, index), logged(second, index), strict=True):
            assert ours.keys() == theirs_now.keys(), (ours, theirs_now)
            shares = [abs(value - theirs_now[name]) / max(abs(value), 1e-2) for name, value in ours.items()]
            found.terms = max([found.terms, *shares])
    matrices = [json.loads((path / "matrix.json").read_text()) for path in (first, second)]
    found.scores = matrices[0]["scores"] == matrices[1]["scores"]
    return found


def identical(one: Config, other: Config) -> bool:
    """Whether two runs ended with the same bits."""
    assert done(one) and done(other), error(one) or error(other)
    pairs = [
        [weights(Path(config["output"]), stage) for config in (one, other)] for stage in stages(Path(one["output"]))
    ]
    return bool(pairs) and all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


Jobs = Sequence[dict[str, Any]]


def prove(folder: Path, cells: Iterable[Cell], beside: tuple[Jobs, Jobs] = ((), ())) -> dict[Cell, Apart]:
    """Run what is asked for on its engine, continue it in one process from what lay on the disk in the last stage, and
    compare both with one process; runs that stand in the folder stay.

    Args:
        beside: other jobs, that the same two processes do, and that the same one does.
    """
    cells = list(cells)
    ones = {row: config_of(folder, None, 1, row) for row, _ in cells}
    alone(list(ones.values()))
    pairs = {(row, engine): (ones[row], config_of(folder, engine, 2, row)) for row, engine in cells}
    step = {row: BREAKS[number % len(BREAKS)] for number, row in enumerate(rows())}
    jobs = [job(config, copy=step.get(cell[0], BREAKS[0])) for cell, (_, config) in pairs.items()]
    launch([*jobs, *beside[0]], 2, folder)
    trained = {cell: follows(config, "alone") for cell, (one, config) in pairs.items() if trains(one)}
    jobs = [job(config, of=copy_of(pairs[cell][1])) for cell, config in trained.items()]
    launch([*jobs, *beside[1]], 1, folder)
    found = {cell: apart(*pair) for cell, pair in pairs.items()}
    return found | {cell: found[cell] | apart(pairs[cell][0], config) for cell, config in trained.items()}


PAGE = """\
# Which method runs on which engine

<!-- Written by `PYTHONPATH=tests python -m support.engine_table FOLDER > docs/engines.md`, from runs. -->

*yes*: two processes on this engine give the numbers of one process with the same global batch, after two stages of a
tiny model. The same holds for one process that continues on this engine from a checkpoint in the last stage.

{settings}
The last step of an epoch is uneven: the processes share its rows, and none is dropped or repeated. (`moe_lora` has even
steps only, since its load balance is that of a micro-batch.) *accumulation*: each of two processes takes two
micro-batches to a step. *bfloat16*: mixed precision, in which they agree to {bfloat16:g}.

**Comparison.** The final weights of both stages agree to {tolerance:g} of the distance that their tensor moves in a
stage (L2). Every logged loss term and the gradient's norm agree to {tolerance:g} of their size. The score matrix is
equal. The number in brackets is the largest difference. AdamW divides by the gradient's size, so that rounding shows
more than with SGD. The column *rounding* says how much: it is the difference of two runs of one process which take the
same rows in micro-batches of another size. Tests show that faults of an engine are seen: gradients that are not
averaged or that are summed, and an optimizer state that is lost when a run continues.

`tests/whole/test_engines.py` runs a selection of this table in `make test`, all of it in `make test-all`. It also tests
other optimizers, three processes, and a run that loses a process and is continued by three.
[The engines, and how to start them](launch.md).

{table}
"""


def settings() -> str:
    """What the runs of the table are trained with, for the page."""
    chosen = TrainingConfig(**TRAINING)
    return (
        f"The optimizer is {chosen.optimizer} with weight decay {chosen.weight_decay:g}, the schedule is "
        f"{chosen.schedule} with a warm-up of {chosen.warmup:g}, and gradients are clipped at "
        f"{chosen.max_grad_norm:.1f}: the defaults, but for the weight decay. The learning rate is "
        f"{chosen.learning_rate:g}, and that of adapters and prompts {SLOWER:g}; `gem`, `a_gem`, `gere`, "
        f"`replace`, `kl_dwn`, `inflora` and `gain_lora` have a half or a third of it, and the steps of `mbpa` "
        f"before an answer "
        f"{OPTIONS['mbpa']['learning_rate']:g}."
    )


def page(found: dict[Cell, Apart], rounding: dict[Row, Apart]) -> str:
    """docs/engines.md, of what was found in each cell."""
    lines = ["| method | tuner | rounding | " + " | ".join(f"`{engine}`" for engine in ENGINES) + " |"]
    lines.append("|---" * (len(ENGINES) + 3) + "|")
    for row in rows():
        cells = [f"`{row.method}`", " ".join([f"`{row.tuner}`", row.way]).strip()]
        cells.append(f"{rounding[row].far:.0e}" if row in rounding else "")
        for engine in ENGINES:
            cell = found[row, engine]
            cells.append(f"yes ({cell.far:.0e})" if cell.equal else f"**no** {cell.error[:80]}")
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    return PAGE.format(
        tolerance=TOLERANCE, bfloat16=BFLOAT16, settings=textwrap.fill(f"**Settings.** {settings()}", 120), table=table
    )


TOGETHER = 8
"""Rows that one start of the processes does."""


def main() -> None:
    folder = prepare(Path(sys.argv[1]))
    found: dict[Cell, Apart] = {}
    rounding: dict[Row, Apart] = {}
    for start in range(0, len(rows()), TOGETHER):
        some = rows()[start : start + TOGETHER]
        others = {row: config for row in some if (config := other_order(folder, row)) is not None}
        alone(list(others.values()))
        found |= prove(folder, [(row, engine) for row in some for engine in ENGINES])
        rounding |= {row: apart(config_of(folder, None, 1, row), config) for row, config in others.items()}
    print(page(found, rounding), end="")


if __name__ == "__main__":
    main()
