"""Runs side by side: groups over seeds, what may be compared, ranks, paired differences, and the tables."""

from __future__ import annotations

import csv
import io
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from holdfast.cli import main
from holdfast.errors import ConfigError
from holdfast.metrics import holm, seed_difference, seed_intervals
from holdfast.records.read import read_run, read_runs
from holdfast.report import FIGURES, write_report
from holdfast.report.compare import compare, differences, grouped, refuse_different
from holdfast.report.tables import as_csv, as_latex, as_markdown, notes, p_value
from holdfast.report.terminal import print_comparison, print_table
from holdfast.system.files import read_json, write_json
from support.synthetic_runs import STAGES, TASKS, make_run

SEEDS = 3


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> list[Path]:
    """Two methods and a reference, three seeds each."""
    root = tmp_path_factory.mktemp("seeds")
    methods = ("sequential", "replay", "joint")
    return [make_run(root / f"{m}-{seed}", m, seed=seed, rows=30) for m in methods for seed in range(SEEDS)]


def changed(path: Path, where: str, **values: object) -> Path:
    """A run with other values in a section of its configuration."""
    info = read_json(path / "run.json")
    section = info["config"][where] if where else info
    section.update(values)
    write_json(path / "run.json", info)
    return path


def test_runs_that_differ_in_their_seed_alone_are_one_row(seeds):
    comparison = compare(read_runs(seeds))
    assert [row["run"] for row in comparison.rows] == ["sequential", "replay", "joint"]
    for i, row in enumerate(comparison.rows):
        members = [read_run(path) for path in seeds[3 * i : 3 * i + 3]]
        assert row["seeds"] == [0, 1, 2]
        for figure in FIGURES:
            values = [run.matrix["summary"].get(figure.key) for run in members]
            expected = None if None in values else pytest.approx(np.mean(values))
            assert row[figure.key] == expected, figure.key
        examples = [[[run.statistics(t, j) for j in range(STAGES)] for t in range(STAGES + 1)] for run in members]
        over_seeds = seed_intervals(examples, totals=members[0].totals)
        assert row["intervals"]["average"] == over_seeds["average"]
        assert row["intervals"]["average"][0] < row["average"] < row["intervals"]["average"][1]
        assert row["minutes"] == pytest.approx(3.2) and row["tokens"] == 250_000 and row["peak_memory_gib"] == 1.5


def test_the_clipped_transfer_of_a_group_is_the_mean_of_its_runs(seeds):
    row = compare(read_runs(seeds)).rows[0]
    clipped = [read_json(path / "matrix.json")["clipped_backward_transfer"] for path in seeds[:3]]
    assert row["clipped_backward_transfer"] == pytest.approx(np.mean(clipped)) and row["clipped_backward_transfer"] < 0


def test_groups_are_ranked_by_average_and_references_are_not(seeds):
    rows = compare(read_runs(seeds)).rows
    assert [row["rank"] for row in rows] == [2, 1, None]
    assert rows[2]["average"] > rows[1]["average"] > rows[0]["average"]
    assert "average" in rows[1]["best"] and not rows[2]["best"]


def test_of_losses_the_lowest_ranks_first(tmp_path):
    loss = ["loss"] * STAGES
    runs = [make_run(tmp_path / m, m, metrics=loss) for m in ("sequential", "replay")]
    comparison = compare(read_runs(runs))
    assert [row["rank"] for row in comparison.rows] == [2, 1]
    assert comparison.rows[1]["difference"]["difference"] < 0
    assert "| average ↓ |" in as_markdown(comparison) and "| forgetting ↓ |" in as_markdown(comparison)


def test_equal_averages_share_a_rank(tmp_path):
    runs = [make_run(tmp_path / str(rate), training={"learning_rate": rate}) for rate in (1e-3, 1e-4)]
    runs.append(make_run(tmp_path / "replay", "replay"))
    assert [row["rank"] for row in compare(read_runs(runs)).rows] == [2, 2, 1]


def test_the_difference_to_the_baseline_is_over_seeds_and_test_examples(seeds):
    comparison = compare(read_runs(seeds))
    assert comparison.baseline == "sequential" and comparison.rows[0]["difference"] is None
    first, second = (
        [
            [[row["score"] for row in read_run(path).responses(STAGES, task)] for task in TASKS]
            for path in seeds[i : i + 3]
        ]
        for i in (0, 3)
    )
    expected = seed_difference(first, second, paired=True)
    for key, value in expected.items():
        assert comparison.rows[1]["difference"][key] == pytest.approx(value), key
    row = comparison.rows[1]
    assert row["difference"]["difference"] == pytest.approx(row["average"] - comparison.rows[0]["average"])
    assert row["difference"]["paired"] and row["difference"]["p"] < 0.05
    others = [row["difference"]["p"] for row in comparison.rows[1:]]
    assert [row["difference"]["p_holm"] for row in comparison.rows[1:]] == holm(others)


def test_one_seed_is_said_to_say_nothing_of_training_noise(seeds):
    of_one, of_three = (as_markdown(compare(read_runs(runs))) for runs in (seeds[::3], seeds))
    assert of_one.count("nothing of training noise") == 2
    assert "Student's t" in of_three and "Holm" in of_three and "Smallest true difference" in of_three
    assert "nothing of training noise" not in of_three


def test_another_baseline_by_label_or_directory(seeds):
    runs = read_runs(seeds)
    forward = compare(runs).rows[1]["difference"]["difference"]
    for baseline in ("replay", str(seeds[4])):
        rows = compare(runs, baseline).rows
        assert rows[1]["difference"] is None
        assert rows[0]["difference"]["difference"] == pytest.approx(-forward)
    with pytest.raises(ConfigError, match="no run is called 'repaly'; did you mean 'replay'"):
        compare(runs, "repaly")


def test_a_figure_that_one_seed_lacks_is_no_mean_over_the_others(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, finished=False)]
    (row,) = compare(read_runs(runs)).rows
    assert row["average"] is None and row["forgetting"] is None
    assert row["intervals"].get("average") is None and row["difference"] is None


def test_other_hyperparameters_are_another_group_and_may_be_compared(tmp_path):
    slow = [make_run(tmp_path / f"slow{s}", seed=s, training={"learning_rate": 1e-5}) for s in (0, 1)]
    fast = [make_run(tmp_path / f"fast{s}", seed=s) for s in (0, 1)]
    runs = read_runs([*slow, *fast])
    assert [group.label for group in grouped(runs)] == [
        "sequential, learning_rate 1e-05",
        "sequential, learning_rate 0.0003",
    ]
    assert differences(runs) == []


def test_a_setting_that_a_run_leaves_out_is_called_its_default(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", tuner={"name": "lora", "target": "projector"})]
    names = [run.label for run in read_runs(runs)]
    assert names == ["sequential, target default", "sequential, target projector"]


def test_settings_that_change_no_result_do_not_part_seeds(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1, training={"save_every": 7})]
    assert len(grouped(read_runs(runs))) == 1


REORDERED = [*TASKS[:2], TASKS[3], TASKS[2]]


def other_rows(path: Path) -> Path:
    info = read_json(path / "run.json")
    info["tasks"][TASKS[0]]["fingerprint"] = "f" * 64
    write_json(path / "run.json", info)
    return path


DIFFERENT = {
    "order": (lambda path: make_run(path, "replay", tasks=REORDERED), "streams differ: tasks"),
    "rows": (lambda path: other_rows(make_run(path, "replay")), "streams differ: rows or instructions of task 2022"),
    "version": (
        lambda path: changed(make_run(path, "replay"), "", stream={"name": "trace", "version": "2"}),
        "streams differ: version",
    ),
    "template": (
        lambda path: changed(make_run(path, "replay"), "data", template="chat"),
        "prompts differ: data.template",
    ),
    "length": (lambda path: changed(make_run(path, "replay"), "", max_length=512), "prompts differ: max_length"),
    "epochs": (lambda path: make_run(path, "replay", training={"epochs": 3}), "budgets differ: length of a stage"),
    "steps": (lambda path: make_run(path, "replay", training={"max_steps": 9}), "budgets differ: length of a stage"),
    "batch": (lambda path: make_run(path, "replay", training={"batch_size": 4}), "budgets differ: training.batch_size"),
    "metric": (
        lambda path: make_run(path, "replay", metrics=["accuracy", "rouge_l", "accuracy", "accuracy"]),
        "metrics differ: metric of task 2023",
    ),
    "twice": (make_run, "seeds do not differ: "),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_cannot_be_compared_is_refused_and_named(case, tmp_path):
    make, message = DIFFERENT[case]
    runs = read_runs([make_run(tmp_path / "one"), make(tmp_path / "two")])
    with pytest.raises(ConfigError, match=f"cannot be compared:\n  {re.escape(message)}") as refused:
        refuse_different(runs)
    assert str(tmp_path / "one") in str(refused.value) and str(tmp_path / "two") in str(refused.value)
    comparison = compare(runs)
    assert len(comparison.rows) == 2
    assert all(row["rank"] is None and row["best"] == [] for row in comparison.rows)
    assert notes(comparison)[0].startswith(f"NOT COMPARABLE, so that nobody is ranked or best: {message}")


def test_only_what_differs_is_named(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", "replay", training={"epochs": 3})]
    assert len(differences(read_runs(runs))) == 1


def test_a_run_that_trains_nothing_has_no_budget(tmp_path):
    frozen = make_run(tmp_path / "frozen", "frozen", training={"epochs": 9})
    for folder in (frozen / "stages").glob("0[1-9]-*"):
        for file in sorted(folder.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        folder.rmdir()
    (frozen / "events.jsonl").unlink()
    assert differences(read_runs([frozen, make_run(tmp_path / "replay", "replay")])) == []


def test_markdown_has_a_row_a_group_and_marks_what_cannot_be_compared(seeds, tmp_path):
    text = as_markdown(compare(read_runs(seeds)))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3 and len({line.count("|") for line in table}) == 1
    assert table[0].startswith("| method | seeds | rank | average ↑ | new task ↑ | learned ↑ | forgetting ↓ |")
    assert table[3].startswith("| replay | 3 | 1 | **") and table[4].startswith("| (joint) | 3 | – |")
    assert re.search(r"\| \*\*0\.\d{3} ± 0\.\d{3}\*\* \|", table[3])
    assert "p is two-sided" in text
    different = [make_run(tmp_path / "one"), make_run(tmp_path / "two", "replay", training={"epochs": 3})]
    assert "NOT COMPARABLE" in as_markdown(compare(read_runs(different)))


def test_latex_escapes_and_needs_nothing_but_booktabs(tmp_path):
    runs = [make_run(tmp_path / f"{rate}", training={"learning_rate": rate}) for rate in (1e-4, 1e-3)]
    runs.append(make_run(tmp_path / "replay", "replay"))
    text = as_latex(compare(read_runs(runs)))
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 4 and len({line.count(" & ") for line in rows}) == 1
    assert r"sequential, learning\_rate 0.0001" in text and r"\textbf{" in text and r"$\pm$" in text
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert code.isascii() and not re.search(r"(?<!\\)[_%#]", code)


def test_csv_holds_every_number_in_full(seeds):
    comparison = compare(read_runs(seeds))
    lines = list(csv.DictReader(io.StringIO(as_csv(comparison))))
    for line, row in zip(lines, comparison.rows, strict=True):
        assert (line["method"], line["seeds"], line["comparable"]) == (row["run"], "0 1 2", "yes")
        for figure in FIGURES:
            assert line[figure.key] == ("" if row[figure.key] is None else repr(row[figure.key]))
            if row["intervals"].get(figure.key):
                assert [float(line[f"{figure.key}_{end}"]) for end in ("low", "high")] == row["intervals"][figure.key]
        assert float(line["tokens"]) == row["tokens"]
    assert lines[1]["baseline"] == "sequential" and float(lines[1]["p"]) == comparison.rows[1]["difference"]["p"]
    assert lines[0]["baseline"] == lines[0]["p"] == ""


def test_csv_holds_no_formula(seeds):
    comparison = compare(read_runs(seeds))
    comparison.rows[0]["run"] = "=HYPERLINK(1)"
    first, *_ = csv.DictReader(io.StringIO(as_csv(comparison)))
    assert first["method"] == "'=HYPERLINK(1)"


def test_p_values_as_a_person_reads_them():
    assert [p_value(p) for p in (1.0, 0.0312, 0.001, 0.0001)] == ["1.000", "0.031", "0.001", "0.0001"]


def test_the_page_compares_groups_and_shows_cost_beside_quality(seeds, tmp_path):
    text = write_report(seeds, tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count('<tr data-run="') == 3 and "<small>3 seeds</small>" in text
    assert 'data-section="cost"' in text and "0.25 M" in text
    different = [make_run(tmp_path / "one"), make_run(tmp_path / "two", "replay", training={"epochs": 3})]
    text = write_report(different, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "These runs cannot be compared one to one" in text and "budgets differ" in text


def command(monkeypatch, *arguments: object) -> int:
    """The exit code of `holdfast compare ...`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["holdfast", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_the_command_line(seeds, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, *seeds) == 0
    said = capsys.readouterr().out
    assert "seeds" in said and "rank" in said and max(map(len, said.splitlines()[:20])) <= 80
    assert command(monkeypatch, *seeds, "--format", "csv", "-o", tmp_path / "page.html") == 0
    said = capsys.readouterr()
    assert len(list(csv.DictReader(io.StringIO(said.out)))) == 3 and (tmp_path / "page.html").exists()
    other = make_run(tmp_path / "other", "ewc", training={"epochs": 3})
    assert command(monkeypatch, *seeds, other) == 2
    assert "budgets differ: length of a stage: " in capsys.readouterr().err
    assert command(monkeypatch, *seeds, other, "--allow-different", "--format", "markdown") == 0
    assert "NOT COMPARABLE" in capsys.readouterr().out


def test_a_comparison_names_what_was_not_learned(tmp_path):
    runs = read_runs([make_run(tmp_path / "a", "unlearned"), make_run(tmp_path / "b", "replay", rows=60)])
    comparison = compare(runs)
    assert comparison.rows[0]["not_learned"] == TASKS and comparison.rows[1]["not_learned"] == []
    assert "NOT LEARNED by sequential" in as_markdown(comparison)


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminals_table_loses_no_column(tmp_path, width):
    paths = [make_run(tmp_path / name, name) for name in ("sequential", "replay", "ewc")]
    console = Console(width=width, record=True, file=io.StringIO())
    print_table(paths, console)
    print_comparison(compare(read_runs(paths)), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    for name in (*("sequential", "replay", "ewc", "average", "forgetting", "change", "min"), "memory,", "minutes"):
        assert re.search(rf"(?<!\S){re.escape(name)}(?!\S)", text), name
    assert text.count("3.2") == 2 * len(paths)


def test_intervals_are_explained_where_there_are_some_and_as_they_are_written(tmp_path: Path) -> None:
    """± stands in Markdown and LaTeX alone; a terminal and a page have the ends of an interval below the value."""
    runs = [make_run(tmp_path / method, method, rows=1) for method in ("sequential", "replay")]
    shown = compare(read_runs(runs))
    assert shown.rows[0]["intervals"]["average"] and "95 % intervals: over test" in " ".join(notes(shown))
    assert "±" not in " ".join(notes(shown)) and "(after ±, half of one)" in as_markdown(shown)
    for run in runs:
        shutil.rmtree(run / "stages")
        matrix = read_json(run / "matrix.json")
        write_json(run / "matrix.json", matrix | {"intervals": dict.fromkeys(matrix["intervals"])})
    none = compare(read_runs(runs))
    assert "95 % interval" not in " ".join(notes(none)) and "±" not in as_markdown(none)
    write_report(runs, tmp_path / "compare.html")
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "95 % interval" not in page and "eans over seeds" not in page
