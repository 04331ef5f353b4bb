"""Memory and processor time of a task's rows, before training: read, tokenised, and tokenised at a second start.

    python benchmarks/rows.py --model FOLDER --rows 20000

Rows are invented, of about 90 characters. Each case is a process of its own; memory is its largest resident size beyond
that with the libraries and the tokenizer. ``lists`` is how rows below the threshold lie.
``--length`` gives the first row so many characters more.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
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
    values = {"model": model, "stream": {"path": str(folder / "task")}, "output": str(folder / "out")}
    config = resolve(RunConfig.model_validate(values | {"data": {"cache": cache}}))
    encoder = build_encoder(config)
    with no_collection():  # what is here is of a command's start
        encoder.encode_all([])
    base, start = _peak(), time.process_time()
    data = load_data(config.config)
    read, read_at = _peak(), time.process_time()
    encode_tasks(data.stream, encoder, config.config)
    taken = f"{_peak() - base:.0f} MiB, {time.process_time() - read_at:.1f} s"
    print(f"{case}: read {read - base:.0f} MiB, {read_at - start:.1f} s; with tokens {taken}")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a model with a tokenizer")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--length", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=["lists", "memory", "cache, first start", "cache, second start"])
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
        for case in asked.cases:
            own = ["--model", asked.model, "--case", case, "--folder", str(folder)]
            subprocess.run([sys.executable, __file__, *own], check=True)
        print(f"file of rows: {sum(f.stat().st_size for f in (folder / 'cache').glob('*')) / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
