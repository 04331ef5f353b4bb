"""Experiments: the grid of runs, sharing and resuming them, their tables, and what is found in those."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from holdfast.cli import app
from holdfast.errors import ConfigError
from holdfast.lab import experiment as lab
from holdfast.lab import work
from holdfast.lab.count import check_experiment
from holdfast.lab.findings import Finding, judge, markdown
from holdfast.lab.sources import Languages, data_of, dialect, write_dialects
from holdfast.lab.tables import read_table, select, write_table
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from support.paths import ROOT

EXPERIMENTS = ROOT / "experiments" / "lab"
QUIET = Progress(quiet=True)


def description(folder: Path, **changes):
    """Pretraining at two rates on one language, then another language with and without rehearsal of the first."""
    for name, words in (("old", "red blue green black"), ("new", "eins zwei drei vier")):
        lines = [{"text": f"{words} {words} {i} {words}"} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = {name: {"text": str(folder / f"{name}.jsonl"), "domain": name} for name in ("old", "new")}
    return {
        "title": "a test",
        "data": {"name": "texts", "vocab_size": 300, "learn": ["old", "new"], "files": files},
        "seeds": [3, 5],
        "old": "old",
        "new": "new",
        "matched": 5.6,
        "curves": True,
        "common": {
            "context": 16,
            "valid": {"old": "$old", "new": "$new"},
            "training": {"batch_size": 8},
            "evaluation": {"every": 256, "rows": 8},
        },
        "runs": {
            "pretrain": {
                "config": {
                    "model": {"width": 16, "depth": 1, "head_size": 8},
                    "data": "$old",
                    "training": {"learning_rate": 1e-2},
                    "stop": {"tokens": 1024},
                },
            },
            "finetune": {
                "from": "pretrain",
                "config": {"data": "$new", "stop": {"tokens": 768}},
                "grid": {
                    "training.learning_rate": [1e-2, 1e-3],
                    "method": {"none": {}, "mixed": {"data": ["$new", "$old"]}},
                },
            },
        },
        "figure": "method_comparison",
    } | changes


def planned(values):
    experiment = lab.load_experiment(values)
    return lab.expand(experiment, data_of(experiment.data, "test"))


def test_a_grid_is_the_product_of_its_columns_and_each_run_follows_its_model(tmp_path):
    runs = planned(description(tmp_path))
    assert [run.group for run in runs] == ["pretrain"] * 2 + ["finetune"] * 8
    assert [(run.seed, run.columns) for run in runs[2:6]] == [
        (3, {"learning_rate": 1e-2, "method": "none"}),
        (3, {"learning_rate": 1e-2, "method": "mixed"}),
        (3, {"learning_rate": 1e-3, "method": "none"}),
        (3, {"learning_rate": 1e-3, "method": "mixed"}),
    ]
    assert all(run.parent is runs[run.seed == 5] for run in runs[2:])
    assert runs[3].config["training"] == {"batch_size": 8, "learning_rate": 1e-2}
    assert runs[3].config["data"] == ["$new", "$old"]


def test_a_run_goes_on_from_each_model_that_where_and_match_leave(tmp_path):
    values = description(tmp_path)
    values["runs"]["pretrain"]["grid"] = {"model.width": [16, 32], "kind": {"a": {}, "b": {"stop": {"tokens": 512}}}}
    values["runs"]["finetune"] |= {"grid": {"kind": {"a": {}, "b": {}}}, "match": ["kind"], "where": {"width": 32}}
    runs = [run for run in planned(values) if run.group == "finetune" and run.seed == 3]
    assert [(run.columns, run.parent.columns) for run in runs] == [
        ({"pretrain_width": 32, "kind": kind}, {"width": 32, "kind": kind}) for kind in "ab"
    ]


def test_a_key_stands_for_all_that_a_result_depends_on(tmp_path):
    runs = planned(description(tmp_path))
    assert len({run.key for run in runs}) == len(runs)
    assert [run.key for run in planned(description(tmp_path))] == [run.key for run in runs]
    longer = description(tmp_path)
    longer["runs"]["pretrain"]["config"]["stop"] = {"tokens": 2048}
    assert not {run.key for run in planned(longer)} & {run.key for run in runs}
    other = description(tmp_path, matched=4.0, title="another question")
    assert [run.key for run in planned(other)] == [run.key for run in runs]


def test_wrong_names_are_told(tmp_path):
    values = description(tmp_path)
    values["runs"]["finetune"]["from"] = "pretraining"
    with pytest.raises(ConfigError, match=r"no group before it is 'pretraining'; did you mean 'pretrain'"):
        lab.load_experiment(values)
    values = description(tmp_path)
    values["runs"]["finetune"]["config"]["data"] = "$news"
    with pytest.raises(ConfigError, match=r"there is no '\$news' to read; did you mean 'new'"):
        check_experiment(lab.load_experiment(values))
    values = description(tmp_path)
    values["runs"]["finetune"]["config"]["trainin"] = {}
    with pytest.raises(ConfigError, match=r"finetune, .*did you mean 'training'"):
        check_experiment(lab.load_experiment(values))
    with pytest.raises(ConfigError, match="did you mean 'grid_2d'"):
        lab.find("grid2d", "tiny")
    with pytest.raises(ConfigError, match="no scale 'huge'; it has paper and tiny"):
        lab.find("grid_2d", "huge")


def test_experiments_that_an_installed_package_carries_are_found_anywhere(tmp_path, monkeypatch):
    """The results go below the cache, where the slices of an experiment find its table."""
    packaged = tmp_path / "site-packages" / "experiments"
    for name in ("grid_2d", "capacity_slices"):
        shutil.copytree(EXPERIMENTS / name, packaged / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lab, "PACKAGED", packaged)
    monkeypatch.setattr(lab, "CHECKOUT", tmp_path / "absent")
    assert list(lab.experiments()) == ["capacity_slices", "grid_2d"]
    path = lab.find("capacity_slices", "tiny")
    slices, grid = (lab.results_folder(lab.find(name, "tiny"), Path("cache")) for name in lab.experiments())
    assert grid == Path("cache/experiments/grid_2d/results/tiny")
    shutil.copytree(EXPERIMENTS / "grid_2d" / "results" / "tiny", grid)
    assert work.run_experiment(lab.load_experiment(path), slices, cache=Path("cache"), progress=QUIET)
    assert (slices / "results.csv").read_text() == (grid / "results.csv").read_text()
    (tmp_path / "experiments" / "lab" / "mine").mkdir(parents=True)
    (tmp_path / "experiments" / "lab" / "mine" / "tiny.yaml").touch()
    assert "mine" in lab.experiments()


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_experiment_validates_at_both_scales(path):
    experiment = lab.load_experiment(path)
    assert path.with_name("paper.yaml").exists()
    assert path.with_name("tiny.yaml").exists()
    assert experiment.findings
    costs = check_experiment(experiment)
    assert all(cost.runs > 0 for cost in costs)
    assert costs or experiment.regression or experiment.slices_of


def test_cost_counts_every_run(tmp_path):
    pretrain, finetune = check_experiment(lab.load_experiment(description(tmp_path)))
    assert (pretrain.runs, pretrain.tokens, finetune.runs, finetune.tokens) == (2, 2 * 1024, 8, 8 * 768)
    assert pretrain.parameters == finetune.parameters
    assert finetune.flops == 6 * 8 * 768 * pretrain.parameters[0]


def test_an_experiment_runs_once_and_shares_its_models(tmp_path):
    values, cache = description(tmp_path, seeds=[3]), tmp_path / "cache"
    values["runs"]["finetune"]["grid"] = {"method": {"none": {}, "mixed": {"data": ["$new", "$old"]}}}
    values["findings"] = [{"claim": "it forgets", "value": "forgetting", "where": {"method": "none"}}]
    experiment = lab.load_experiment(values)
    [finding] = work.run_experiment(experiment, tmp_path / "out", cache=cache, processes=1, progress=QUIET)
    results, curves = (read_table(tmp_path / "out" / name) for name in (work.RESULTS, work.CURVES))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        work.RESULTS, work.CURVES, "figure.pdf", "figure.png", "findings.json", "findings.md",
    }  # fmt: skip

    assert [(row["group"], row["method"], row["stop"]) for row in results] == [
        ("pretrain", None, "tokens"), ("finetune", "none", "tokens"), ("finetune", "mixed", "tokens"),
    ]  # fmt: skip
    for row in results:
        folder = cache / "runs" / f"{row['group']}-{row['run']}"
        measured = [e["domains"]["old"]["loss"] for e in read_jsonl(folder / "evaluations.jsonl")]
        line = [point["old_loss"] for point in select(curves, run=row["run"])]
        assert line == pytest.approx(measured, rel=1e-5)
        assert (row["old_start"], row["old_loss"]) == (line[0], line[-1])
        if row["group"] == "finetune":
            assert row["forgetting"] == pytest.approx(line[-1] - line[0], abs=1e-4)
            assert 0 <= row["compute_multiplier"] <= 1
    assert finding["estimate"] == select(results, method="none")[0]["forgetting"]

    times = {path: path.stat().st_mtime_ns for path in (cache / "runs").glob("*/*")}
    work.run_experiment(experiment, tmp_path / "again", cache=cache, processes=1, progress=QUIET)
    assert {path: path.stat().st_mtime_ns for path in (cache / "runs").glob("*/*")} == times
    values["runs"]["finetune"]["grid"] = {"method": {"slow": {"training": {"learning_rate": 1e-4}}}}
    work.run_experiment(lab.load_experiment(values), tmp_path / "other", cache=cache, processes=1, progress=QUIET)
    names = [path.name.partition("-")[0] for path in (cache / "runs").iterdir() if path.is_dir()]
    assert sorted(names) == ["finetune"] * 3 + ["pretrain"]


@pytest.mark.slow
def test_two_processes_get_what_one_gets(tmp_path):
    values = description(tmp_path, seeds=[3])
    tables = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        work.run_experiment(
            lab.load_experiment(values), out, cache=tmp_path / f"cache{processes}", processes=processes, progress=QUIET
        )
        tables.append([{k: v for k, v in row.items() if k != "seconds"} for row in read_table(out / "results.csv")])
    assert tables[0] == tables[1]


RUNS = [
    {"seed": seed, "method": method, "size": size, "loss": loss + bump, "stop": "loss"}
    for seed, bump in ((0, 0.0), (1, 0.1), (2, -0.1))
    for method, size, loss in (("none", 1, 2.0), ("none", 4, 1.0), ("kl", 1, 0.5), ("kl", 4, 0.25), ("real", 1, 0.2))
]


def test_a_difference_is_taken_seed_by_seed():
    claim = {"claim": "", "value": "loss", "where": {"method": "none", "size": 1}, "minus": {"method": "kl"}}
    found = judge(Finding(**claim), RUNS)
    assert found["estimate"] == pytest.approx(1.5)
    assert found["high"] - found["low"] == pytest.approx(0, abs=1e-12)  # what the seeds share is no uncertainty
    assert (found["seeds"], found["verdict"]) == (3, "holds")
    assert judge(Finding(**claim, above=1.6), RUNS)["verdict"] == "does not hold"
    assert judge(Finding(**claim, below=1.6), RUNS)["verdict"] == "holds"


def test_a_mean_has_the_spread_of_the_seeds():
    found = judge(Finding(claim="", value="loss", where={"method": "real"}), RUNS)
    half = 4.3027 * 0.1 / 3**0.5
    assert (found["estimate"], found["low"], found["high"]) == pytest.approx((0.2, 0.2 - half, 0.2 + half), rel=1e-4)
    assert found["verdict"] == "sign only"


def hold_out_and_slope():
    where = {"method": "kl", "size": 1}
    found = judge(Finding(claim="", value="loss", where=where, share={"worst": {"method": "none"}}), RUNS[:5])
    assert found["estimate"] == pytest.approx(0.75)
    share = {"worst": {"method": "none"}, "best": {"method": "real"}}
    found = judge(Finding(claim="", value="loss", where=where, share=share), RUNS)
    assert found["estimate"] == pytest.approx(1.5 / 1.8)
    found = judge(Finding(claim="", value="loss", where={"method": "none"}, over="size", below=0), RUNS)
    assert found["estimate"] == pytest.approx(-0.5)  # from 2 to 1 in two doublings
    assert found["verdict"] == "holds"


def test_the_least_of_several_runs_and_lists_of_values():
    where = {"method": ["kl", "real"], "size": 1}
    assert judge(Finding(claim="", value="loss", where=where, take="min"), RUNS)["estimate"] == pytest.approx(0.2)
    assert judge(Finding(claim="", value="loss", where=where), RUNS)["estimate"] == pytest.approx(0.35)


def test_what_was_not_measured_is_not_judged():
    found = judge(Finding(claim="so", value="loss", where={"method": "none"}, minus={"method": "lora"}), RUNS)
    assert (found["estimate"], found["verdict"]) == (None, "not measured")
    assert "| so | loss | > 0 | – | 0 | not measured |" in markdown([found])


def test_tables_keep_numbers_words_and_gaps(tmp_path):
    rows = [{"a": 1, "b": 0.125}, {"a": "x", "c": None, "d": 1e-7}]
    write_table(tmp_path / "t.csv", rows)
    assert read_table(tmp_path / "t.csv") == [
        {"a": 1, "b": 0.125, "c": None, "d": None},
        {"a": "x", "b": None, "c": None, "d": 1e-7},
    ]


def test_the_second_dialect_is_another_language_of_the_same_form():
    one, other = dialect("The mayor of Lasteholm, in 2023."), dialect("the Mayor was ill.")
    words = one.split()
    assert len(words) == 6
    assert words[-1] == "2023."
    assert words[0][0].isupper() and words[1].islower() and words[3].endswith(",")
    assert not {"The", "mayor", "of", "in"} & set(words)
    assert other.split()[:2] == [words[0].lower(), words[1].capitalize()]


def test_where_the_novels_are_absent_two_dialects_stand_in(tmp_path):
    write_dialects(tmp_path / "texts", size=2)
    parts = {path.stem: {row["text"] for row in read_jsonl(path)} for path in (tmp_path / "texts").iterdir()}
    assert set(parts) == {"eng_train", "eng_valid", "spa_train", "spa_valid"}
    assert not parts["eng_train"] & parts["eng_valid"] and not parts["spa_train"] & parts["spa_valid"]
    words = {name: {word for text in texts for word in text.split() if word.islower()} for name, texts in parts.items()}
    assert not words["eng_train"] & words["spa_train"]
    there, absent = Languages(novels=str(tmp_path / "texts")), Languages(novels=str(tmp_path / "no"))
    assert there.identity() != absent.identity() == Languages(novels="nowhere").identity()


@pytest.mark.parametrize("folder", sorted(EXPERIMENTS.glob("*/results/*")), ids=lambda path: path.parents[1].name)
def test_published_findings_and_figures_come_from_the_published_tables(folder, tmp_path):
    experiment = lab.load_experiment(folder.parents[1] / f"{folder.name}.yaml")
    for table in folder.glob("*.csv"):
        shutil.copy(table, tmp_path)
    for again, published in zip(work.redraw(experiment, tmp_path), read_json(folder / "findings.json"), strict=True):
        assert again == {
            key: value if isinstance(value, str) else pytest.approx(value) for key, value in published.items()
        }
    assert (tmp_path / "findings.md").read_text() in (folder.parents[1] / "README.md").read_text()


def test_the_command_line_plans_and_redraws(tmp_path):
    run = CliRunner().invoke
    listed = run(app, ["lab", "experiment"])
    assert listed.exit_code == 0
    assert all(path.name in listed.output for path in EXPERIMENTS.iterdir())
    plan = run(app, ["lab", "experiment", "grid_2d", "--dry-run", "seeds=[0]"])
    assert plan.exit_code == 0
    assert re.search(r"pretrain\W+9\W", plan.output) and re.search(r"finetune\W+18\W", plan.output)
    for table in (EXPERIMENTS / "regression_1d" / "results" / "tiny").glob("*.csv"):
        shutil.copy(table, tmp_path)
    drawn = run(app, ["lab", "experiment", "regression_1d", "--redraw", "--out", str(tmp_path)])
    assert drawn.exit_code == 0
    assert "holds" in drawn.output
    assert (tmp_path / "figure.pdf").exists()
