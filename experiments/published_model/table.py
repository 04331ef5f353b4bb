"""Do the runs of the table that are missing, and make its table and figures from those that are done.

usage: python experiments/published_model/table.py run SWEEP.yaml [KEY=VALUE ...] [--minutes M]
       python experiments/published_model/table.py show

A finished run leaves a line in results.jsonl beside this file: what differs it from the others, its figures, scores,
general abilities, times and memory. A run that has a line is not done again, whatever became of its directory, so the
table grows over several machines and days. `holdfast sweep SWEEP.yaml` does the same runs, and keeps their directories.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from holdfast.lab.derived import interval
from holdfast.runner.loop import run
from holdfast.sweep.plan import PlannedRun, expand, load_sweep
from holdfast.system.files import read_json, write_text
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
    """Print a table of each sweep, means over its seeds, and write it as table.csv."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines():
        columns = {key: value for key, value in line["columns"].items() if key != "seed"}
        rows.setdefault((line["sweep"], json.dumps(columns, sort_keys=True)), []).append(line)
    heads = ["sweep", "run", "seeds", "learned", "average", "backward_transfer", "general", "minutes", "GiB"]
    table = [",".join(heads)]
    for (sweep, columns), same in rows.items():
        cells = [sweep, columns.replace('"', "'"), str(len(same))]
        cells += [spread([one["summary"][key] for one in same]) for key in ("learned", "average", "backward_transfer")]
        names = same[0]["general"]
        cells.append("; ".join(f"{name} {spread([change(one, name) for one in same])}" for name in names))
        cells.append(spread([sum(one["seconds"].values()) / 60 for one in same]))
        cells.append(spread([one["peak_memory_gib"] for one in same]))
        print(" | ".join(cells))
        table.append(",".join(f'"{cell}"' for cell in cells))
    write_text(HERE / "table.csv", "\n".join(table) + "\n")


def change(line: dict[str, Any], name: str) -> float | None:
    """What a general ability changed by; of a perplexity, of its logarithm, in nats a token."""
    first, last = line["general"][name]
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
