"""Do the runs of the table that are missing, and make its table and figures from those that are done.

usage: python experiments/published_model/table.py run SWEEP.yaml [KEY=VALUE ...] [--minutes M]
       python experiments/published_model/table.py show

A finished run leaves a line in results.jsonl beside this file: what differs it from the others, its figures, scores,
general abilities, times and memory. A run that has a line is not done again, whatever became of its directory, so the
table grows over several machines and days. `holdfast sweep SWEEP.yaml` does the same runs, and keeps their directories.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from pathlib import Path
from typing import Any

from holdfast.lab.derived import interval
from holdfast.runner.run import run
from holdfast.sweep.plan import PlannedRun, expand, load_sweep
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from holdfast.system.quiet import silence_libraries

HERE = Path(__file__).parent
RESULTS = HERE / "results.jsonl"


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run")
    runs.add_argument("sweep", type=Path)
    runs.add_argument("overrides", nargs="*")
    runs.add_argument("--minutes", type=float, default=math.inf, help="begin no run after so many minutes")
    commands.add_parser("show")
    options = parser.parse_args()
    if options.command == "run":
        work(options.sweep, options.overrides, time.monotonic() + 60 * options.minutes)
    else:
        show()


def work(sweep: Path, overrides: list[str], deadline: float) -> None:
    """Do the runs of a sweep that have no line yet, one after another."""
    silence_libraries()
    for planned in expand(load_sweep(sweep, overrides)):
        if time.monotonic() > deadline:
            return
        if (sweep.stem, planned.name) in {(line["sweep"], line["run"]) for line in lines()}:
            continue
        run(planned.config, Progress(quiet=True))
        line = facts(sweep.stem, planned)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(planned.name, line["summary"], flush=True)


def lines() -> list[dict[str, Any]]:
    """The lines of results.jsonl."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()]


def facts(sweep: str, planned: PlannedRun) -> dict[str, Any]:
    """The line of a finished run."""
    record, matrix = (read_json(planned.path / name) for name in ("run.json", "matrix.json"))
    return {
        "sweep": sweep,
        "run": planned.name,
        "columns": planned.columns,
        "seed": planned.config.seed,
        "tasks": matrix["tasks"],
        "summary": matrix["summary"],
        "intervals": matrix["intervals"],
        "scores": matrix["scores"],
        "general": {name: [values[0], values[-1]] for name, values in matrix["general"].items()},
        "seconds": record["seconds"],
        "tokens": record["tokens"],
        "peak_memory_gib": record["peak_memory_gib"],
        "versions": record["versions"],
    }


def show() -> None:
    """Print the table, means over seeds, and write it as table.csv."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines():
        method = line["columns"]["method"]
        groups.setdefault((line["sweep"], method if isinstance(method, str) else json.dumps(method)), []).append(line)
    abilities = list(dict.fromkeys(name for line in lines() for name in line["general"]))
    figures = ["learned", "average", "forgetting", "backward_transfer"]
    table = [["sweep", "method", "seeds", *figures, *(f"change of {name}" for name in abilities), "minutes", "GiB"]]
    for (sweep, method), same in groups.items():
        cells = [sweep, method, str(len(same))]
        cells += [spread([one["summary"][key] for one in same]) for key in figures]
        cells += [spread([change(one, name) for one in same]) for name in abilities]
        cells.append(spread([sum(one["seconds"].values()) / 60 for one in same]))
        cells.append(spread([one["peak_memory_gib"] for one in same]))
        table.append(cells)
    for cells in table:
        print(" | ".join(cells))
    with (HERE / "table.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)


def change(line: dict[str, Any], name: str) -> float | None:
    """What a general ability changed by; of a perplexity, of its logarithm, in nats a token."""
    first, last = line["general"].get(name, (None, None))
    if first is None or last is None:
        return None
    return math.log(last / first) if name.startswith("perplexity") else last - first


def spread(values: list[float | None]) -> str:
    """A mean and its 95 % interval over seeds (Student's t)."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, half = interval(known)
    return f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else "")


if __name__ == "__main__":
    main()
