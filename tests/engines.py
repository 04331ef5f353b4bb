"""Runs configurations one after another in processes that train together; the tests of engines start it by torchrun.

usage: torchrun --nproc-per-node N engines.py CONFIGS.json: a list of configurations. One that fails leaves error.txt in
its output, beside which the others go on.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from holdfast.process import Process
from holdfast.progress import Progress
from holdfast.runner import run

if __name__ == "__main__":
    torch.set_num_threads(1)
    for config in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        error = None
        try:
            run(config, Progress(quiet=True))
        except Exception:
            error = traceback.format_exc()
        errors = [e for e in Process.this().all(error) if e]
        if errors and Process.this().main:
            Path(config["output"]).mkdir(parents=True, exist_ok=True)
            Path(config["output"], "error.txt").write_text(errors[0])
