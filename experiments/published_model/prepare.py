"""Lay out the data of the table: four classification tasks with dev splits, texts to rehearse and to watch, questions.

usage: python experiments/published_model/prepare.py SHARED [OUTPUT]

SHARED holds `cl_benchmark` (O-LoRA's CL_Benchmark and its instructions), `general` (c4_demo.jsonl, wiki_demo.txt) and
`multiple_choice` (LLM-Adapters' ARC-Easy and boolq). OUTPUT, runs/published_model/data where absent, gets the first
rows of each. The dev rows are train rows that no run trains on.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

TASKS = {"dbpedia": "TC", "agnews": "TC", "SST-2": "SC", "QQP": "QQP"}
ROWS = {"train": 64, "dev": 32, "test": 40}
QUESTIONS = 60
WORDS, PIECES, WATCHED = 40, 400, 60  # of the pieces of web text, how many are rehearsed, and how many watched
ARTICLES, BEGINNING = 16, 90  # of the encyclopedia: how many, and the words of each


def main() -> None:
    """Write all files."""
    shared = Path(sys.argv[1])
    output = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/published_model/data")
    for task, group in TASKS.items():
        source, target = (root / "CL_Benchmark" / group / task for root in (shared / "cl_benchmark", output))
        train = json.loads((source / "train.json").read_text("utf-8"))
        write(target / "train.json", train[: ROWS["train"]])
        write(target / "dev.json", train[ROWS["train"] :][: ROWS["dev"]])
        write(target / "test.json", json.loads((source / "test.json").read_text("utf-8"))[: ROWS["test"]])
        shutil.copy(source / "labels.json", target / "labels.json")
    shutil.copy(shared / "cl_benchmark" / "instruction_config.json", output / "instruction_config.json")
    for name in ("ARC-Easy", "boolq"):
        lines = (shared / "multiple_choice" / name / "test.jsonl").read_text("utf-8").splitlines()
        (output / f"{name}.jsonl").write_text("\n".join(lines[:QUESTIONS]) + "\n", "utf-8")
    pieces = []
    for line in (shared / "general" / "c4_demo.jsonl").read_text("utf-8").splitlines():
        words = json.loads(line)["text"].split()
        pieces += [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]
    pieces = pieces[:: len(pieces) // (PIECES + WATCHED)]
    (output / "web-rehearsed.txt").write_text("\n".join(pieces[:PIECES]), "utf-8")
    (output / "web-watched.txt").write_text("\n".join(pieces[PIECES : PIECES + WATCHED]), "utf-8")
    articles = (shared / "general" / "wiki_demo.txt").read_text("utf-8").splitlines()[:ARTICLES]
    (output / "wiki.txt").write_text("\n".join(" ".join(text.split()[:BEGINNING]) for text in articles), "utf-8")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSON file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=0), "utf-8")


if __name__ == "__main__":
    main()
