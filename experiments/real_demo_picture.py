"""Draw what `holdfast demo --real` shows: a task, the quiz and the loss on own samples over the stages.

usage: python experiments/real_demo_picture.py RUNS PICTURE.png [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

COLOURS = {"sequential": "#b3261e", "protected": "#0068a8"}


def main() -> None:
    """Read both runs and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figure, panels = pyplot.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for name, colour in COLOURS.items():
        matrix = json.loads((options.runs / f"{name}-{options.seed}" / "matrix.json").read_text(encoding="utf-8"))
        stages = ["before", *matrix["tasks"]]
        columns = (
            [row[0] for row in matrix["scores"]],
            matrix["general"]["everyday"],
            [math.log(value) for value in matrix["general"]["perplexity/own"]],
        )
        for axes, values in zip(panels, columns, strict=True):
            axes.plot(stages, values, "o-", color=colour, label=name)
    titles = (f"facts of {stages[1]}: right answers", "everyday quiz: right answers", "own samples: loss, nats a token")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1)
    panels[1].set_ylim(0, 1)
    panels[1].axhline(0.25, color="#888888", linestyle=":", linewidth=1)
    panels[1].annotate("chance", (0, 0.27), fontsize=8, color="#666666")
    panels[0].legend(fontsize=8)
    figure.supxlabel("after stage", fontsize=9)
    figure.savefig(options.picture, dpi=120)


if __name__ == "__main__":
    main()
