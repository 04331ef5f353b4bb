"""A run that goes on from what lies on the disk ends as the unbroken one, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import holdfast.runner.loop
from holdfast.system.progress import Progress
from support.guards import responses, same, terms, weights


def run(config: dict[str, Any]) -> dict[str, Any]:
    """The matrix of a run."""
    return holdfast.runner.loop.run(config, Progress(quiet=True))


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
