"""Published tables: every sweep is valid, its figures are read, and ours stand beside them; the tiny ones run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.config.run import load_config
from holdfast.data.streams.definition import find
from holdfast.errors import DataError
from holdfast.records.read import read_run, read_runs
from holdfast.report.published import beside_published, mean_drop, read_published
from holdfast.runner.setup import prepare, resolve
from holdfast.sweep.plan import Resources, check, expand, load_sweep
from holdfast.sweep.work import finish, local_workers, work_off
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from support.paths import ROOT
from support.synthetic_runs import STAGES, TASKS, make_run

SHARED = ROOT.parent / "shared" / "data"
SWEEPS = sorted(ROOT.glob("experiments/published/*/*/*.yaml"))
SHORT = {
    "gere-fifteen_tasks-tiny": "[CB, yahoo]",
    "tree_lora-fifteen_tasks-tiny": "[FOMC, QQP]",
    "tree_lora-trace-tiny": "[NumGLUE-cm, MeetingBank]",
}
"""Some of a stream's tasks, where the test does not run all."""

PATHS = {
    "MeetingBank": str(SHARED / "trace" / "LLM-CL-Benchmark_Reasoning" / "MeetingBank"),
    "yahoo": str(SHARED / "cl_benchmark" / "substitutes" / "yahoo_2class"),
}
"""Where tasks lie that the data lack in their usual places."""

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data (../shared/data) are not here")


def name(path: Path) -> str:
    return "-".join([*path.parts[-3:-1], path.stem])


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_figures_are_those_of_the_matrix_in_the_papers_unit(tmp_path):
    run = read_run(make_run(tmp_path / "replay", "replay"))
    T, S = STAGES, run.scores
    task = TASKS[0]
    file = write(
        tmp_path / "published.csv",
        "method,replay.ratio,figure,value,unit,source\n"
        "replay,0.25,average,50,%,table 1\nreplay,,mean_drop,1,,table 1\nreplay,,general/lasting facts,0.5,,table 2\n"
        f"replay,,score/{task},70,%,table 2\nreplay,0.5,average,90,%,another ratio\newc,,average,90,%,another method\n"
        "replay,,score/no such task,1,%,table 2\n",
    )
    rows = beside_published([run], read_published(file))
    assert [row["published"] for row in rows] == [50, 1, 0.5, 70, 1]
    assert rows[0]["ours"] == pytest.approx(100 * sum(S[T]) / T)
    assert rows[0]["difference"] == pytest.approx(rows[0]["ours"] - 50)
    assert rows[1]["ours"] == pytest.approx(sum(S[j + 1][j] - S[T][j] for j in range(T)) / T) == mean_drop(run)
    assert rows[2]["ours"] == run.matrix["general"]["lasting facts"][-1]
    assert rows[3]["ours"] == pytest.approx(100 * S[T][0])
    assert rows[4]["ours"] is None and rows[4]["difference"] is None


def test_ours_is_the_mean_over_seeds_and_is_printed(tmp_path):
    runs = [make_run(tmp_path / f"run-{seed}", seed=seed) for seed in (0, 1)]
    file = write(tmp_path / "published.csv", "method,figure,value,unit,source\nsequential,average,50,%,table 1\n")
    [row] = beside_published(read_runs(runs), read_published(file))
    averages = [read_json(run / "matrix.json")["summary"]["average"] for run in runs]
    assert row["ours"] == pytest.approx(50 * sum(averages))
    said = CliRunner().invoke(app, ["compare", *map(str, runs), "--published", str(file)]).output
    line = next(line for line in said.splitlines() if "50.00" in line)
    assert f"{row['ours']:.2f}" in line and f"{row['difference']:+.2f}" in line and "average %" in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,figure,valu,unit,source\nreplay,average,1,%,t\n", "line 2: there is no column 'value'; did you mean"),
        ("figure,value,unit,source\naverage,much,%,t\n", "value: must be a number, not 'much'"),
        ("figure,value,unit,source\naverage,1,percent,t\n", "unit: must be % or empty, not 'percent'"),
    ],
)
def test_a_wrong_file_is_told_of(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_published(write(tmp_path / "published.csv", text))


@pytest.mark.parametrize("path", SWEEPS, ids=name)
def test_every_sweep_expands_and_its_figures_are_about_its_runs(path, monkeypatch):
    sweep = load_sweep(path)
    runs = expand(sweep)
    assert runs and sweep.published
    published = read_published(Path(sweep.published))
    known = {(run.config.method[0].name, run.config.model.name) for run in runs}
    if path.stem != "tiny":
        models = {model for _, model in known}
        for entry in published:
            if entry.where.get("model.name", next(iter(models))) in models:
                assert entry.where["method"] in {method for method, _ in known}, entry


def test_a_base_is_changed_key_by_key(tmp_path):
    write(
        tmp_path / "base.yaml",
        json.dumps({"output": "a", "run": {"x": {"y": 1, "z": 2}}, "grid": {"p": [1], "q": [2]}}),
    )
    path = write(tmp_path / "top.yaml", json.dumps({"base": "base.yaml", "run": {"x.y": 3}, "grid": {"p": [4]}}))
    sweep = load_sweep(path)
    assert (sweep.output, sweep.run, sweep.grid) == ("a", {"x": {"y": 3, "z": 2}}, {"p": [4], "q": [2]})


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("path", [p for p in SWEEPS if p.stem != "tiny"], ids=name)
def test_every_table_is_valid_at_the_published_scale(path, monkeypatch):
    """Given the data: here a part of them, with a model and rows that are at hand."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for run in expand(load_sweep(path)):
        values = run.config.model_dump(exclude={"seed", "output"})
        values["model"] = {"name": str(SHARED / "models" / "stories260K" / "hf")}
        values["data"] |= {"max_length": 470, "long_answers": "cut", "train_rows": 8, "test_rows": 2}
        values["evaluation"]["max_new_tokens"] = min(values["evaluation"]["max_new_tokens"] or 32, 32)
        if values["stream"]["name"] == "continual_news":
            values["stream"] = {"name": "chronicle", "options": {"size": 4}}
        else:
            tasks = {task.name for task in find(values["stream"]["name"]).tasks}
            paths = {task: path for task, path in PATHS.items() if task in tasks}
            values["stream"] |= {"path": str(SHARED), "paths": paths}
        for measure in values["evaluation"]["general"] or []:
            measure |= {"path": str(SHARED / "mmlu/test.jsonl"), "demonstrations": str(SHARED / "mmlu/dev.jsonl")}
        for method in values["method"]:
            if "path" in method:
                method["path"] = str(SHARED / "general" / "c4_demo.jsonl")
        key = json.dumps(values, sort_keys=True)
        if key not in seen:
            prepare(resolve(load_config(values | {"output": "unused"})))
        seen.add(key)


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("path", [p for p in SWEEPS if p.stem == "tiny"], ids=name)
def test_every_table_runs_at_tiny_scale(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    check(expand(load_sweep(path, [f"output={tmp_path}"])))
    shorter = [f"run.stream.order={SHORT[name(path)]}"] if name(path) in SHORT else []
    runs = expand(load_sweep(path, [f"output={tmp_path}", *shorter]))
    with local_workers(Resources(), 1) as workers:
        ended = work_off(runs, workers, Progress(quiet=True))
    assert [end.state for end in ended] == ["done"] * len(runs), [end.why for end in ended if end.why]
    report = finish(ended, tmp_path)
    assert report is not None and report.page.exists()
    assert {run.method for run in report.runs} == {run.config.method[0].name for run in runs}
