"""Does `keep` hold its budget, and what does it cost? Budgets against a sweep of fixed strengths, on chronicle.

usage: python experiments/keep.py OUTPUT [--seeds 0 1 2] [--only fixed | keep]
       python experiments/keep.py OUTPUT --model FOLDER --text FILE.jsonl [...]
       python experiments/keep.py OUTPUT --figure PICTURE.png

A small model is pretrained on a quarter of chronicle's general text and learns two years, while half of that text is
rehearsed with KL to the model before training; the last quarter says what was lost. Every run differs in the strength
of that rehearsal alone: a fixed weight, or a budget. With --model, an instruct model learns the first of these years
with LoRA, and pieces of the file's texts are rehearsed; others say what was lost.

Every run can be resumed and is done once, so several processes may share the work. --figure prints the table, draws
the frontier and writes its numbers into a JSON file beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from holdfast.config.run import load_config
from holdfast.data.streams.chronicle.stream import general_text
from holdfast.data.tokens.file import build_tokens
from holdfast.lab.demo import PRETRAINING
from holdfast.lab.derived import interval
from holdfast.lab.pretrain import pretrain
from holdfast.lab.tokenizer import train_tokenizer
from holdfast.runner.run import run
from holdfast.system.files import whole_folder, write_json, write_jsonl, write_text
from holdfast.system.progress import Progress
from holdfast.system.quiet import silence_libraries

SIZE, YEARS = 60, [2022, 2023]
WORLDS, JOINED = 4, 3
"""Of chronicle, whose general text the small model knows, and the sentences of them that are a text."""
MODEL = {"width": 64, "depth": 2, "head_size": 32, "mlp_width": 192, "tie_embeddings": True}
BUDGETS = [0.5, 1, 2, 5, 10]  # percent
STRENGTHS = [0, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
TEXT = "perplexity/watched"
"""What says what was lost."""
WORDS, PIECES = 20, 3000  # of the texts of an instruct model, and how many there are


def main() -> None:
    """Do the runs that are missing, or draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", choices=["fixed", "keep"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    if options.figure:
        draw(options.output, options.seeds, options.figure)
        return
    silence_libraries()
    torch.set_num_threads(1)
    progress = Progress(quiet=True)
    for seed in options.seeds:
        if options.model:
            start = instruct_start(options.output, options.model, options.text)
        else:
            start = pretrained_start(options.output, seed, progress)
        for kind, amounts in (("keep", BUDGETS), ("fixed", STRENGTHS)):
            for amount in amounts if options.only in (None, kind) else ():
                output = directory(options.output, kind, amount, seed)
                matrix = run(load_config(configuration(start, output, seed, kind, amount)), progress)
                print(seed, kind, amount, facts(output, matrix), flush=True)


def pretrained_start(output: Path, seed: int, progress: Progress) -> dict[str, Any]:
    """What runs of the small model have in common; it is pretrained, and the texts are written."""
    sentences = [t for world in range(WORLDS) for t in general_text(size=SIZE, years=YEARS, seed=seed + 1000 * world)]
    texts = [" ".join(sentences[i : i + JOINED]) for i in range(0, len(sentences), JOINED)]
    return {
        "model": str(make_model(output / f"model-{seed}", texts[0::4], seed, progress)),
        "stream": {"name": "chronicle"},
        "tuner": "full",
        "training": {"epochs": 4, "batch_size": 16, "learning_rate": 2e-3, "warmup": 0.1},
        "evaluation": {"batch_size": 128, "bootstrap": 200},
    } | write_texts(output / f"texts-{seed}", texts[1::2], texts[2::4])


def write_texts(folder: Path, rehearsed: list[str], watched: list[str]) -> dict[str, str]:
    """Their files."""
    files = {}
    for name, texts in (("rehearsed", rehearsed), ("watched", watched)):
        files[name] = str(folder / f"{name}.txt")
        write_text(folder / f"{name}.txt", "\n".join(texts))
    return files


def make_model(folder: Path, texts: list[str], seed: int, progress: Progress) -> Path:
    """A Llama of 160,000 parameters, pretrained on texts."""
    if folder.exists():
        return folder
    work = folder.with_name(f"pretrain-{seed}")
    write_jsonl(work / "text.jsonl", [{"text": text} for text in texts])
    tokenizer = train_tokenizer(texts, vocab_size=1024, model_max_length=PRETRAINING["context"])
    build_tokens([work / "text.jsonl"], work / "tokens", tokenizer)
    settings = PRETRAINING | {"model": MODEL, "seed": seed, "data": str(work / "tokens"), "output": str(work / "run")}
    pretrain(settings, progress)
    with whole_folder(folder) as partial:
        shutil.copytree(work / "run" / "model", partial, dirs_exist_ok=True)
    return folder


def instruct_start(output: Path, model: Path, file: Path) -> dict[str, Any]:
    """What runs of an instruct model have in common; the pieces of the texts are written."""
    texts = []
    for line in file.read_text("utf-8").splitlines():
        words = json.loads(line)["text"].split()
        texts += [" ".join(words[i : i + WORDS]) for i in range(0, len(words) - WORDS + 1, WORDS)]
    texts = texts[:: max(1, len(texts) // PIECES)]
    return {
        "model": str(model),
        "stream": {"name": "chronicle", "order": [str(YEARS[0])]},
        "tuner": {"name": "lora", "r": 16},
        "training": {"max_steps": 40, "batch_size": 4, "learning_rate": 2e-3, "warmup": 0.1},
        "evaluation": {"bootstrap": 200},
    } | write_texts(output / "texts", texts[0::2], texts[1::16])


def configuration(start: dict[str, Any], output: Path, seed: int, kind: str, amount: float) -> dict[str, Any]:
    """A run with a fixed weight of rehearsal, or with a budget in percent."""
    rehearsal = {
        "name": "rehearsal",
        "source": "general",
        "loss": "kl",
        "teacher": "start",
        "path": start["rehearsed"],
        "ratio": 0.5,
        "max_tokens": 64,
    }
    config = {
        "model": start["model"],
        "tuner": start["tuner"],
        "method": rehearsal,
        "stream": start["stream"] | {"options": {"size": SIZE, "years": YEARS, "seed": seed}},
        "training": start["training"],
        "evaluation": start["evaluation"] | {"general": [{"name": "watched", "path": start["watched"]}]},
        "seed": seed,
        "output": str(output),
    }
    if kind == "keep":
        config["keep"] = {"general": f"{amount:g}%", "on_fail": "continue"}
    elif amount:
        rehearsal["weight"] = amount
    else:
        config["method"] = "sequential"
    return config


def directory(output: Path, kind: str, amount: float, seed: int) -> Path:
    """The directory of a run."""
    return output / f"{kind}-{amount:g}-{seed}"


def facts(output: Path, matrix: dict[str, Any]) -> dict[str, Any]:
    """What a run learned and lost.

    Returns:
        ``learned``, a fraction; ``rise`` of the loss on held-out text, in percent; of a budget ``measured``, the rise
        in percent as the run itself measured it last, ``kept`` after every stage, and ``share`` of each update.
    """
    losses = [math.log(value) for value in matrix["general"][TEXT]]
    result = {
        "learned": matrix["summary"]["learned"],
        "new_task": matrix["summary"]["new_task"],
        "forgetting": matrix["summary"]["forgetting"],
        "rise": 100 * (losses[-1] / losses[0] - 1),
    }
    stages = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(output.glob("stages/*/stage.json"))]
    if verdicts := [stage["keep"] for stage in stages if stage.get("keep")]:
        [last] = verdicts[-1]["constraints"]
        budget = float(output.name.split("-")[1])
        result["measured"] = budget * last["lost"] / last["budget"]
        result["kept"] = all(verdict["kept"] for verdict in verdicts)
        result["share"] = [verdict["share"] for verdict in verdicts]
        result["multiplier"] = [verdict["constraints"][0]["multiplier"] for verdict in verdicts]
    return result


def collect(output: Path, seeds: list[int]) -> dict[str, dict[float, dict[int, dict[str, Any]]]]:
    """:func:`facts` of every run that is done, [kind][amount][seed]."""
    found: dict[str, dict[float, dict[int, dict[str, Any]]]] = {"keep": {}, "fixed": {}}
    for kind, amounts in (("keep", BUDGETS), ("fixed", STRENGTHS)):
        for amount in amounts:
            for seed in seeds:
                path = directory(output, kind, amount, seed)
                if (path / "report.html").exists():
                    matrix = json.loads((path / "matrix.json").read_text(encoding="utf-8"))
                    found[kind].setdefault(amount, {})[seed] = facts(path, matrix)
    return found


def draw(output: Path, seeds: list[int], picture: Path) -> None:
    """Print the table, draw the frontier, and write its numbers beside the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = collect(output, seeds)
    lines = ["| strength | learned | rise of the loss, % | kept |", "|---|---|---|---|"]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for kind, marker, colour in (("fixed", "o", "#50545c"), ("keep", "D", "#0068a8")):
        points = []
        for amount, by_seed in found[kind].items():
            learned, rise = ([one[key] for one in by_seed.values()] for key in ("learned", "rise"))
            (mean, half), (lost, spread) = interval(learned), interval(rise)
            points.append((lost, mean, spread or 0.0, half or 0.0, amount))
            kept = [one["rise"] <= amount for one in by_seed.values()]
            name = f"keep {amount:g} %" if kind == "keep" else f"weight {amount:g}"
            shown = f"{sum(kept)} of {len(kept)}" if kind == "keep" else ""
            lines.append(f"| {name} | {mean:.3f} ± {half or 0:.3f} | {lost:.2f} ± {spread or 0:.2f} | {shown} |")
        x, y, dx, dy, amounts = zip(*points, strict=True)
        label = "budgets of keep" if kind == "keep" else "fixed weights"
        axes.errorbar(x, y, dy, dx, marker + "-", color=colour, label=label, capsize=2, linewidth=1)
        for lost, mean, amount in zip(x, y, amounts, strict=True):
            text = f"{amount:g}%" if kind == "keep" else f"{amount:g}"
            side = (-6, 8) if kind == "keep" else (5, -11)
            axes.annotate(text, (lost, mean), textcoords="offset points", xytext=side, fontsize=8, color=colour)
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter(pyplot.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("lost: rise of the loss on held-out general text, %")
    axes.set_ylabel("learned")
    axes.legend()
    figure.savefig(picture, dpi=130)
    print("\n".join(lines))
    write_json(picture.with_suffix(".json"), {"budgets in %": found["keep"], "fixed weights": found["fixed"]})


if __name__ == "__main__":
    main()
