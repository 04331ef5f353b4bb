"""Every method on every engine, beside one process: the runs, and how far their results lie apart.

`PYTHONPATH=tests python -m support.engine_table [FOLDER] > docs/engines.md` runs all of it and writes the page; runs
that stand in the folder are not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.system.files import read_jsonl
from support.guards import GENERAL, LORA, METHODS, case, configuration, tuner_of, weights

WORKER = Path(__file__).with_name("engine_worker.py")
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3", "zero3_offload")
TRAINING = {"epochs": 2, "batch_size": 10, "micro_batch_size": 5, "optimizer": "sgd", "learning_rate": 0.3}
"""Steps of 10, 10 and 4 rows, so that with two processes the last one is uneven; plain SGD, since Adam blows rounding
up. One process takes two micro-batches to a step, two processes one each."""

BREAKS = (2, 4)
"""Steps of the last stage from which one process goes on, of every other row: before and after its first checkpoint."""

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

LONGER = {"gem": {"epochs": 8}, "a_gem": {"epochs": 8}}
"""Until the second task's gradient turns against the first one's, so that there is something to hold back."""

GENTLER = {"gere": {"learning_rate": 0.1}}
"""With smaller steps, so that rounding takes no state across a margin."""

EVEN = {"moe_lora": {"batch_size": 8, "micro_batch_size": 4}}
"""Load balance is that of a micro-batch, so that it must be the same one."""

TOLERANCE = 2e-3
"""Of weights, beside the largest of their tensor, and of loss terms."""


def rows() -> list[tuple[str, str]]:
    """(method, tuner): each method with its first tuner or full, those that take any with LoRA, too; each tuner."""
    own = [(name, name_of(tuner_of(name))) for name in METHODS]
    with_lora = [(name, "lora") for name, cls in METHODS.items() if not cls.tuners]
    return sorted({*own, *with_lora, *(("sequential", name) for name in TUNERS)})


def name_of(tuner: Any) -> str:
    return tuner["name"] if isinstance(tuner, dict) else tuner


def config_of(
    folder: Path, engine: str | None, processes: int, method: str, tuner: str, **training: Any
) -> dict[str, Any]:
    """A run of a method on an engine; None: one process, whatever there are."""
    output = folder / f"{engine or 'one'}-{processes}" / f"{method}-{tuner}"
    own = tuner_of(method)
    chosen = own if name_of(own) == tuner else LORA if tuner == "lora" else {"name": tuner} | TUNERS.get(tuner, {})
    settings = TRAINING | LONGER.get(method, {}) | GENTLER.get(method, {}) | EVEN.get(tuner, {})
    settings |= {"engine": engine} | training
    return configuration(folder, output, method, case(method).options, chosen, 0, settings)


def prepare(folder: Path) -> Path:
    """The texts that some methods rehearse."""
    (folder / "general.txt").write_text(GENERAL)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    return folder


def launch(configs: list[dict[str, Any]], processes: int, folder: Path, *what: object) -> None:
    """Run the configurations in so many processes; one that fails leaves error.txt, and the rest are begun again.

    Args:
        what: the worker does beside: see engine_worker.py.
    """
    left = configs
    while left:
        path = folder / f"configs-{os.getpid()}.json"
        path.write_text(json.dumps(left))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(WORKER), str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        subprocess.run([*command, *map(str, what)], env=environment, capture_output=True, check=False)
        if "kill" in what:
            return
        first, *later = [config for config in left if not done(config)] or [None]
        if first is not None and not error(first):
            Path(first["output"]).mkdir(parents=True, exist_ok=True)
            Path(first["output"], "error.txt").write_text("it ended without saying why")
        left = [config for config in later if not error(config)]


def broken(config: dict[str, Any]) -> dict[str, Any]:
    """The run that goes on from a copy of this one."""
    return config | {"output": f"{config['output']}-broken"}


def trains(config: dict[str, Any]) -> bool:
    return Path(config["output"], "events.jsonl").exists()


def done(config: dict[str, Any]) -> bool:
    return Path(config["output"], "report.html").exists()


def error(config: dict[str, Any]) -> str:
    path = Path(config["output"], "error.txt")
    return path.read_text() if path.exists() else ""


@dataclass
class Apart:
    """How far two runs lie apart.

    Attributes:
        weights: of both stages, as a share of the largest of their tensor.
        terms: of the loss, and of the gradient's norm, as a share of it.
        scores: whether the score matrices and the general figures are equal.
        error: of the run that failed.
    """

    weights: float
    terms: float
    scores: bool
    error: str = ""

    @property
    def equal(self) -> bool:
        return not self.error and self.scores and max(self.weights, self.terms) <= TOLERANCE

    def __or__(self, other: Apart) -> Apart:
        """The worse of both."""
        weights, terms = max(self.weights, other.weights), max(self.terms, other.terms)
        return Apart(weights, terms, self.scores and other.scores, self.error or other.error)


def logged(run: Path, stage: int) -> list[dict[str, float]]:
    """Each step's loss terms, and the norm of its gradient."""
    events = [event for event in read_jsonl(run / "events.jsonl") if event["stage"] == stage]
    return [event["terms"] | {"norm": event["grad_norm"]} for event in events]


def apart(one: dict[str, Any], other: dict[str, Any]) -> Apart:
    """Compare the results of two configurations."""
    for config in (one, other):
        if not done(config):
            return Apart(0, 0, False, error(config) or "it did not end")
    first, second = (Path(config["output"]) for config in (one, other))
    found = Apart(0.0, 0.0, True)
    for stage in sorted(path.name for path in first.glob("stages/*")):
        theirs = weights(second, stage)
        for name, w in weights(first, stage).items():
            if w.shape != theirs[name].shape:
                return Apart(0, 0, False, f"{name}: {w.shape} and {theirs[name].shape}")
            if w.numel():
                far = float((w.double() - theirs[name].double()).abs().max() / w.double().abs().max().clamp(min=1e-3))
                found.weights = max(found.weights, far)
        if not trains(one):
            continue
        index = int(stage[:2])
        for ours, theirs_now in zip(logged(first, index), logged(second, index), strict=True):
            assert ours.keys() == theirs_now.keys(), (ours, theirs_now)
            shares = [abs(value - theirs_now[name]) / max(abs(value), 1e-2) for name, value in ours.items()]
            found.terms = max([found.terms, *shares])
    matrices = [json.loads((path / "matrix.json").read_text()) for path in (first, second)]
    found.scores = matrices[0]["scores"] == matrices[1]["scores"] and matrices[0]["general"] == matrices[1]["general"]
    return found


Cell = tuple[str, str, str]
"""(method, tuner, engine)."""


def compare(folder: Path, cells: Iterable[Cell], processes: int = 2) -> dict[Cell, Apart]:
    """Run what is asked for on its engine, continue it in one process from what lay on the disk in the last stage, and
    compare both with one process; runs that stand in the folder stay."""
    pairs = {
        (method, tuner, engine): (
            config_of(folder, None, 1, method, tuner),
            config_of(folder, engine, processes, method, tuner),
        )
        for method, tuner, engine in cells
    }
    alone = {one["output"]: one for one, _ in pairs.values()}
    launch([config for config in alone.values() if not done(config)], 1, folder)
    trained = {cell: broken(pair[1]) for cell, pair in pairs.items() if trains(pair[0])}
    for engine in dict.fromkeys(engine for *_, engine in pairs):  # each in processes of its own
        for parity, step in enumerate(BREAKS):
            cells = [(m, t, e) for m, t, e in pairs if e == engine and rows().index((m, t)) % 2 == parity]
            whole = [pairs[cell][1] for cell in cells]
            launch([config for config in whole if not done(config)], processes, folder, "copy", step)
        rest = [config for cell, config in trained.items() if cell[2] == engine]
        launch([config for config in rest if not done(config)], 1, folder)
    found = {cell: apart(*pair) for cell, pair in pairs.items()}
    return found | {cell: found[cell] | apart(pairs[cell][0], config) for cell, config in trained.items()}


PAGE = """\
# Which method runs on which engine

<!-- Written by `PYTHONPATH=tests python -m support.engine_table > docs/engines.md`, from runs. -->

*yes*: two processes on this engine give the numbers of one process with the same global batch, after two stages of a
tiny model. The final weights of both stages, every logged loss term and the gradient's norm agree to {tolerance:g} of
their size; the score matrix is equal. The same holds for one process that continues on this engine from a
checkpoint in the last stage. The last step of an epoch is uneven: the processes share its rows, and none is dropped or
repeated. (`moe_lora` has even steps only, since its load balance is that of a micro-batch.) The number in brackets is
the largest difference. These runs train with plain SGD at a constant rate; AdamW's checkpoints have tests of their own
(`tests/engines`). `tests/whole/test_engines.py` runs a selection of this table in `make test`, all of it in
`make test-all` (about 50 minutes on two cores). It also tests gradient accumulation, bfloat16, three processes, and a
run that loses a process and is continued by three.
[The engines, and how to start them](launch.md).

{table}
"""


def page(found: dict[Cell, Apart], seconds: float) -> str:
    """docs/engines.md, of what was found in each cell."""
    lines = ["| method | tuner | " + " | ".join(f"`{engine}`" for engine in ENGINES) + " |"]
    lines.append("|---" * (len(ENGINES) + 2) + "|")
    for row in rows():
        cells = []
        for engine in ENGINES:
            cell = found[(*row, engine)]
            far = max(cell.weights, cell.terms)
            cells.append(f"yes ({far:.0e})" if cell.equal else f"**no** {cell.error[:80]}")
        lines.append(f"| `{row[0]}` | `{row[1]}` | " + " | ".join(cells) + " |")
    spent = f" (about {seconds / 60:.0f} minutes on two cores)" if seconds else ""
    return PAGE.format(tolerance=TOLERANCE, seconds=spent, table="\n".join(lines))


def main() -> None:
    folder = prepare(Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()))
    started = time.monotonic()
    found = compare(folder, [(*row, engine) for engine in ENGINES for row in rows()])
    print(page(found, time.monotonic() - started), end="")


if __name__ == "__main__":
    main()
