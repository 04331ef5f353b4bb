"""What a page says first, and what it says was lost: its sentences, its first picture, and the lost answers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.config.run import load_config
from holdfast.records.changes import changes, general_changes
from holdfast.records.read import read_run, read_runs
from holdfast.report import cite, write_report
from holdfast.report.compare import compare
from holdfast.report.falls import MOST, comparison_pictures, run_pictures
from holdfast.report.headline import comparison_headline, run_headline
from holdfast.report.learned import _gained
from holdfast.report.rows import EXAMPLES
from holdfast.report.text import number, share
from holdfast.system.files import read_json, write_json, write_jsonl
from support.paths import ROOT
from support.synthetic_runs import STAGES, TASKS, make_run

LOST = re.compile(r'data-lost="([^"]*)" data-counts="([^"]*)"')


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / method, method, rows=27) for method in ("sequential", "replay", "joint")]


def page(run: Path, output: Path) -> str:
    return write_report([run], output).read_text(encoding="utf-8")


def lost(text: str) -> dict[str, list[int]]:
    """By task or ability, in the page's order: rows, right then, lost, gained."""
    unescaped = [
        (name.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"), c) for name, c in LOST.findall(text)
    ]
    return {name: json.loads(counts.replace("&#34;", '"')) for name, counts in unescaped}


def counted(run: Path, task: str, stage: int) -> list[int]:
    """The same of a task, counted from its files."""
    file = f"responses/{task.replace('/', '_')}.jsonl"
    then, now = (
        [
            json.loads(line)["score"]
            for line in next(run.glob(f"stages/{t:02d}-*")).joinpath(file).open(encoding="utf-8")
        ]
        for t in (stage, STAGES)
    )
    both = list(zip(then, now, strict=True))
    return [len(both), sum(then) > 0 and round(sum(then)), both.count((1.0, 0.0)), both.count((0.0, 1.0))]


def test_what_was_lost_is_what_a_count_of_the_records_finds_and_what_the_matrix_says(runs: list[Path], tmp_path: Path):
    for run in runs[:2]:
        matrix, found = read_json(run / "matrix.json"), lost(page(run, tmp_path / "page.html"))
        falls = {task: matrix["scores"][j + 1][j] - matrix["scores"][STAGES][j] for j, task in enumerate(TASKS[:-1])}
        brute = {task: counted(run, task, j + 1) for j, task in enumerate(TASKS[:-1])}
        assert found == {task: counts for task, counts in brute.items() if counts[2]}
        assert list(found) == sorted(found, key=lambda task: (-falls[task], -found[task][2])), "the biggest fall first"
        for task, (rows, _, gone, gained) in found.items():
            assert gone - gained == pytest.approx(falls[task] * rows)


def test_of_a_task_that_lost_much_a_few_answers_are_shown(runs: list[Path], tmp_path: Path):
    text = page(runs[0], tmp_path / "page.html")
    shown = text[text.index('data-section="lost"') :].partition("</section>")[0]
    assert max(counts[2] for counts in lost(text).values()) > EXAMPLES
    assert shown.count('<dl class="response">') == sum(min(EXAMPLES, counts[2]) for counts in lost(text).values())
    assert f"Learned last, so nothing of it can be lost yet: {TASKS[-1].replace('<', '&lt;').split('&')[0]}" in shown
    assert "Measured by a loss, so without right and wrong answers: perplexity/held-out" in shown


def ability(run: Path, right: list[list[int]], texts: bool) -> None:
    """Give a run the answers to its general ability at each stage, 1 for a right one."""
    matrix = read_json(run / "matrix.json")
    matrix["general"]["lasting facts"] = [sum(scores) / len(scores) for scores in right]
    write_json(run / "matrix.json", matrix)
    for folder, scores in zip(sorted(run.glob("stages/*")), right, strict=True):
        found: dict[str, Any] = {"general": {}, "seconds": 1.0}
        found["general_examples"] = {"lasting facts": [[score, 1] for score in scores]}
        if texts:
            found["general_responses"] = {"lasting facts": "facts.jsonl"}
            rows = [
                {
                    "row": i,
                    "prompt": f"fact {i}?",
                    "answer": "yes",
                    "response": "yes" if score else "no",
                    "score": score,
                }
                for i, score in enumerate(scores)
            ]
            write_jsonl(folder / "responses" / "general" / "facts.jsonl", rows)
        write_json(folder / "evaluation.json", found)


@pytest.mark.parametrize("texts", [True, False])
def test_a_general_ability_lost_what_it_had_before_training(tmp_path: Path, texts: bool):
    run = make_run(tmp_path / "run")
    ability(run, [[1, 1, 1, 0, 0], *[[1, 1, 1, 1, 1]] * (STAGES - 1), [1, 0, 0, 1, 0]], texts)
    text = page(run, tmp_path / "page.html")
    assert lost(text)["lasting facts"] == [5, 3, 2, 1]
    assert ("fact 1?" in text) == texts and ("The answers were not kept" in text) != texts
    found = general_changes(read_run(run), "lasting facts")
    assert found is not None and found.since == "before training" and found.has_texts == texts
    assert [pair[0]["row"] for pair in found.lost] == [1, 2] and [pair[0]["row"] for pair in found.gained] == [3]


def test_the_file_of_an_ability_lies_in_its_folder(tmp_path: Path):
    """A record that somebody else made cannot name any other file."""
    run = make_run(tmp_path / "run")
    ability(run, [[1, 0]] * (STAGES + 1), texts=True)
    (tmp_path / "secret.jsonl").write_text('{"row": 0, "response": "secret", "score": 1}\n')
    for file in run.glob("stages/*/evaluation.json"):
        found = read_json(file)
        write_json(file, found | {"general_responses": {"lasting facts": "../../../../../secret.jsonl"}})
    assert read_run(run).general_responses(0, "lasting facts") == []


def test_the_first_sentences_have_the_figures_of_the_matrix(runs: list[Path]):
    run = read_run(runs[0])
    matrix = run.matrix
    end = [matrix["scores"][-1][j] for j in range(STAGES - 1)]
    best = [max(row[j] for row in matrix["scores"][j + 1 : -1]) for j in range(STAGES - 1)]
    first, second, third, fourth = run_headline(run)
    assert first == (
        f"After learning {STAGES} tasks one after another, the model answers {share(matrix['summary']['average'])} of "
        "the test questions right, on average over the tasks."
    )
    mean = [share(sum(values) / len(values)) for values in (best, end)]
    assert second == f"The earlier tasks fell from {mean[0]} at their best to {mean[1]}: that was forgotten."
    assert third == "General ability (lasting facts) fell from 62 % to 42 %."
    texts = matrix["general"]["perplexity/held-out"]
    before, after = math.log(texts[0]), math.log(texts[-1])
    assert fourth == f"The loss rose on held-out by {(after - before) / before:.1%}."


def test_a_fall_that_the_test_rows_cannot_tell_from_none_is_called_so(tmp_path: Path):
    run = make_run(tmp_path / "run", "replay")
    matrix = read_json(run / "matrix.json")
    write_json(run / "matrix.json", matrix | {"intervals": {"forgetting": [-0.1, 0.4]}})
    assert "cannot tell from no change" in run_headline(read_run(run))[1]


def test_the_first_sentence_of_an_unfinished_run_counts_its_tasks(tmp_path: Path):
    run = read_run(make_run(tmp_path / "run", finished=False))
    assert run_headline(run)[0] == f"The model has learned 1 of {STAGES} tasks so far."


def test_losses_are_told_as_losses(tmp_path: Path):
    first, second, *_ = run_headline(read_run(make_run(tmp_path / "run", metrics=["loss"] * STAGES, rows=60)))
    assert "the model has a loss of " in first and "The earlier tasks rose from" in second


def test_of_one_task_the_page_tells_what_it_was_before(tmp_path: Path):
    run = read_run(make_run(tmp_path / "run", metrics=["loss"], rows=60, tasks=["tickets"]))
    (before,), (after,) = run.scores
    assert run_headline(run)[0].endswith(f"a loss of {number(after)}; before, {number(before)}.")
    [line], *_ = (picture.lines for picture in run_pictures(run, [range(1)]))
    assert (line.then, line.now, line.change) == (before, after, pytest.approx(before - after))
    assert f"on <bdi>{run.tasks[0]}</bdi></h1>" in page(run.path, tmp_path / "page.html")


def test_a_comparison_says_first_which_method_remembers_most(runs: list[Path]):
    found = compare(read_runs(runs))
    first, second, third, fourth = comparison_headline(found, STAGES, ["accuracy"])
    averages = {row["run"]: share(row["average"]) for row in found.rows}
    assert first == (
        f"Of 2 methods, replay remembers most: after learning {STAGES} tasks one after another, it ends with "
        f"{averages['replay']} of the answers right, and sequential with {averages['sequential']}."
    )
    assert "sequential lost 0.593 and replay 0.185" in second and "General ability went from 62 % to 42 %" in third
    assert fourth == f"For reference: joint {averages['joint']}."
    beside = compare(read_runs([runs[1], runs[0], runs[2]]))
    assert comparison_headline(beside, STAGES, ["accuracy"])[0] == first, "the baseline itself remembers most"


def test_the_first_picture_has_the_scores_then_and_now(runs: list[Path]):
    run = read_run(runs[0])
    tasks, general = run_pictures(run, [range(STAGES)])
    S = run.scores
    assert [(f.start, f.then, f.now) for f in tasks.lines] == [(S[0][j], S[j + 1][j], S[-1][j]) for j in range(STAGES)]
    assert [f.change is None for f in tasks.lines] == [False] * (STAGES - 1) + [True], "the last one cannot have fallen"
    assert [(f.name, f.then, f.now) for f in general.lines] == [("lasting facts", 0.62, pytest.approx(0.42))]
    assert [tasks.place(value) for value in (0, 0.5, 1, 2)] == ["0.0%", "50.0%", "100.0%", "100.0%"]
    rows = compare(read_runs(runs)).rows
    picture, _ = comparison_pictures(rows, lower=False)
    assert [(f.then, f.now) for f in picture.lines] == [(row["new_task"], row["average"]) for row in rows]


def test_of_many_tasks_the_picture_has_those_that_fell_most(tmp_path: Path):
    names = [f"task {j}" for j in range(MOST + 5)]
    run = read_run(make_run(tmp_path / "run", tasks=names, events=2))
    picture = run_pictures(run, [range(len(names))])[0]
    falls = [run.scores[j + 1][j] - run.scores[-1][j] for j in range(len(names))]
    assert len(picture.lines) == MOST and picture.left_out == 5
    assert {f.name for f in picture.lines} == {
        names[j] for j in sorted(range(len(names)), key=lambda j: -falls[j])[:MOST]
    }


def test_the_configuration_of_a_page_begins_the_same_run(runs: list[Path], tmp_path: Path):
    run = read_run(runs[1])
    assert load_config(yaml.safe_load(cite.configuration(run))).model_dump(mode="json") == run.config
    assert "name: replay" in page(runs[1], tmp_path / "page.html")


def test_the_citation_is_that_of_the_repository():
    known = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    fields = dict(re.findall(r"^  (\w+) *= \{\{?(.*?)\}?\},$", cite.bibtex(), re.MULTILINE))
    assert fields == {
        "author": known["authors"][0]["name"],
        "title": known["title"],
        "license": known["license"],
        "url": known["repository-code"],
        "version": known["version"],
    }


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_colours_of_text_can_be_read_on_what_they_stand_on(theme: int):
    """WCAG 2 AA: 4.5 for text, 3 for what only marks something."""
    css = (ROOT / "src/holdfast/report/page.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", re.findall(r":root \{(.*?)\}", css, re.DOTALL)[theme]))

    def contrast(*names: str) -> float:
        dark, light = sorted(luminance(colours[name]) for name in names)
        return (light + 0.05) / (dark + 0.05)

    for ink in ("ink", "muted", "accent", "good", "bad"):
        assert min(contrast(ink, ground) for ground in ("page", "surface")) >= 4.5, ink
    for ink, ground in (
        ("ink", "good-surface"),
        ("ink", "bad-surface"),
        ("good", "good-surface"),
        ("bad", "bad-surface"),
    ):
        assert contrast(ink, ground) >= 4.5, (ink, ground)


def test_answers_of_a_task_that_is_scored_by_its_loss_are_judged_by_the_metric_beside_it(tmp_path: Path) -> None:
    """The lost answers are those of the same run when that metric is its own."""
    plain, by_loss = (make_run(tmp_path / name, "sequential", rows=27) for name in ("plain", "by_loss"))
    matrix = read_json(by_loss / "matrix.json")
    j = len(TASKS) - 2
    task = TASKS[j]
    matrix["beside"] = {task: {"rouge_l": [row[j] for row in matrix["scores"]]}}
    matrix["metrics"][task] = "loss"
    write_json(by_loss / "matrix.json", matrix)
    for path in by_loss.glob(f"stages/*/responses/{task.replace('/', '_')}.jsonl"):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        write_jsonl(
            path, [row | {"score": 3.0, "nats": 6.0, "tokens": 2, "beside": {"rouge_l": row["score"]}} for row in rows]
        )
    wanted, found = (changes(read_run(run), j) for run in (plain, by_loss))
    assert wanted is not None and found is not None and wanted.lost and found.beside == "rouge_l"
    assert [[pair[0]["row"] for pair in pairs] for pairs in (found.lost, found.gained)] == [
        [pair[0]["row"] for pair in pairs] for pairs in (wanted.lost, wanted.gained)
    ]
    assert lost(page(by_loss, tmp_path / "by_loss.html"))[task] == lost(page(plain, tmp_path / "plain.html"))[task]


@pytest.mark.parametrize("right", [0.0, 0.6])
def test_learn_says_where_a_lower_loss_brought_no_right_answer(tmp_path: Path, right: float) -> None:
    path = make_run(tmp_path / "run", "sequential", rows=27)
    matrix = read_json(path / "matrix.json")
    matrix["beside"] = {TASKS[0]: {"rouge_l": [right] * len(matrix["scores"])}}
    write_json(path / "matrix.json", matrix)
    run = read_run(path)
    assert run.learned[TASKS[0]], "its own score rose"
    assert ("its answers are not right yet" in "\n".join(_gained(run, 1))) == (right == 0)
