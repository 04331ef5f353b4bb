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
    print(f"{stage['task']}: learned {stage['learned']:+.3f}, cost the general loss {stage['general_loss']:+.1%}")
