"""The processor seconds of commands that do little: what their start costs, beside that of the libraries alone.

    python benchmarks/starts.py --rounds 3

Each is a process of its own, in turns; user and system time count. The job is a model of a few thousand parameters and
two tasks of 32 rows. A run's fixed cost is what is left of a run of four optimizer steps without them: what a step
costs is the slope to a run of forty-four.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.tiny import tiny_model, tiny_tokenizer

LOADED = (
    "from transformers import AutoConfig, AutoTokenizer as T; AutoConfig.from_pretrained('m'); T.from_pretrained('m')"
)
LIBRARIES = {
    "import torch": ["-c", "import torch"],
    "a tokenizer and a configuration, loaded by transformers": ["-c", LOADED],
    "import of transformers.trainer": ["-c", "import transformers.trainer"],
}
COMMANDS = {
    "status": ["status", "done"],
    "gate": ["gate", "done", "--max-forgetting", "1"],
    "report": ["report", "done", "-o", "page.html"],
    "compare": ["compare", "done", "done", "--allow-different"],
    "check": ["check", "run.yaml"],
    "run, 4 steps": ["run", "run.yaml"],
    "run, 44 steps": ["run", "run.yaml", "training.epochs=11"],
}


def make_job(folder: Path) -> None:
    """A model, a stream and a configuration."""
    tiny_model().save_pretrained(folder / "m")
    tiny_tokenizer().save_pretrained(folder / "m")
    for task in ("a", "b"):
        (folder / "data" / task).mkdir(parents=True)
        for split, count in (("train", 32), ("test", 8)):
            rows = [{"prompt": f"what is {task} and {i}?", "answer": str(i)} for i in range(count)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "data" / task / f"{split}.jsonl").write_text(text, encoding="utf-8")
    lines = ("model: m", "method: replay", "tuner: lora", "stream: {path: data}", "training: {batch_size: 16}")
    (folder / "run.yaml").write_text("\n".join([*lines, "output: out", ""]), encoding="utf-8")


def seconds(arguments: list[str], folder: Path) -> float:
    """Processor seconds of a Python process.

    Raises:
        RuntimeError: it failed; a gate that does not pass, since nothing is learned, has not.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{arguments}: {done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    cases = LIBRARIES | {name: ["-m", "holdfast", *line] for name, line in COMMANDS.items()}
    taken: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_job(folder)
        seconds(["-m", "holdfast", "run", "run.yaml", "output=done"], folder)
        for turn in range(asked.rounds):
            for name, arguments in cases.items():
                more = [f"output=out-{turn}-{len(name)}"] if name.startswith("run") else []
                taken[name].append(seconds([*arguments, *more], folder))
    for name, all_of in taken.items():
        print(f"| {name} | {statistics.median(all_of):.2f} ({min(all_of):.2f}..{max(all_of):.2f}) |")
    short, long = (statistics.median(taken[name]) for name in ("run, 4 steps", "run, 44 steps"))
    print(f"| run, without its steps | {short - (long - short) / 10:.2f} |")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
