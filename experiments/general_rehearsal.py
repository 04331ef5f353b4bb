"""Does rehearsal of general text help? Three seeds of every loss: scores on the tasks, and general ability.

usage: python experiments/general_rehearsal.py OUTPUT [--config RUN.yaml] [--seeds 0 1 2] [--methods NAME ...]
       python experiments/general_rehearsal.py OUTPUT --table [--against NAME]

Without --config the stream is chronicle, whose model is pretrained here and whose general text is that of pretraining.
With it, the stream and model are those of a run's configuration. The text of its pretraining is not available, so the
model itself writes the general text before training; a part of it is only measured.

Every run can be resumed and is done once, so several processes may share the work by --seeds. --table prints the runs
that are done: the mean over seeds with its 95 % interval (Student's t). --against prints the mean difference from a
method, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from holdfast.config.reading import read_yaml
from holdfast.config.run import load_config
from holdfast.data.streams.chronicle.stream import general_text
from holdfast.lab.demo import SIZE, configuration, make_model
from holdfast.lab.derived import interval
from holdfast.runner.run import run
from holdfast.system.progress import Progress
from holdfast.system.quiet import silence_libraries

FIGURES = ("average", "new_task", "forgetting", "general_change")
TEXTS, HELD_OUT, TOKENS = 330, 60, 160  # texts that a model writes about itself


def methods(texts: Path) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The method and the changes of the training settings, by name."""
    general = {"path": str(texts), "ratio": 0.5, "samples": 1000, "max_tokens": 64}
    replay = {"name": "replay", "capacity": 600, "ratio": 1.0}
    return {
        "sequential": ("sequential", {}),
        "sequential, learning rate / 3": ("sequential", {"learning_rate": 7e-4}),
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
    """Do the runs that are missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", help="all where absent", metavar="NAME", choices=[*methods(Path())])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--against", choices=[*methods(Path())], metavar="NAME")
    options = parser.parse_args()
    if options.table:
        print(table(options.output, options.seeds, options.against))
        return
    silence_libraries()
    torch.set_num_threads(1)
    progress = Progress(quiet=True)
    for seed in options.seeds:
        texts = options.output / f"texts-{seed}.txt"
        for name, (method, training) in methods(texts).items():
            if options.methods and name not in options.methods:
                continue
            output = directory(options.output, name, seed)
            if options.config:
                config = on_config(read_yaml(options.config), options.output, texts, output, seed, method)
            else:
                config = on_chronicle(options.output, texts, output, seed, method, progress)
            config["training"] |= training
            summary = run(load_config(config), progress)["summary"]
            print(seed, name, {key: summary[key] for key in FIGURES}, flush=True)


def on_chronicle(folder: Path, texts: Path, output: Path, seed: int, method: Any, progress: Progress) -> dict[str, Any]:
    """A run on the built-in stream, with the text of the model's pretraining."""
    model = folder / f"model-{seed}"
    if not model.exists():
        make_model(model, seed, progress)
    if not texts.exists():
        texts.write_text("\n".join(general_text(size=SIZE, seed=seed)), encoding="utf-8")
    return configuration(model, output, seed, method)


def on_config(
    config: dict[str, Any], folder: Path, texts: Path, output: Path, seed: int, method: Any
) -> dict[str, Any]:
    """A run of a configuration, with text that its model wrote; the first texts are only measured, never rehearsed."""
    measure = folder / f"measure-{seed}.txt"
    if not measure.exists():
        written = write_texts(config["model"], seed)
        folder.mkdir(parents=True, exist_ok=True)
        texts.write_text("\n".join(written[HELD_OUT:]), encoding="utf-8")
        measure.write_text("\n".join(written[:HELD_OUT]), encoding="utf-8")
    evaluation = dict(config.get("evaluation", {}))
    evaluation["general"] = [*evaluation.get("general", []), {"name": "own", "path": str(measure)}]
    return config | {"method": method, "seed": seed, "output": str(output), "evaluation": evaluation}


def write_texts(model: str, seed: int) -> list[str]:
    """Let a model write texts without a prompt, at temperature 1; each becomes one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    writer, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    set_seed(seed)
    begin = torch.full((TEXTS + HELD_OUT, 1), writer.config.bos_token_id)
    tokens = writer.generate(
        begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, top_p=1.0, max_new_tokens=TOKENS
    )
    return [" ".join(text.split()) for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def directory(output: Path, name: str, seed: int) -> Path:
    """The directory of a run."""
    return output / f"{name.replace(' ', '').replace('/', '-').replace(',', '-')}-{seed}"


def table(output: Path, seeds: list[int], against: str | None = None) -> str:
    """Mean over seeds and its 95 % interval, as Markdown; ``against``: of the differences from that method."""
    base = {} if against is None else figures(output, against, seeds)
    lines: list[str] = []
    for name in methods(Path()):
        by_seed = figures(output, name, seeds)
        if not by_seed:
            continue
        keys = list(next(iter(by_seed.values())))
        if not lines:
            lines = [f"| method (seeds) | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
        cells = []
        for key in keys:
            values = {seed: summary[key] for seed, summary in by_seed.items() if summary[key] is not None}
            if against is not None:
                values = {s: v - base[s][key] for s, v in values.items() if s in base and base[s][key] is not None}
            cells.append(cell(list(values.values()), logarithmic=key.startswith("perplexity")))
        lines.append(f"| {name} ({len(by_seed)}) | {' | '.join(cells)} |")
    return "\n".join(lines)


def figures(output: Path, name: str, seeds: list[int]) -> dict[int, dict[str, Any]]:
    """The summary of each run that is done, by seed, with the logarithms of the perplexities at its end."""
    by_seed = {}
    for seed in seeds:
        path = directory(output, name, seed) / "matrix.json"
        if path.exists():
            matrix = json.loads(path.read_text(encoding="utf-8"))
            if matrix["summary"]["average"] is None:  # the run is not done
                continue
            last = {k: v[-1] for k, v in matrix["general"].items() if k.startswith("perplexity") and v[-1] is not None}
            summary = {key: matrix["summary"][key] for key in FIGURES}
            by_seed[seed] = summary | {key: math.log(value) for key, value in last.items()}
    return by_seed


def cell(values: list[float], logarithmic: bool = False) -> str:
    """Mean [low, high]; of logarithms, their exponentials."""
    if not values:
        return "–"
    mean, half = interval(values)
    bounds = [mean] if half is None else [mean, mean - half, mean + half]
    shown = [f"{math.exp(v):.3g}" if logarithmic else f"{v:.2f}".replace("-", "−") for v in bounds]
    return shown[0] + (f" [{shown[1]}, {shown[2]}]" if len(shown) > 1 else "")


if __name__ == "__main__":
    main()
