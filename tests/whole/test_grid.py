"""Every tuner with every method: what goes together trains, continues, evaluates and saves; the rest is refused.

The whole grid is slow; `make test` takes a selection in which every tuner and every method stands.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import holdfast.runner.run
from holdfast import methods, tuners
from holdfast.cli import main
from holdfast.config.run import RunConfig
from holdfast.errors import ConfigError
from holdfast.methods import compatibility
from holdfast.runner.setup import resolve
from holdfast.system.progress import Progress
from support.guards import GENERAL, case, configuration, responses, same, terms, weights
from support.paths import DOCS
from support.tiny import write_model, write_tasks

PAGE = DOCS / "grid.md"
STEPS = {"max_steps": 3, "save_every": 2, "learning_rate": 1e-2, "warmup": 0, "schedule": "constant"}
OPTIONS = {"gere": {"multiple": 0.1}}  # thresholds that three steps reach
CELLS = compatibility.grid()
METHODS = {method: methods.find(method) for method, _ in CELLS}
TUNERS = list(tuners.known())
REFUSED = [cell for cell, reason in CELLS.items() if reason]


def selected() -> set[tuple[str, str]]:
    """Each method with one tuner; those that take any go through all tuners in turn."""
    bound = {(m, METHODS[m].tuners[0]) for m in METHODS if METHODS[m].tuners}
    free = [m for m in METHODS if not METHODS[m].tuners]
    return bound | {(m, TUNERS[i % len(TUNERS)]) for i, m in enumerate(free)}


SELECTED = selected()
RUN = [
    pytest.param(*cell, id="-".join(cell), marks=[] if cell in SELECTED else pytest.mark.slow)
    for cell, reason in CELLS.items()
    if not reason
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("grid")
    write_model(path / "model")
    write_tasks(path / "tasks", ("red", "green"), train=16, test=2)
    (path / "general.txt").write_text(GENERAL)
    (path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    gc.collect()
    gc.freeze()  # each stage of each cell collects garbage, and would look at every imported module again
    yield path
    gc.unfreeze()


def cell_configuration(folder: Path, output: Path, method: str, tuner: str) -> dict[str, Any]:
    options = case(method).options | OPTIONS.get(method, {})
    config = configuration(folder, output, method, options, tuner, 0, STEPS)
    del config["training"]["epochs"]
    return config | {"evaluation": {"max_new_tokens": 2, "bootstrap": 0}}


def run(config: dict[str, Any]) -> dict[str, Any]:
    return holdfast.runner.run.run(config, Progress(quiet=True))


@pytest.mark.parametrize(("method", "tuner"), RUN)
def test_a_cell_trains_evaluates_saves_and_continues(method, tuner, folder, tmp_path, monkeypatch):
    """What lies on the disk at the last step of the last stage, after a checkpoint, goes on to the same end."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    stages = {"none": [], "joint": ["01-joint"], "sequence": ["01-red", "02-green"]}[METHODS[method].schedule]
    watch = holdfast.runner.stage.StageWatch.on_step_end

    def copying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        watch(self, args, state, control, **kwargs)
        if Path(args.output_dir).parent.name == stages[-1] and state.global_step == 3:
            shutil.copytree(whole, broken)

    with monkeypatch.context() as patch:
        patch.setattr(holdfast.runner.stage.StageWatch, "on_step_end", copying)
        matrix = run(cell_configuration(folder, whole, method, tuner))
    assert None not in matrix["scores"][0] + matrix["scores"][-1]
    assert sorted(path.name for path in whole.glob("stages/*"))[1:] == stages
    if not stages:
        return
    assert all(weights(whole, stage) for stage in stages)
    assert len(stages) == 1 or not same(weights(whole, stages[0]), weights(whole, stages[1]))
    assert (broken / "stages" / stages[-1] / "checkpoint" / "checkpoint-2" / "complete.json").exists()
    assert not (broken / "stages" / stages[-1] / "stage.json").exists()
    assert run(cell_configuration(folder, broken, method, tuner)) == matrix
    assert same(weights(broken, stages[-1]), weights(whole, stages[-1]))
    assert responses(broken) == responses(whole)
    assert terms(broken, len(stages)) == terms(whole, len(stages))
    for path in whole.glob("stages/*/method/*.safetensors"):
        assert same(load_file(broken / path.relative_to(whole)), load_file(path)), path.name


@pytest.mark.parametrize(("method", "tuner"), REFUSED)
def test_a_refused_cell_is_refused_with_the_reason_and_what_would_work(method, tuner, folder, tmp_path):
    config = RunConfig(**cell_configuration(folder, tmp_path, method, tuner))
    cls = METHODS[method]
    with pytest.raises(
        ConfigError, match=f"^tuner: method '{method}' works with .*, not with '{tuner}', since "
    ) as said:
        resolve(config)
    assert cls.tuners_reason and str(said.value).endswith(cls.tuners_reason)
    assert all(name in str(said.value) and CELLS[method, name] is None for name in cls.tuners)


@pytest.mark.parametrize(
    ("method", "tuner"),
    [
        pytest.param(*cell, marks=[] if number in (0, len(TUNERS) // 2) else pytest.mark.slow)
        for method in METHODS
        for number, cell in enumerate(cell for cell in REFUSED if cell[0] == method)
    ],
)
def test_a_refused_cell_would_fail(method, tuner, folder, tmp_path, monkeypatch):
    """Without the table the run begins, and the method, which sees the model alone, says what it lacks."""
    monkeypatch.setattr(METHODS[method], "tuners", ())
    with pytest.raises(ConfigError, match=f"method '?{method}'?: needs "):
        run(cell_configuration(folder, tmp_path / "run", method, tuner))


@pytest.mark.parametrize("command", ["check", "run"])
def test_both_commands_refuse_a_wrong_pair(command, folder, tmp_path, monkeypatch, capsys):
    config = cell_configuration(folder, tmp_path / "out", "l2p", "ia3")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["holdfast", command, str(tmp_path / "run.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "works with prompt_pool" in " ".join(capsys.readouterr().err.split())


def test_the_selection_holds_every_method_and_every_tuner():
    assert {method for method, _ in SELECTED} == set(METHODS)
    assert {tuner for _, tuner in SELECTED} == set(TUNERS)
    assert len([p for p in RUN if not p.marks]) == len(SELECTED)


def test_the_page_is_what_is_declared():
    assert PAGE.read_text(encoding="utf-8") == compatibility.page(), (
        "python -m holdfast.methods.compatibility > docs/grid.md"
    )
