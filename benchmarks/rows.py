"""Memory and processor time of a task's rows, before training: read, tokenised, and tokenised at a second start.

    python benchmarks/rows.py --model FOLDER --rows 20000

Rows are invented, of about 90 characters. Each case is a process of its own; memory is its largest resident size beyond
that with the libraries and the tokenizer. ``lists`` is how rows below the threshold lie.
``--length`` gives the first row so many characters more. ``--against SRC`` measures other code of holdfast, too, in
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

WORDS = ("the", "a", "tide", "holds", "fast", "to", "what", "it", "knew", "moves", "sea", "weed", "rock", "year", "was")
MIB = 1024


def write_rows(file: Path, count: int, length: int = 0) -> None:
    """Questions of twelve words and a number, and answers of one; the first question has ``length`` characters more."""
    chance = random.Random(file.stem)
    with file.open("w", encoding="utf-8") as lines:
        for number in range(count):
            prompt = f"{' '.join(chance.choices(WORDS, k=12))} {file.stem} {number}?"
            prompt += " tide" * (length // 5) if number == 0 else ""
            lines.write(json.dumps({"prompt": prompt, "answer": chance.choice(WORDS)}) + "\n")


def measure(folder: Path, model: str, case: str) -> None:
    """Print what one case takes."""
    import holdfast.runner.check  # noqa: F401 - what a command imports, too
    from holdfast.config.run import RunConfig
    from holdfast.data import arrow_rows, on_disk
    from holdfast.runner.data import load_data
    from holdfast.runner.rows import encode_tasks
    from holdfast.runner.setup import build_encoder, resolve
    from holdfast.system.collection import no_collection

    if case == "lists":
        for module in (arrow_rows, on_disk):
            module.LARGE_ROWS = module.LARGE_TEXT = sys.maxsize
    cache = str(folder / "cache") if case.startswith("cache") else None
    values = {"model": model, "stream": {"path": str(folder.parent / "task")}, "output": str(folder / "out")}
    config = resolve(RunConfig.model_validate(values | {"data": {"cache": cache}}))
    encoder = build_encoder(config)
    with no_collection():  # what is here is of a command's start
        encoder.encode_all([])
    base, start = _peak(), _now()
    data = load_data(config.config)
    read, read_at = _peak(), _now()
    encode_tasks(data.stream, encoder, config.config)
    print(
        f"{case}: read {read - base:.0f} MiB, {_took(start, read_at)}; "
        f"with tokens {_peak() - base:.0f} MiB, {_took(read_at, _now())}"
    )


def _now() -> tuple[float, float]:
    """Seconds of all processors, and of the clock."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter()


def _took(start: tuple[float, float], end: tuple[float, float]) -> str:
    return f"{end[0] - start[0]:.1f} s of processors in {end[1] - start[1]:.1f} s"


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a model with a tokenizer")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=["lists", "memory", "cache, first start", "cache, second start"])
    parser.add_argument("--against", type=Path, metavar="SRC", help="folder src of another checkout")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        measure(asked.folder, asked.model, asked.case)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "task").mkdir()
        write_rows(folder / "task" / "train.jsonl", asked.rows, asked.length)
        write_rows(folder / "task" / "test.jsonl", 50)
        sides = ({"other": asked.against} if asked.against else {}) | {"own": None}
        for case, (side, source) in product(asked.cases * asked.rounds, sides.items()):
            own = ["--model", asked.model, "--case", case, "--folder", str(folder / side)]
            env = os.environ | ({} if source is None else {"PYTHONPATH": str(source.resolve())})
            (folder / side).mkdir(exist_ok=True)
            if case.endswith("first start"):
                shutil.rmtree(folder / side / "cache", ignore_errors=True)
            print(f"{side}, ", end="", flush=True)
            subprocess.run([sys.executable, __file__, *own], check=True, env=env)
        print(f"file of rows: {sum(f.stat().st_size for f in (folder / 'own' / 'cache').glob('*')) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
