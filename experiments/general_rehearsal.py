"""Does rehearsal of general text help? chronicle, three seeds: tasks and general ability under each loss.

usage: python experiments/general_rehearsal.py OUTPUT [--seeds 0 1 2] [--table]

Every run is resumable and nothing is done twice, so several processes may share the work by --seeds. --table prints
what is there: mean over seeds, with the smallest and the largest value.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from holdfast.config import load_config
from holdfast.data.chronicle import general_text
from holdfast.demo import SIZE, configuration, make_model
from holdfast.progress import Progress
from holdfast.quiet import quieten
from holdfast.runner import run

FIGURES = ("average", "new_task", "forgetting", "general_change")


def methods(texts: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Method and changed training settings by name."""
    general = {"path": str(texts), "ratio": 0.5, "samples": 1000, "max_tokens": 64}
    replay = {"name": "replay", "capacity": 600, "ratio": 1.0}
    return {
        "sequential": ("sequential", {}),
        "sequential, learning rate / 10": ("sequential", {"learning_rate": 2e-4}),
        "replay": (replay, {}),
        **{name: ({"name": name} | general, {}) for name in ("gere_ce", "gere_kl", "gere_l1", "gere_l2")},
        "gere, weight 1": ({"name": "gere", "weight": 1.0} | general, {}),
        "gere, weight 100": ({"name": "gere", "weight": 100.0} | general, {}),
        "gere, dynamic": ({"name": "gere", "weight": "dynamic"} | general, {}),
        "replay + gere_kl": ([replay, {"name": "gere_kl"} | general], {}),
        "joint": ("joint", {}),
    }


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(options.output, options.seeds))
        return
    quieten()
    torch.set_num_threads(1)
    progress = Progress(quiet=True)
    for seed in options.seeds:
        model, texts = options.output / f"model-{seed}", options.output / f"texts-{seed}.txt"
        if not model.exists():
            make_model(model, seed, progress)
        texts.write_text("\n".join(general_text(size=SIZE, seed=seed)), encoding="utf-8")
        for name, (method, training) in methods(texts).items():
            config = configuration(model, directory(options.output, name, seed), seed, method)
            config["training"] |= training
            summary = run(load_config(config), progress)["summary"]
            print(seed, name, {key: summary[key] for key in FIGURES}, flush=True)


def directory(output: Path, name: str, seed: int) -> Path:
    """Where a run goes."""
    return output / f"{name.replace(' ', '').replace('/', '-').replace(',', '-')}-{seed}"


def table(output: Path, seeds: list[int]) -> str:
    """Mean over seeds, smallest and largest, as Markdown."""
    lines = [f"| method | {' | '.join(FIGURES)} | perplexity at the end |", "|---" * (len(FIGURES) + 2) + "|"]
    for name in methods(Path()):
        found = [
            json.loads(path.read_text(encoding="utf-8"))
            for seed in seeds
            if (path := directory(output, name, seed) / "matrix.json").exists()
        ]
        if not found:
            continue
        cells = [_cell([m["summary"][key] for m in found]) for key in FIGURES]
        last = [m["general"]["perplexity/chronicle"][-1] for m in found]
        lines.append(f"| {name} ({len(found)}) | {' | '.join(cells)} | {_cell(last)} |")
    return "\n".join(lines)


def _cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ({min(known):.2f}..{max(known):.2f})" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{spread}".replace("-", "−")


if __name__ == "__main__":
    main()
