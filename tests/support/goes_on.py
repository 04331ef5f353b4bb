"""Runs of methods on a kind of model: each goes on from what lies on the disk, and ends as unbroken, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import holdfast.runner.run
from holdfast.system.progress import Progress
from support.guards import GENERAL, case, responses, same, terms, tuner_of, weights, with_paths

LORA = {"name": "lora", "r": 2, "lora_dropout": 0.1}
STEPS = {"max_steps": 3, "save_every": 2, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1, "warmup": 0}


def write_texts(folder: Path) -> None:
    """The general texts that methods rehearse, in both forms."""
    (folder / "general.txt").write_text(GENERAL)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))


def check_method(
    cls: Any,
    more: dict[str, Any],
    config_of: Callable[..., dict[str, Any]],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A method trains, saves and goes on, with the options that guard it and ``more``; one without stages answers.

    Args:
        config_of: the configuration of a run from a folder, the run's directory, the method and the tuner.
    """
    tuner, options = tuner_of(cls.name), with_paths(case(cls.name).options | more, folder)
    config = config_of(folder, tmp_path, {"name": cls.name} | options, LORA if isinstance(tuner, dict) else tuner)
    if last := {"none": "", "joint": "01-joint", "sequence": "02-green"}[cls.schedule]:
        check_goes_on(config, tmp_path, monkeypatch, last)
    else:
        assert None not in run(config)["scores"][0]


def run(config: dict[str, Any]) -> dict[str, Any]:
    """The matrix of a run."""
    return holdfast.runner.run.run(config, Progress(quiet=True))


def check_goes_on(config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    """What lies on the disk at the third step of the last stage, after a checkpoint, goes on to the same end."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    watch = holdfast.runner.stage.StageWatch.on_step_end

    def copying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch(self, args, state, control, **kwargs)
        if Path(args.output_dir).parent.name == last and state.global_step == 3:
            shutil.copytree(whole, broken)

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", copying)
        matrix = run(config | {"output": str(whole)})
    assert None not in matrix["scores"][0] + matrix["scores"][-1]
    assert run(config | {"output": str(broken)}) == matrix
    assert same(weights(broken, last), weights(whole, last)) and weights(whole, last)
    stage = int(last[:2])
    assert responses(broken) == responses(whole) and terms(broken, stage) == terms(whole, stage)
    for path in whole.glob("stages/*/method/*.safetensors"):
        assert same(load_file(broken / path.relative_to(whole)), load_file(path)), path.name
