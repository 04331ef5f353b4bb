"""The report without a browser: its figures, its comparison, its responses, and what it does to nasty text."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from holdfast.errors import RunDirectoryError
from holdfast.records.changes import changes
from holdfast.records.read import FinishedRun, read_run, read_runs
from holdfast.report import FIGURES, compare_table, write_report
from holdfast.report.compare import compare
from holdfast.report.falls import run_pictures
from holdfast.report.packed import pack_text
from holdfast.report.plots import POINTS, SCALE_DARK, SCALE_LIGHT, loss_curves, templates, thin
from holdfast.report.rows import RowList
from holdfast.report.tables import notes
from holdfast.report.text import interval, number, shorten
from holdfast.system.files import read_json, write_json, write_jsonl
from support.packed import unpack_text
from support.synthetic_runs import NASTY, STAGES, TASKS, make_run


class Page(HTMLParser):
    """A parsed page: every element with its attributes and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[dict[str, Any]] = []
        self.open: list[dict[str, Any]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = {"tag": tag, **dict(attrs), "text": ""}
        self.elements.append(element)
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()["tag"] == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def all(self, attribute: str) -> list[dict[str, Any]]:
        return [element for element in self.elements if attribute in element]

    def matrix(self) -> dict[str, list[str]]:
        """The score matrix of a page of one run, by what its rows are called."""
        cells: dict[str, list[str]] = {}
        for element in self.elements:
            if element["tag"] == "tr":
                row = element.get("data-row")
            elif element["tag"] == "td" and row is not None:
                cells.setdefault(row, []).append(element["text"])
        return cells

    def plots(self) -> dict[str, Any]:
        """What the page is given: figures, templates and, where there are any, test rows."""
        (data,) = [element for element in self.elements if element["tag"] == "script" and element.get("id") == "data"]
        given = json.loads(data["text"])
        return given | json.loads(unpack_text(given["plots"]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / method, method, rows=27) for method in ("sequential", "replay", "joint")]


def report(run: Path | list[Path], output: Path) -> Page:
    assert write_report(run if isinstance(run, list) else [run], output) == output
    return Page(output)


def test_every_figure_of_the_page_is_that_of_matrix_json(runs: list[Path], tmp_path: Path) -> None:
    for run in runs:
        matrix = read_json(run / "matrix.json")
        page = report(run, tmp_path / "report.html")
        assert {e["data-figure"]: json.loads(e["data-value"]) for e in page.all("data-figure")} == matrix["summary"]
        assert {e["data-interval"]: json.loads(e["data-value"]) for e in page.all("data-interval")} == {
            key: ends for key, ends in matrix["intervals"].items() if ends
        }
        assert page.matrix() == {
            str(t): ["not measured" if score is None else f"{score:.3f}" for score in row]
            for t, row in enumerate(matrix["scores"])
        }
        general = {
            (e["data-general"], int(e["data-stage"])): json.loads(e["data-value"]) for e in page.all("data-general")
        }
        assert general == {(name, t): v for name, values in matrix["general"].items() for t, v in enumerate(values)}


def test_heat_map_and_curves_hold_the_score_matrix(runs: list[Path], tmp_path: Path) -> None:
    scores = read_json(runs[2] / "matrix.json")["scores"]
    figures = list(report(runs[2], tmp_path / "report.html").plots()["figures"].values())
    assert figures[0]["data"][0]["z"] == scores
    missing = [(note["y"], note["x"]) for note in figures[0]["layout"]["annotations"] if "measured" in note["text"]]
    assert missing == [(t, j) for t in range(STAGES + 1) for j in range(STAGES) if scores[t][j] is None]
    assert [curve["y"] for curve in figures[1]["data"]] == [list(column) for column in zip(*scores, strict=True)]


@pytest.mark.parametrize("noted", [True, False], ids=["", "0.1.0"])
@pytest.mark.parametrize(
    ("method", "same"),
    [
        ("sequential", [False] * (STAGES - 1) + [True]),
        ("joint", [False] * STAGES),
        ("frozen", [True] * STAGES),
    ],
)
def test_what_became_of_each_task_is_told_without_the_stages_folders(
    method: str, same: list[bool], noted: bool, tmp_path: Path
) -> None:
    path = make_run(tmp_path / "run", method)
    record, matrix = read_json(path / "run.json"), read_json(path / "matrix.json")
    begun = {"stage": 1, "task": "any", "config": record["config"], "fingerprint": "", "versions": {}}
    stages = [begun | {"started": None, "finished": record["finished"]}]
    if method == "frozen":  # nothing is trained: no stage has a folder, a note or a step
        stages = []
        write_json(path / "matrix.json", matrix | {"scores": matrix["scores"][:1] * (STAGES + 1)})
        (path / "events.jsonl").unlink()
    if noted:
        write_json(path / "run.json", record | {"stages": stages})
    for pattern in ("0[1-9]*", "*"):
        for folder in path.glob(f"stages/{pattern}"):
            shutil.rmtree(folder)
        run = read_run(path)
        assert run.untrained == (method == "frozen")
        assert [line.same for line in run_pictures(run, [range(STAGES)])[0].lines] == same


def test_scores_of_joint_training_make_a_last_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    joint = [0.9, 0.8, None, 0.7]
    write_json(run / "matrix.json", read_json(run / "matrix.json") | {"joint": joint})
    page = report(run, tmp_path / "report.html")
    assert page.matrix()["joint"] == ["0.900", "0.800", "not measured", "0.700"]
    assert next(iter(page.plots()["figures"].values()))["data"][0]["z"][-1] == joint


def test_a_page_needs_nothing_from_outside(runs: list[Path], tmp_path: Path) -> None:
    page = report(runs, tmp_path / "compare.html")
    assert not [e for e in page.elements if e["tag"] in ("link", "img", "iframe", "base", "object")]
    assert not page.all("src")
    assert all(e["href"].startswith("#") for e in page.all("href"))
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    (packed,) = [e["text"] for e in page.elements if e["tag"] == "script" and e.get("id") == "plotly"]
    assert unpack_text(packed) == get_plotlyjs()


def test_a_page_is_smaller_than_two_megabytes(runs: list[Path], tmp_path: Path) -> None:
    assert write_report(runs, tmp_path / "compare.html").stat().st_size < 2_000_000


@pytest.mark.parametrize("text", ["", "a", "ab", "abc", "abcd", "</script><!-- & 'é東🙂'", "\0" * 100, "sea " * 10_000])
def test_packed_text_means_nothing_to_html_or_json_and_comes_back(text: str) -> None:
    packed = pack_text(text)
    assert not set(packed) & set("&<>\"'\\")
    assert unpack_text(packed) == text
    assert len(packed) < len(text.encode()) + 40


def test_nasty_text_is_shown_and_never_obeyed(runs: list[Path], tmp_path: Path) -> None:
    page = report(runs, tmp_path / "compare.html")
    assert [e["tag"] for e in page.elements if e["tag"] == "script"] == ["script"] * 4
    assert not page.all("onerror")
    shown = [e["text"] for e in page.elements if e["tag"] == "bdi"]
    for text in NASTY[:-4]:
        assert any(text in entry for entry in shown), text
    assert any(entry.endswith("THE-END") and len(entry) < 400 for entry in shown)
    assert TASKS[3] in shown
    assert "{{ 7 * 7 }}" in "".join(shown)
    figures = page.plots()["figures"]
    assert figures["plot-1"]["layout"]["xaxis"]["ticktext"][3].startswith("&lt;b&gt;")


def test_plots_are_valid_plotly_figures(runs: list[Path], tmp_path: Path) -> None:
    plots = report(runs, tmp_path / "compare.html").plots()
    assert plots["figures"]
    for figure in plots["figures"].values():
        go.Figure(figure)
    for template in plots["templates"].values():
        go.layout.Template(template)


@pytest.mark.parametrize(("scale", "text"), [(SCALE_LIGHT, "light"), (SCALE_DARK, "dark")])
def test_heat_map_can_be_read_in_every_colour(scale: list[str], text: str) -> None:
    lightness = [luminance(colour) for colour in scale]
    assert lightness == sorted(lightness, reverse=text == "light")
    ink = luminance(templates()[text]["data"]["heatmap"][0]["textfont"]["color"])
    for colour in lightness:
        dark, light = sorted((ink, colour))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_changes_of_responses_add_up_to_the_change_of_the_score(runs: list[Path]) -> None:
    for path in runs[:2]:
        run = read_run(path)
        for j in range(STAGES - 1):
            change = changes(run, j)
            assert change is not None
            difference = run.scores[STAGES][j] - run.scores[j + 1][j]
            assert len(change.gained) - len(change.lost) == pytest.approx(difference * change.rows)
            assert all(before["score"] == 1 and after["score"] == 0 for before, after in change.lost)
            assert all(before["row"] == after["row"] for before, after in change.lost + change.gained)
            assert change.since == f"after {TASKS[j]}"
    assert len(changes(read_run(runs[0]), 0).lost) > 10


def test_what_was_learned_last_is_compared_with_the_model_before_training(runs: list[Path]) -> None:
    for path, tasks in ((runs[0], [STAGES - 1]), (runs[2], range(STAGES))):
        run = read_run(path)
        for j in tasks:
            change = changes(run, j)
            assert change.since == "before training"
            difference = run.scores[STAGES][j] - run.scores[0][j]
            assert len(change.gained) - len(change.lost) == pytest.approx(difference * change.rows)


def packed_rows(runs: list[FinishedRun]) -> dict[str, Any]:
    rows = RowList()
    for run in runs:
        rows.add(run)
    return rows.packed()


def unpacked(chunk: dict[str, Any]) -> dict[str, Any]:
    return json.loads(unpack_text(chunk["rows"]))


def test_every_test_row_of_every_run_is_in_the_page(runs: list[Path], tmp_path: Path) -> None:
    packed = report(runs, tmp_path / "compare.html").plots()["rows"]
    assert packed["runs"] == ["sequential", "replay", "joint"]
    assert [chunk["task"] for chunk in packed["chunks"]] == TASKS
    for j, chunk in enumerate(packed["chunks"]):
        texts = unpacked(chunk)
        assert len(texts["numbers"]) == 27 and len(texts["runs"]) == len(chunk["runs"]) == 3
        for found, of in zip(texts["runs"], chunk["runs"], strict=True):
            run = read_run(runs[of["run"]])
            last = {str(row["row"]): row for row in run.responses(STAGES, TASKS[j])}
            for place, name in enumerate(texts["numbers"]):
                row = last[name]
                assert found["is"][place] == row["score"]
                assert found["after"][place] == shorten(row["response"], packed["length"])
                assert texts["prompts"][place] == shorten(row["prompt"], packed["length"])
            right_to_wrong = sum(was - now >= 0.5 for was, now in zip(found["was"], found["is"], strict=True))
            assert of["lost"] == right_to_wrong == len(changes(run, j).lost)


def test_runs_with_other_test_rows_stand_apart(runs: list[Path], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "ewc", rows=9)
    packed = packed_rows(read_runs([runs[0], other]))
    assert [(chunk["task"], len(chunk["runs"])) for chunk in packed["chunks"]] == [(t, 1) for t in TASKS * 2]


def test_texts_are_kept_to_a_length(tmp_path: Path) -> None:
    packed = packed_rows(read_runs([make_run(tmp_path / "run", rows=27)]))
    for chunk in packed["chunks"]:
        texts = unpacked(chunk)
        assert max(map(len, texts["prompts"])) <= packed["length"]
        assert max(map(len, texts["runs"][0]["before"])) <= packed["length"]


def test_the_gate_and_what_it_decided(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    check = {"key": "max_forgetting", "figure": "forgetting <b>", "value": 0.21, "limit": 0.05, "interval": [0.1, 0.3]}
    decisions = [
        {"stage": 1, "task": TASKS[0], "passed": True, "action": "continue", "current": 1, "checks": []},
        {"stage": 2, "task": TASKS[1], "passed": False, "action": "rollback", "current": 1, "checks": [check]},
    ]
    write_json(run / "run.json", read_json(run / "run.json") | {"gate": decisions})
    page = report(run, tmp_path / "report.html")
    passed, failed = page.all("data-gate")
    assert "open" not in passed and "nothing to check" in passed["text"]
    assert "open" in failed and "failed: rolled back to stage 1" in failed["text"]
    assert "forgetting <b>" in failed["text"] and "0.160" in failed["text"] and "0.100 to 0.300" in failed["text"]
    report([run, make_run(tmp_path / "replay", "replay")], tmp_path / "compare.html")
    assert "gate: 1 of 2 stages failed" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_changed_inputs_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    changes = [
        {"at": "2026-11-30T00:00:00+00:00", "accepted": ["model: model.safetensors: 0123 -> 4567"]},
        {"at": "2026-12-01T00:00:00+00:00", "versions": ["torch 2.9 -> 2.10"]},
    ]
    write_json(run / "run.json", read_json(run / "run.json") | {"changes": changes})
    report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "it went on with changed inputs, so scores do not compare: model: model.safetensors: 0123 -&gt; 4567" in page
    assert "other versions at 2026-12-01" in page and "torch 2.9 -&gt; 2.10" in page


def test_forgetting_by_task_and_learning_curves(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    matrix = read_json(run / "matrix.json")
    curve = {"steps": [0, 10, 40], "scores": [0.1, 0.5, 0.9], "area": 0.6}
    write_json(run / "matrix.json", matrix | {"curves": {TASKS[1]: curve}})
    page = report(run, tmp_path / "report.html")
    shown = [e["text"] for e in page.all("data-by-task") if e["data-by-task"] == "forgetting"]
    assert shown == [number(v, signed=True) for v in matrix["by_task"]["forgetting"][:-1]] + ["–"]
    assert "learning" in {e["data-section"] for e in page.all("data-section")}
    (drawn,) = [f for f in page.plots()["figures"].values() if "area 0.600" in f["data"][0].get("name", "")]
    assert drawn["data"][0]["x"] == [0, 0.25, 1] and drawn["data"][0]["y"] == curve["scores"]


def test_general_abilities_of_runs_stand_side_by_side(runs: list[Path], tmp_path: Path) -> None:
    report(runs, tmp_path / "compare.html")
    text = (tmp_path / "compare.html").read_text(encoding="utf-8")
    table = text[text.index('class="abilities') :].partition("</table>")[0]
    assert table.count("0.620 → 0.420<small>−0.200</small>") == 3 and "9.500 → 25.500" in table


def test_what_stood_at_chance_before_training_is_told(runs: list[Path], tmp_path: Path) -> None:
    """The page, the table and the comparison name it; a directory from before this was known says nothing."""
    run = shutil.copytree(runs[0], tmp_path / "run")
    matrix = read_json(run / "matrix.json")
    name = next(name for name in matrix["general"] if "/" not in name)
    report(run, tmp_path / "old.html")
    assert "At chance" not in (tmp_path / "old.html").read_text(encoding="utf-8")
    found = {"level": 0.25, "questions": 20, "interval": [0.2, 0.7], "at_chance": True}
    write_json(run / "matrix.json", matrix | {"chance": {name: found}})
    said = "At chance before training, so that a fall cannot show: "
    report(run, tmp_path / "new.html")
    value = number(matrix["general"][name][0])
    assert f"{said}{name} {value} (0.200 to 0.700; chance 0.250)." in (tmp_path / "new.html").read_text(
        encoding="utf-8"
    )
    assert f"{said}{name}." in notes(compare(read_runs([run])))
    report([run, runs[1]], tmp_path / "two.html")
    assert (tmp_path / "two.html").read_text(encoding="utf-8").count("at chance before: no fall can show") == 1
    write_json(run / "matrix.json", matrix | {"chance": {name: found | {"interval": [0.2]}}})
    with pytest.raises(RunDirectoryError, match=rf"chance\.{name}\.interval"):
        read_runs([run])


def test_tasks_scored_by_loss_have_a_reversed_scale_and_no_responses(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", metrics=["loss"] * STAGES)
    page = report(run, tmp_path / "report.html")
    trace = page.plots()["figures"]["plot-1"]["data"][0]
    assert trace["reversescale"]
    assert "zmax" not in trace
    assert not page.all("data-lost")
    assert "positive forgetting is worse" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_tasks_without_a_common_scale_have_a_heat_map_each_and_no_mean(tmp_path: Path) -> None:
    page = report(make_run(tmp_path / "run", metrics=["loss", "accuracy", "rouge_l", "loss"]), tmp_path / "report.html")
    maps = [f["data"][0] for f in page.plots()["figures"].values() if f["data"][0]["type"] == "heatmap"]
    assert [len(trace["z"][0]) for trace in maps] == [2, 2]
    assert [trace["reversescale"] for trace in maps] == [True, False]
    assert {e["text"].split()[0] for e in page.all("data-figure") if e["data-figure"] != "general_change"} == {"not"}


def test_comparison_rows_and_the_best_of_them(runs: list[Path], tmp_path: Path) -> None:
    rows = compare_table(runs)
    for row, run in zip(rows, runs, strict=True):
        assert {figure.key: row[figure.key] for figure in FIGURES} == read_json(run / "matrix.json")["summary"]
        assert row["minutes"] == pytest.approx(3.2)
    assert [row["run"] for row in rows] == ["sequential", "replay", "joint"]
    assert rows[2]["average"] > rows[1]["average"]
    assert rows[2]["best"] == [], "a reference competes with nobody"
    assert {"average", "forgetting", "backward_transfer"} <= set(rows[1]["best"])
    for key, top in (("new_task", max), ("forward_transfer", max), ("forgetting", min)):
        assert [key in row["best"] for row in rows[:2]] == [
            row[key] == top(r[key] for r in rows[:2]) for row in rows[:2]
        ]
    assert not [row for row in rows if "minutes" in row["best"]], "nobody is best where all are the same"
    page = report(runs, tmp_path / "compare.html")
    table = [e for e in page.all("data-figure") if e["data-figure"] == "forgetting"][: len(runs)]
    assert [json.loads(e["data-value"]) for e in table] == [row["forgetting"] for row in rows]
    assert ["best" in e["class"] for e in table] == [False, True, False]


def test_for_losses_the_lowest_average_is_best(tmp_path: Path) -> None:
    loss = ["loss"] * STAGES
    rows = compare_table([make_run(tmp_path / m, m, metrics=loss) for m in ("sequential", "replay")])
    assert rows[1]["average"] < rows[0]["average"]
    assert "average" in rows[1]["best"]


def test_nobody_is_best_where_streams_differ(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "replay", tasks=[*TASKS[:2], TASKS[3], TASKS[2]])]
    assert [row["best"] for row in compare_table(runs)] == [[], []]
    report(runs, tmp_path / "compare.html")
    assert "cannot be compared" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_every_run_has_a_label_of_its_own(tmp_path: Path) -> None:
    def labels(*runs: Path) -> list[str]:
        return [run.label for run in read_runs(list(runs))]

    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    assert labels(a, b) == ["sequential, seed 0", "sequential, seed 1"]
    slow = make_run(tmp_path / "slow", training={"learning_rate": 1e-5})
    assert labels(a, slow) == ["sequential, learning_rate 0.0003", "sequential, learning_rate 1e-05"]
    again = make_run(tmp_path / "again")
    assert labels(a, again) == ["sequential, a", "sequential, again"]
    assert len(set(labels(a, make_run(tmp_path / "other" / "a")))) == 2


def test_average_over_the_tasks_learned_so_far(runs: list[Path]) -> None:
    run = read_run(runs[0])
    S = run.scores
    assert run.seen_average() == pytest.approx([S[1][0], (S[2][0] + S[2][1]) / 2, sum(S[3][:3]) / 3, sum(S[4]) / 4])
    joint = read_run(runs[2])
    assert joint.seen_average() == [None, None, None, pytest.approx(sum(joint.scores[4]) / 4)]


def test_long_runs_are_thinned_but_keep_their_peaks(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", "replay", events=900))
    run.events[1234]["loss"] = 99.0
    curves = loss_curves(run.events)["data"]
    assert [curve["name"] for curve in curves] == ["loss", "task term", "replay term"]
    for curve in curves:
        assert len(curve["x"]) <= POINTS
        steps = [x for x in curve["x"] if x is not None]
        assert steps == sorted(steps)
    assert max(y for y in curves[0]["y"] if y is not None) == 99.0
    assert min(x for x in curves[2]["x"] if x is not None) > 9000, "rehearsal began in stage 2"


def test_thin() -> None:
    points = [(i, float(v)) for i, v in enumerate([3, 1, 2, 9, 5, 4, 0, 7])]
    assert thin(points, 8) == points
    assert thin(points, 4) == [(1, 1.0), (3, 9.0), (6, 0.0), (7, 7.0)]


def test_a_step_that_was_logged_again_after_a_resume_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", events=3)
    events = read_run(run).events
    write_jsonl(run / "events.jsonl", [{**events[1], "loss": 50.0}, *events])
    assert read_run(run).events == events


def test_a_run_without_its_optional_parts_still_reports(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    (run / "events.jsonl").unlink()
    info = read_json(run / "run.json")
    for key in ("versions", "hardware", "commit", "parameters", "seconds", "finished"):
        del info[key]
    write_json(run / "run.json", info)
    write_json(run / "matrix.json", read_json(run / "matrix.json") | {"general": {}, "intervals": {}})
    page = report(run, tmp_path / "report.html")
    assert {e["data-section"] for e in page.all("data-section")} == {
        "summary",
        "matrix",
        "curves",
        "figures",
        "lost",
        "settings",
        "cite",
    }
    assert "not finished" in (tmp_path / "report.html").read_text(encoding="utf-8")
    report([run, run], tmp_path / "compare.html")


@pytest.mark.parametrize("absent", ["run.json", "matrix.json"])
def test_a_directory_without_a_run_is_refused(tmp_path: Path, absent: str) -> None:
    run = make_run(tmp_path / "run")
    (run / absent).unlink()
    with pytest.raises(RunDirectoryError, match=re.escape(f"{run}") + f".*no {re.escape(absent)}"):
        write_report([run], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_numbers_as_a_person_reads_them() -> None:
    assert [number(v) for v in (None, 0.5, -0.0001, -0.25, 99.9, 12345.678)] == [
        *("not measured", "0.500", "0.000", "−0.250", "99.900", "12,345.7"),
    ]
    assert [number(v, signed=True) for v in (0.5, 0.0, -0.25)] == ["+0.500", "0.000", "−0.250"]
    assert interval([0.1, 0.2]) == "0.100 to 0.200"
    assert interval(None) == ""


def test_shorten_keeps_both_ends() -> None:
    assert shorten("short", 100) == "short"
    text = shorten("a" * 500 + "z" * 500, 90)
    assert len(text) <= 90
    assert text.startswith("aaa")
    assert text.endswith("zzz")


def test_a_page_says_first_that_nothing_was_learned(tmp_path):
    """With every score at 0, "nothing was forgotten" would be true and misleading."""
    page = write_report([make_run(tmp_path / "run", "unlearned")], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Nothing was learned" in page and "Nothing was forgotten" not in page
    learned = write_report([make_run(tmp_path / "other", rows=60)], tmp_path / "b.html").read_text(encoding="utf-8")
    assert "Nothing was learned" not in learned
