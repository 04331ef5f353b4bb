"""learn: month after month into one directory, which is moved and killed, is given the same again, or keeps no rows."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import holdfast
from holdfast.config.run import load_config
from holdfast.config.stream import DataConfig, TaskConfig
from holdfast.data.given import read_given
from holdfast.data.sides import divide
from holdfast.deploy.follow import held_stage
from holdfast.errors import ConfigError, DataError, Interrupted, RunDirectoryError
from holdfast.models.sampling import sample
from holdfast.records.kept import Kept, merged
from holdfast.records.read import read_run
from holdfast.report.learned import _compared, learned_lines
from holdfast.runner.check import print_check
from holdfast.runner.evaluate import evaluate
from holdfast.runner.learn.settings import training_settings, type_settings
from holdfast.runner.learn.take import UNASKED
from holdfast.runner.stage import train_stage as train
from holdfast.system.files import read_json, read_jsonl
from holdfast.system.progress import Progress
from holdfast.system.terminal import open_console
from support.command import holdfast as command
from support.tiny import tiny_config, write_model

torch.set_num_threads(1)

FAST = ["training.max_steps=2", "evaluation.bootstrap=20", "evaluation.max_new_tokens=3", "training.learning_rate=1e-2"]
"""Overrides; all else is what a user gets who says nothing."""


class Said(Progress):
    """A progress that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def rows(name: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    chance = random.Random(f"{name}/{seed}")
    asked = [f"{name} {chr(97 + i % 26)}{i} {chance.randrange(10)}?" for i in range(count)]
    return [{"prompt": prompt, "answer": chance.choice([name[0], name[-1]])} for prompt in asked]


def write(path: Path, found: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return path


def learn(data: Path, into: Path, *args: Any, **options: Any) -> tuple[dict[str, Any], list[str]]:
    said = Said()
    return holdfast.learn(data, into, *args, progress=said, **options), said.lines


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learn")
    write_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def two(place: Path) -> Path:
    """A run of two months."""
    write(place / "red.jsonl", rows("red", 44))
    answers = [f"{row['answer']} as {row['prompt']}" for row in rows("green", 30)]
    lines = ["question,response", *(f"{r['prompt']},{a}" for r, a in zip(rows("green", 30), answers, strict=True))]
    (place / "green.csv").write_text("\n".join(lines), encoding="utf-8")
    learn(place / "red.jsonl", place / "run", place / "model", overrides=FAST)
    learn(place / "green.csv", place / "run")
    return place / "run"


@pytest.fixture
def copy(two: Path, tmp_path: Path) -> Path:
    """The run, moved; its model stays where it is."""
    return Path(shutil.copytree(two, tmp_path / "moved"))


def test_the_second_month_is_measured_from_then_on_and_the_first_goes_on(two: Path):
    matrix = read_json(two / "matrix.json")
    assert matrix["tasks"] == ["red", "green"]
    assert matrix["metrics"] == {"red": "accuracy", "green": "loss"} and set(matrix["beside"]["green"]) >= {"rouge_l"}
    assert matrix["scores"][0][1] is None and None not in [*matrix["scores"][1], *matrix["scores"][2]]
    assert len(matrix["general"]["perplexity/own"]) == 3
    events = read_jsonl(two / "events.jsonl")
    terms = {event["stage"]: set(event["terms"]) for event in events}
    assert terms == {1: {"task", "kl_replay"}, 2: {"task", "replay", "kl_replay"}}


def test_a_stage_ends_with_what_each_score_was_and_is(copy: Path, place: Path):
    matrix, said = learn(write(place / "violet.jsonl", rows("violet", 12)), copy)
    assert f"violet: {UNASKED}" in said, "labels behind bare prompts"
    [line] = [line for line in said if line.startswith("after stage 3 (violet): ")]
    assert f"after stage 2 (green): violet {matrix['scores'][2][2]:.3f}" in said, "what is new, alone"
    assert [
        line for line in said if line.startswith("stage 3 (violet): 2 steps; before the first one the model writes")
    ]
    own = matrix["general"]["perplexity/own"]
    for name, (before, after) in [
        *((task, (matrix["scores"][2][j], matrix["scores"][3][j])) for j, task in enumerate(matrix["tasks"])),
        ("perplexity/own", own[2:]),
    ]:
        assert f"{name} {before:.3f} -> {after:.3f}" in line


def test_data_types_are_settled_before_the_methods_that_a_budget_weighs(place: Path):
    config = tiny_config(place, keep={"general": "100%"}, output=str(place / "kept"))
    assert type_settings(load_config(config)) == {"model": {"dtype": "float32"}, "training": {"precision": "float32"}}


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("holdfast.runner.learn.settings.sample", "stopped in 'the model writes samples of itself' after 0 of "),
        ("holdfast.rehearsal.buffer.sample", "stopped in stage 1/1 red before step 1"),
    ],
)
def test_a_signal_while_the_model_samples_itself_ends_that_at_the_next_token(
    two: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, said: str
):
    drawn = []

    def signalled(model: Any, prompts: list[list[int]], **options: Any) -> Any:
        if len(prompts) == 1:  # a probe
            return sample(model, prompts, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        drawn.append(sample(model, prompts, **options))
        return drawn[-1]

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=said):
        patch.setattr(sampler, signalled)
        learn(place / "red.jsonl", tmp_path / "run", place / "model", overrides=FAST)
    assert not drawn
    matrix, _ = learn(place / "red.jsonl", tmp_path / "run", place / "model", overrides=FAST)
    assert [row[0] for row in matrix["scores"]] == [row[0] for row in read_json(two / "matrix.json")["scores"][:2]]


def test_the_run_keeps_its_rows_in_itself_and_their_hashes(two: Path):
    assert [task["path"] for task in read_json(two / "run.json")["config"]["stream"]["tasks"]] == [
        "{run}/data/01-red",
        "{run}/data/02-green",
    ]
    kept = [row for side in ("train", "test") for row in read_jsonl(two / "data" / "02-green" / f"{side}.jsonl")]
    assert {row["prompt"] for row in kept} == {row["prompt"] for row in rows("green", 30)}
    lines = read_jsonl(two / "data" / "rows.jsonl")
    assert sum(line["task"] == "red" for line in lines) == 44
    noted = {line["path"] for line in read_jsonl(two / "manifest.jsonl")}
    assert {"learn.json", "data/rows.jsonl", "data/01-red", "data/02-green", "general/own"} <= noted


def test_a_kill_loses_a_tenth_of_a_stage_at_most_where_adapters_are_trained(two: Path, place: Path, tmp_path: Path):
    every = {rows: training_settings(rows, adapters=True)["save_every"] for rows in (3, 24, 10_000, 100_000)}
    assert every == {3: 1, 24: 6, 10_000: 125, 100_000: 200}
    assert read_json(two / "run.json")["stages"][0]["config"]["training"]["save_every"] == 6
    learn(place / "red.jsonl", tmp_path / "run", place / "model", overrides=[*FAST, "tuner=full"])
    assert read_json(tmp_path / "run" / "run.json")["config"]["training"]["save_every"] == 200


def test_the_same_data_again_are_known_without_torch(two: Path, place: Path):
    """Under another name, too; the answer is one line."""
    before = sorted(path.stat().st_mtime_ns for path in two.rglob("*") if path.is_file())
    again = write(place / "renamed.jsonl", rows("red", 44))
    code = (
        "import sys; from holdfast.cli.learn import learn; import holdfast\n"
        f"m = holdfast.learn({str(again)!r}, {str(two)!r})\n"
        "assert m['tasks'] == ['red', 'green'] and 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().replace("\n", "").endswith("is learned already, as red; nothing is trained")
    assert sorted(path.stat().st_mtime_ns for path in two.rglob("*") if path.is_file()) == before


def test_a_run_that_was_moved_learns_the_new_rows_of_an_old_file(copy: Path, place: Path):
    """And rows in another order are the same rows."""
    shuffled = write(place / "shuffled.jsonl", rows("red", 44)[::-1])
    _, said = learn(shuffled, copy)
    assert said == [f"{shuffled}: all 44 rows are learned already; nothing is trained"]
    more = write(place / "more.jsonl", [*rows("red", 44), *rows("blue", 12)])
    matrix, said = learn(more, copy, name="red")
    assert matrix["tasks"] == ["red", "green", "red-2"]
    assert "red-2: 6 rows to learn, 6 to test; 44 more are known from before, and left out" in said
    assert {row["prompt"] for row in read_jsonl(copy / "data" / "03-red-2" / "train.jsonl")} <= {
        row["prompt"] for row in rows("blue", 12)
    }
    assert any(f"holdfast rollback {copy} --to 2 " in line for line in learned_lines(read_run(copy)))


def test_data_that_were_taken_in_stay_scored_as_they_were(copy: Path, place: Path, monkeypatch):
    """Learned already, or in training: what the call says of them is not passed over."""

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    said = "^metric: '{}' was taken in with 'accuracy', not '{}'"
    with pytest.raises(ConfigError, match=said.format("red", "acuracy")):
        learn(place / "red.jsonl", copy, metric="acuracy")
    data = write(place / "violet.jsonl", rows("violet", 12))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("holdfast.runner.loop.train_stage", die)
        learn(data, copy)
    with pytest.raises(ConfigError, match=said.format("violet", "loss")):
        learn(data, copy, metric="loss")


@pytest.mark.slow
def test_few_rows_are_passed_over_until_there_are_steps_enough():
    epochs = {rows: training_settings(rows, adapters=True)["epochs"] for rows in (3, 28, 80, 120, 400, 5_000, 20_000)}
    assert epochs == {3: 10, 28: 9, 80: 3, 120: 4, 400: 3, 5_000: 2, 20_000: 1}


def test_settings_of_training_may_change_and_the_method_may_not(copy: Path, place: Path):
    blue = write(place / "blue.jsonl", rows("blue", 12))
    with pytest.raises(RunDirectoryError, match=r"method.*(?s:.)*only gate may change.*give --into another directory$"):
        learn(blue, copy, overrides=["method=ewc"])
    learn(blue, copy, overrides=["training.max_steps=3"])
    assert read_json(copy / "stages" / "03-blue" / "stage.json")["steps"] == 3


@pytest.mark.slow
def test_a_call_that_dies_is_continued_by_the_same_command_and_ends_the_same(copy: Path, place, tmp_path, monkeypatch):
    """After the rows are taken in, and while a further call gives other data, which come second."""
    white, grey = (write(place / f"{name}.jsonl", rows(name, 12)) for name in ("white", "grey"))
    unbroken = Path(shutil.copytree(copy, tmp_path / "unbroken"))
    for data in (white, grey):
        expected, _ = learn(data, unbroken)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    for place_of_death in ("holdfast.records.kept.write_noted", "holdfast.runner.loop.train_stage"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place_of_death, die)
            learn(white, copy)
    matrix, said = learn(grey, copy)
    assert "white is not finished, and comes first" in said
    assert matrix == expected
    weights = [read_json(run / "stages" / "04-grey" / "stage.json")["weights"] for run in (copy, unbroken)]
    assert weights[0] == weights[1]


def test_a_task_given_in_a_call_replaces_that_of_earlier_calls_key_by_key_and_its_columns_as_a_whole():
    given = {"task": {"columns": {"Frage": "prompt"}, "max_new_tokens": 8}}
    assert merged(given, {"task": {"columns": {"q": "prompt"}}})["task"] == {
        "columns": {"q": "prompt"},
        "max_new_tokens": 8,
    }
    assert merged(given, {"task": {"columns": {}}})["task"]["columns"] == {}


def test_rows_that_cannot_be_encoded_are_told_by_their_file_before_the_model_writes(place: Path, tmp_path: Path):
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    talks = [{"messages": [{"role": "user", "content": f"{i}?"}, answer]} for i in range(4)]
    data = write(tmp_path / "calls.jsonl", talks)
    with pytest.raises(DataError, match=f"{re.escape(str(data))}: row"):
        learn(data, tmp_path / "run", place / "model", overrides=FAST)
    assert not (tmp_path / "run" / "general").exists() and not (tmp_path / "run" / "learn.json").exists()


def test_rows_that_cannot_be_encoded_are_left_out_of_the_runs_copy(place: Path, tmp_path: Path, monkeypatch):
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    talks = [{"messages": [talk[0] | {"content": f"{i}?"}, talk[1]]} for i in range(24)]
    offered = [{"type": "function", "function": {"name": "look"}}]
    talks[::6] = [row | {"tools": offered} for row in talks[::6]]

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("holdfast.runner.learn.settings.write_own_samples", die)
    with pytest.raises(KeyboardInterrupt):
        learn(
            write(tmp_path / "talks.jsonl", talks),
            tmp_path / "run",
            place / "model",
            overrides=[*FAST, "data.on_bad_row=skip"],
        )
    kept = [
        row
        for side in ("train", "test")
        for row in read_jsonl(tmp_path / "run" / "data" / "01-talks" / f"{side}.jsonl")
    ]
    assert len(kept) == 20 and not any("tools" in row for row in kept)
    assert len(read_jsonl(tmp_path / "run" / "data" / "rows.jsonl")) == 24, "and known when they come again"


def test_duplicates_and_contradictions_are_counted(tmp_path: Path):
    [first, second, *rest] = rows("red", 12)
    found = [first, second, *rest, first, first | {"answer": "another"}]
    file = write(tmp_path / "red.jsonl", found)
    given = read_given(str(file), TaskConfig(name="red", path=str(file)), DataConfig())
    notes = divide(given, {}, set(), 0.1).notes
    assert "duplicate rows: 1; rows that ask again with another answer: 1" in notes


def test_another_model_is_refused_and_one_that_moved_is_not(copy: Path, place: Path, tmp_path: Path):
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"--model: .* has learned from .*model, and what it learned fits no other"):
        learn(place / "red.jsonl", copy, other)
    twin = Path(shutil.copytree(place / "model", tmp_path / "twin"))
    _, said = learn(place / "red.jsonl", copy, twin)
    assert "learned already" in said[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--model: .* has learned nothing yet"),
        ({"model": "model", "overrides": ["stream.path=x"]}, "stream: is not for learn"),
        ({"model": "model", "overrides": ["trainin.epochs=2"]}, "trainin: unknown key; did you mean 'training'"),
        ({"model": "model", "overrides": ["task.fromat=text"]}, "fromat: unknown key; did you mean 'format'"),
        ({"model": "model", "metric": "acuracy"}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
        ({"model": "model", "memory": "some"}, "--memory: must be rows or none"),
        ({"model": "model", "name": ""}, "--name: is empty"),
        ({"model": "model", "overrides": ["task=text"]}, "task: must be a section .*, not 'text'"),
        ({"model": "model", "overrides": ["task.path=x"]}, "task.path: is not for learn: DATA says it"),
        ({"model": "model", "overrides": ["task.name=x"]}, "task.name: is not for learn: --name says it"),
        ({"model": "model", "overrides": ["task.labels=[]"]}, "task: labels: must have at least 1 entry"),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_written(place, tmp_path, options: dict[str, Any], said: str):
    data = write(tmp_path / "red.jsonl", rows("red", 12))
    if "model" in options:
        options = options | {"model": place / options["model"]}
    with pytest.raises(ConfigError, match=said):
        holdfast.learn(data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "run.json").exists() and not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("overrides", [["method=replay"], ["tuner=null", "evaluation.general=[]"]])
def test_a_method_alone_is_learned_with_the_tuner_that_it_needs(place, tmp_path, overrides: list[str]):
    data = write(tmp_path / "red.jsonl", rows("red", 12))
    learn(data, tmp_path / "run", place / "model", overrides=[*FAST, *overrides])
    assert read_json(tmp_path / "run" / "run.json")["config"]["tuner"]["name"] == "lora"


def test_own_samples_can_be_measured_beside_any_method(place, tmp_path):
    general = {"evaluation": {"general": [{"name": "own", "path": "{run}/general/own"}]}}
    data = write(tmp_path / "red.jsonl", rows("red", 12))
    overrides = [*FAST, "method=sequential"]
    matrix, _ = learn(data, tmp_path / "run", place / "model", config=general, overrides=overrides)
    assert None not in matrix["general"]["perplexity/own"]


def test_a_run_without_memory_keeps_no_row_on_disk(place: Path, tmp_path: Path):
    """No prompt and no answer, closed or open; earlier tasks are then not measured, and that is said."""
    run = tmp_path / "run"
    canary = [row | {"answer": f"canary{i}zebra"} for i, row in enumerate(rows("secret", 24))]
    closed = [row | {"answer": "walrus" if i % 2 else "ostrich"} for i, row in enumerate(rows("quokka", 24))]
    learn(write(tmp_path / "one.jsonl", canary), run, place / "model", memory="none", overrides=FAST)
    first = read_json(run / "matrix.json")
    matrix, _ = learn(write(tmp_path / "two.jsonl", closed), run)
    files = [path for path in run.rglob("*") if path.is_file()]
    for word in ("canary", "zebra", "secret", "walrus", "ostrich", "quokka"):
        assert not [path for path in files if word.encode() in path.read_bytes()], word
    assert matrix["scores"][1][0] == first["scores"][1][0] and matrix["scores"][2][0] is None
    assert matrix["scores"][1][1] is not None and matrix["scores"][2][1] is not None
    assert read_json(run / "run.json")["tasks"]["one"]["train"] == 12
    assert {method["name"] for method in read_json(run / "run.json")["config"]["method"]} == {"kl_replay"}
    _, said = learn(tmp_path / "one.jsonl", run)
    assert "learned already" in said[0]
    assert Kept.read(run).seen()[0]  # the sides of prompts hold all the same
    with pytest.raises(ConfigError, match="began with 'none'"):
        learn(tmp_path / "one.jsonl", run, memory="rows")
    with pytest.raises(ConfigError, match="keeps no rows"):
        evaluate(run)


def test_the_command_says_what_was_learned_and_of_known_data_one_line(copy: Path, place: Path, capsys):
    screen = "\n".join(learned_lines(read_run(copy)))
    assert screen.startswith("stage 2: green")
    for part in ("rouge_l", "red  accuracy", "general loss on its own samples", "holdfast serve", "report.html"):
        assert part in screen
    assert [_compared(change) for change in (0.25, -0.25, -0.0001)] == ["0.250 better", "0.250 worse", "the same"]
    commands = [line.removeprefix("  holdfast ") for line in screen.splitlines() if line.startswith("  holdfast ")]
    assert len({len(line) - len(line.partition("  ")[2].lstrip()) for line in commands}) == 1, "what for is a column"
    assert command("learn", place / "red.jsonl", "--into", copy) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("nothing is trained") == 1


@pytest.mark.slow
def test_after_a_rollback_the_screen_is_about_what_the_run_holds(copy: Path, place: Path, monkeypatch):
    """Undone stages are no way back, and a stage that the gate undid has figures of its own in `status` alone."""
    holdfast.rollback(copy, to=1, progress=Said())
    learn(write(place / "violet.jsonl", rows("violet", 12)), copy)
    screen = "\n".join(learned_lines(read_run(copy)))
    assert "red  accuracy" in screen and "green" not in screen
    assert f"holdfast rollback {copy} --to 1 " in screen
    strict = {"gate": {"min_learned": 2.0, "on_fail": "rollback"}}
    held = []
    monkeypatch.setattr("holdfast.runner.loop.train_stage", lambda *a: [held.append(held_stage(copy)), train(*a)][1])
    learn(write(place / "brown.jsonl", rows("brown", 12)), copy, config=strict)
    assert held == [3], "a stage that was finished without a gate stays in service while the next is trained"
    screen = "\n".join(learned_lines(read_run(copy)))
    assert screen.startswith("stage 4: brown") and "went back from it and holds stage 3 (violet)\n" in screen
    assert "accuracy" not in screen and "holdfast status" in screen and "holdfast rollback" not in screen


@pytest.mark.slow
def test_a_run_that_learn_did_not_begin_goes_on_to_learn(tmp_path: Path):
    """With its method and its data where they are; what its test asks is not learned."""
    config = tiny_config(tmp_path)
    config["training"] |= {"max_steps": 2, "epochs": 1}
    config["stream"]["order"] = ["red"]
    holdfast.run(config, Said())
    [first, *_] = json.loads((tmp_path / "tasks" / "red" / "test.json").read_text(encoding="utf-8"))
    trained = json.loads((tmp_path / "tasks" / "red" / "train.json").read_text(encoding="utf-8"))
    new = write(tmp_path / "white.jsonl", [first | {"answer": "z"}, *trained[:3], *rows("white", 12)])
    matrix, said = learn(new, tmp_path / "run")
    assert matrix["tasks"] == ["red", "white"] and len(matrix["scores"]) == 3
    assert any("3 more are known from before" in line for line in said)
    tested = [row["prompt"] for row in read_jsonl(tmp_path / "run" / "data" / "02-white" / "test.jsonl")]
    assert first["prompt"] in tested
    said_now = f"{tmp_path / 'run'}: this run is continued by learn now; go on with holdfast learn DATA --into "
    with pytest.raises(RunDirectoryError) as error:
        holdfast.run(config, Said())
    assert str(error.value) == said_now + str(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="continued by learn"):
        print_check(load_config(config), open_console())
    assert {method["name"] for method in read_json(tmp_path / "run" / "run.json")["config"]["method"]} == {"sequential"}


@pytest.mark.slow
def test_a_run_that_was_made_again_without_a_month_goes_on(copy: Path, place: Path):
    holdfast.rebuild(copy, without="red", progress=Said())
    canary = rows("red", 44)[7]["prompt"].encode()
    assert not [path for path in copy.rglob("*") if path.is_file() and canary in path.read_bytes()]
    matrix, _ = learn(write(place / "blue.jsonl", rows("blue", 12)), copy)
    assert matrix["tasks"] == ["green", "blue"] and matrix["scores"][2][0] is not None
    assert sorted(path.name for path in (copy / "data").iterdir()) == ["01-green", "02-blue", "rows.jsonl"]


@pytest.mark.slow
def test_data_of_an_undone_stage_can_be_learned_again_and_their_prompts_stay_on_their_sides(copy: Path, place: Path):
    tested = {row["prompt"] for row in read_jsonl(copy / "data" / "02-green" / "test.jsonl")}
    holdfast.rollback(copy, to=1)
    matrix, said = learn(place / "green.csv", copy)
    assert matrix["tasks"] == ["red", "green", "green-2"]
    assert {row["prompt"] for row in read_jsonl(copy / "data" / "03-green-2" / "test.jsonl")} == tested
    assert any("as in earlier tests" in line for line in said)
