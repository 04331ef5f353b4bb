"""Runs of configurations on engines: one start of the processes does many jobs, one after another."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from holdfast.errors import ProcessFailed, UserError
from holdfast.runner.run import run
from holdfast.system import launch as launcher
from holdfast.system.progress import Progress

WORKER = Path(__file__).with_name("engine_worker.py")

Config = dict[str, Any]


def job(config: Config, **what: Any) -> dict[str, Any]:
    """A run; what is done beside it: see engine_worker.py."""
    return {"config": config} | what


def alone(configs: Sequence[Config]) -> None:
    """Run the configurations that are not done in this process."""
    for config in configs:
        if not done(config):
            run(config, Progress(quiet=True))
            gc.collect()
            gc.freeze()  # what was imported since


def launch(jobs: Sequence[dict[str, Any]], processes: int, folder: Path) -> None:
    """Do the jobs that are not done in so many processes; one that fails leaves error.txt, and the rest begin again."""
    left = [one for one in jobs if not done(one["config"])]
    while left:
        path = folder / f"jobs-{os.getpid()}.json"
        path.write_text(json.dumps(left), encoding="utf-8")
        said = "it ended without saying why"
        try:
            with patch.object(launcher, "COMMAND", [sys.executable]):
                launcher.launch([str(WORKER), str(path)], processes, quiet=True)
        except (UserError, ProcessFailed) as failed:
            said = str(failed)
        first, *later = [one for one in left if not done(one["config"])] or [None]
        if first is not None:
            output = Path(first["config"]["output"])
            output.mkdir(parents=True, exist_ok=True)
            (output / "error.txt").write_text(said, encoding="utf-8")
        left = later


def follows(config: Config, name: str, engine: str | None = None) -> Config:
    """The configuration of a run that goes on from a copy of this one, on its engine or another."""
    training = config["training"] if engine is None else config["training"] | {"engine": engine}
    return config | {"output": f"{config['output']}-{name}", "training": training}


def copy_of(config: Config) -> str:
    """Where a job leaves its copy."""
    return f"{config['output']}-copy"


def done(config: Config) -> bool:
    return Path(config["output"], "report.html").exists()


def error(config: Config) -> str:
    """Why a run did not end; empty where it did."""
    path = Path(config["output"], "error.txt")
    return path.read_text(encoding="utf-8") if path.exists() and not done(config) else ""
