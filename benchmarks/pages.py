"""What a page and a comparison of many runs of many tasks take, and how that grows: exponents over three sizes.

    python benchmarks/pages.py

Runs are invented, with the files that a run writes: responses, score matrix, records, manifest. Each command is a
process of its own, whose processor time counts, its start included; peak memory is its largest resident size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.records.statistics import FILE, Statistics, file_content, maker
from holdfast.scoring import find
from holdfast.system.files import jsonl_file, read_json, write_json
from holdfast.system.manifest import MANIFEST, file_facts, text_facts

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.synthetic_runs import make_run

WORDS = ("the", "a", "tide", "holds", "fast", "to", "what", "it", "knew", "moves", "sea", "weed", "rock", "year", "was")
METHODS = ("sequential", "replay", "ewc", "lwf")
VARIANTS = 4
"""Files of responses of each score; a run's cells are links to them."""


class Pool:
    """Files of responses to the same questions, of every score."""

    def __init__(self, folder: Path, rows: int):
        self.rows, self.facts, self.statistics = rows, {}, {}
        self._files: dict[tuple[int, int], Path] = {}
        chance = random.Random(0)
        folder.mkdir()
        scorer = find("accuracy")

        def text(words: int) -> str:
            return " ".join(chance.choices(WORDS, k=words))

        questions = [(text(30), text(3)) for _ in range(rows)]
        for right in range(rows + 1):
            for variant in range(VARIANTS):
                places = set(chance.sample(range(rows), right))
                lines = [
                    {"row": i, "prompt": prompt, "answer": answer}
                    | {"response": answer if i in places else text(4), "score": float(i in places)}
                    for i, (prompt, answer) in enumerate(questions)
                ]
                file = self._files[right, variant] = folder / f"{right}-{variant}.jsonl"
                file.write_text(jsonl_file(lines), encoding="utf-8")
                inode = file.stat().st_ino
                facts = self.facts[inode] = text_facts(jsonl_file(lines))
                self.statistics[inode] = Statistics(maker(scorer), facts["sha256"], scorer.statistics(lines))
        self._chance = random.Random(1)

    def respond(self, file: Path, accuracy: float) -> float:
        """Link a file of about an accuracy to its place; its score."""
        right = round(accuracy * self.rows)
        file.parent.mkdir(parents=True, exist_ok=True)
        os.link(self._files[right, self._chance.randrange(VARIANTS)], file)
        return right / self.rows


def make(root: Path, pool: Pool, tasks: int, count: int, seeds: int) -> list[Path]:
    """Directories of runs, of which as many as ``seeds`` differ in their seed alone."""
    names = [f"task {j:03d}" for j in range(tasks)]
    paths = []
    for k in range(count):
        group, seed = divmod(k, seeds)
        path = make_run(
            root / f"run-{k:04d}",
            METHODS[group % len(METHODS)],
            seed=seed,
            rows=pool.rows,
            events=40,
            tasks=names,
            respond=pool.respond,
            training={"learning_rate": 1e-5 * (1 + group // len(METHODS))},
        )
        _complete(path, names, pool)
        paths.append(path)
    return paths


def _complete(path: Path, names: Sequence[str], pool: Pool) -> None:
    """Add what a real run has, too: records of its stages, general abilities and the manifest."""
    record = read_json(path / "run.json")
    stage = {"config": record["config"], "fingerprint": "0" * 64, "versions": record["versions"]}
    stage |= {"started": record["started"], "finished": record["finished"]}
    record["stages"] = [{"stage": t, "task": name} | stage for t, name in enumerate(names, start=1)]
    write_json(path / "run.json", record)
    for t, folder in enumerate(sorted((path / "stages").iterdir())):
        evaluated: dict[str, Any] = {"general": {"lasting facts": 0.6}, "seconds": 1.0}
        write_json(folder / "evaluation.json", evaluated)
        responses = folder.glob("responses/*.jsonl")
        found = {file.stem: pool.statistics[file.stat().st_ino] for file in responses}
        (folder / FILE).write_bytes(file_content(found))
        if t:
            learned = {"stage": t, "task": names[t - 1], "steps": 400, "seconds": 1.5}
            write_json(folder / "stage.json", learned | {"tokens": 2500, "peak_memory_gib": 1.5, "weights": "0" * 64})
    with (path / MANIFEST).open("w", encoding="utf-8") as manifest:
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            if file.name not in (MANIFEST, "events.jsonl"):
                facts = pool.facts.get(file.stat().st_ino) or file_facts(file)
                manifest.write(json.dumps({"path": str(file.relative_to(path)), "files": {"": facts}}) + "\n")


@dataclass(frozen=True)
class Taken:
    """What a command took: seconds of processor time, GiB of memory at its peak, MB of the page that it wrote."""

    seconds: float
    memory: float
    page: float


def take(arguments: Sequence[str], page: Path | None = None) -> Taken:
    """Run a command of holdfast in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import resource, sys; from holdfast.cli import main\n"
        "try: main()\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Taken(seconds, int(done.stderr.split()[-1]) / 2**20, 0 if page is None else page.stat().st_size / 1e6)


def measure(folder: Path, pool: Pool, command: str, tasks: int, count: int, seeds: int) -> Taken:
    """What a command takes of runs that are made for it."""
    made, page = folder / "runs", folder / "page.html"
    runs = [str(path) for path in make(made, pool, tasks, count, seeds)]
    taken = take(["report", *runs, "--output", str(page)], page) if command == "report" else take(["compare", *runs])
    shutil.rmtree(made)  # a file can have so many links and no more
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20, help="test rows of a task")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes")
    asked = parser.parse_args()
    series = {
        "report, 20 runs, by tasks": [("report", tasks, 20, 5) for tasks in (25, 50, 100)],
        "report, 100 tasks, by runs": [("report", 100, runs, 5) for runs in (5, 10, 20)],
        "compare, 8 tasks, by runs": [("compare", 8, runs, 5) for runs in (250, 500, 1000)],
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pool = Pool(folder / "pool", asked.rows)
        for title, cases in series.items():
            print(title)
            found = []
            for command, tasks, runs, seeds in cases:
                size = max(2, round(tasks * asked.scale)), max(seeds, round(runs * asked.scale))
                found.append(measure(folder, pool, command, *size, seeds))
                one = found[-1]
                print(
                    f"  {size[0]} tasks, {size[1]} runs: {one.seconds:.2f} s, {one.memory:.2f} GiB, {one.page:.1f} MB",
                    flush=True,
                )
            growth = math.log(found[-1].seconds / found[0].seconds) / math.log(4)
            print(f"  exponent of the time: {growth:.2f}")


if __name__ == "__main__":
    main()
