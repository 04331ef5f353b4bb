"""Learn each month's file into one model, in order; a file that was learned already is known again and costs nothing.

usage: python examples/learn-every-month.py FOLDER-OF-FILES RUN MODEL

for example: python examples/learn-every-month.py docs/tutorials runs/support HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys
from pathlib import Path

import holdfast

folder, run, model = sys.argv[1:]
for file in sorted(Path(folder).glob("*.csv")):
    holdfast.learn(file, into=run, model=model)

for stage in holdfast.status(run)["stages"]:
    learned, cost = stage["learned"], stage["general_loss"]  # None: not measured
    gained = "not measured" if learned is None else f"{learned:+.3f}"
    print(f"{stage['task']}: learned {gained}, the general loss {'not measured' if cost is None else f'{cost:+.1%}'}")
