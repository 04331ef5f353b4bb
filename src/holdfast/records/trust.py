"""What a run's own record would make this machine do, beyond reading: it may be somebody else's.

Whoever calls `holdfast run` gives the configuration, and trusts it. Whoever is handed a run's directory has not read
the configuration that its run.json holds.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from holdfast.config.run import RunConfig
from holdfast.errors import ConfigError

HERE = ("localhost", "127.0.0.1", "::1")


def require_trust(run: Path, config: RunConfig, trust: bool, *, measures: bool = False) -> None:
    """Refuse a run whose record names code, unless it is trusted.

    Args:
        run: its directory.
        config: what its run.json holds.
        trust: the user trusts whoever wrote the directory.
        measures: the run's tasks and general abilities will be measured, too.

    Raises:
        ConfigError: the message lists what would be run.
    """
    found = [] if trust else _code(config) + (_of_measures(config) if measures else [])
    if found:
        listed = "".join(f"\n  {line}" for line in found)
        raise ConfigError(
            f"{run}: its run.json asks for more than reading:{listed}\n"
            "if you trust whoever wrote this directory and these files, add --trust"
        )


def _code(config: RunConfig) -> list[str]:
    found = [f"method: runs the Python file {method.name}" for method in config.method if method.name.endswith(".py")]
    found += [
        f"stream.tasks: reward: runs the function {task.reward}"
        for task in config.stream.tasks or []
        if task.reward not in (None, "exact_match")
    ]
    if config.model.trust_remote_code:
        found.append(f"model.trust_remote_code: runs the Python code that comes with {config.model.name}")
    return found


def _of_measures(config: RunConfig) -> list[str]:
    found = [
        f"evaluation.general: include_path: runs functions that task definitions in {one.include_path} name"
        for one in config.evaluation.general or []
        if one.include_path is not None
    ]
    judge = config.evaluation.judge
    if judge is not None and judge.key_variable in os.environ and urlsplit(judge.url).hostname not in HERE:
        found.append(f"evaluation.judge: sends the key in {judge.key_variable} to {judge.url}")
    return found
