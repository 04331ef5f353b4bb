"""Runs whose numbers are not finite: they end, nothing of theirs holds NaN or infinity, and every reader copes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import run
from holdfast.errors import ConfigError
from holdfast.models.answers import AnswerCache
from holdfast.records.gate import judge_directory
from holdfast.records.read import read_run
from holdfast.report import write_report
from holdfast.runner.evaluate import evaluate
from holdfast.system.files import read_appended, read_json
from holdfast.system.progress import Progress
from support.json_files import json_below, strict_json
from support.packed import unpack_text
from support.tiny import tiny_config, tiny_model

QUIET = Progress(quiet=True)


def configuration(folder: Path, **changes: Any) -> dict[str, Any]:
    """A task of text, a task of answers, and all kinds of general ability that need no library."""
    config = tiny_config(folder, **changes)
    story = folder / "tasks" / "story"
    story.mkdir(exist_ok=True)
    for split in ("train", "test"):
        rows = [{"text": f"once there was a {word}"} for word in ("fox", "cat", "owl")]
        (story / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "general.txt").write_text("red and green\nblue is not red\n")
    questions = [{"question": f"what is {word}", "choices": ["red", "sea"], "answer": 0} for word in ("ab", "cd")]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (folder / "prompts.txt").write_text("say no\n")
    config["stream"]["order"] = ["red", "story"]
    config["evaluation"]["general"] = [
        {"name": "colours", "path": str(folder / "general.txt")},
        {"name": "questions", "kind": "choices", "path": str(folder / "choices.jsonl")},
        {"name": "prompts", "kind": "refusals", "path": str(folder / "prompts.txt"), "max_new_tokens": 3},
    ]
    return config


def changed_model(folder: Path, factor: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor)
    model.save_pretrained(folder)


def page_json(page: Path) -> None:
    """Everything in the page that its script parses is JSON."""
    html = page.read_text(encoding="utf-8")
    blocks = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, flags=re.S)
    assert blocks
    for block in map(strict_json, blocks):
        for packed in [block["plots"], *(chunk["rows"] for chunk in block.get("rows", {}).get("chunks", []))]:
            strict_json(unpack_text(packed))
    assert not re.search(r'data-value="[^"]*(NaN|Infinity)', html)


@pytest.mark.parametrize("factor", [float("nan"), 1e4], ids=["NaN", "infinite perplexity"])
def test_a_model_that_gives_no_finite_numbers_is_measured_as_far_as_it_can_be(tmp_path, factor):
    config = configuration(tmp_path, method="frozen")
    changed_model(tmp_path / "model", factor)
    matrix = run(config, QUIET)
    directory = tmp_path / "run"
    assert json_below(directory)["matrix.json"] == [matrix] == [read_json(directory / "matrix.json")]
    assert matrix["general"]["perplexity/colours"] == [None] * 3
    assert None not in matrix["general"]["questions"] and None not in matrix["general"]["refusals/prompts"]
    loss_known = not math.isnan(factor)
    assert [(row[0] is not None, row[1] is not None) for row in matrix["scores"]] == [(True, loss_known)] * 3
    page_json(directory / "report.html")
    page_json(write_report([directory, directory], tmp_path / "two.html"))
    checks = judge_directory(directory, {"max_general_loss_increase": 0.1, "max_general_drop": 0.1}, None).checks
    assert [check.verdict for check in checks] == ["not measured", "passed"]
    again = evaluate(directory, stage=0, progress=QUIET)
    assert again.general["perplexity/colours"] == (None, None) and again.changed["red"] == 0
    json_below(directory)


ODD = '''
from holdfast.api.method import Method

class Odd(Method):
    """Logs what is not finite."""
    name = "odd"

    def after_backward(self, step, gradients):
        return {"odd/nan": float("nan"), "odd/inf": float("inf")}
'''


def test_a_value_that_is_logged_and_not_finite_is_null(tmp_path):
    (tmp_path / "odd.py").write_text(ODD)
    config = configuration(tmp_path, method=str(tmp_path / "odd.py"))
    config["training"] |= {"epochs": 1}
    run(config, QUIET)
    terms = json_below(tmp_path / "run")["events.jsonl"][0]["terms"]
    assert terms["odd/nan"] is None and terms["odd/inf"] is None and terms["task"] > 0
    page_json(tmp_path / "run" / "report.html")
    assert read_run(tmp_path / "run").events[0]["terms"] == terms


def test_a_general_loss_that_is_no_longer_finite_is_beyond_its_limit(tmp_path, monkeypatch):
    """The weights of the first stage overflow; watched every three steps, it ends at the third."""
    import holdfast.runner.loop

    config = configuration(tmp_path)
    config["evaluation"] |= {"watch_general": 3, "general": config["evaluation"]["general"][:1]}
    gate = {"max_general_loss_increase": 0.1, "stop_early": True, "on_fail": "continue"}
    monkeypatch.setattr(holdfast.runner.loop, "evaluate_general", lambda *_: {"perplexity/colours": float("nan")})
    run(config | {"gate": gate}, QUIET)
    files = json_below(tmp_path / "run")
    assert files["stages/01-red/stage.json"][0]["stopped_early"]["loss"] is None
    assert [line["general"] for line in files["curves.jsonl"]] == [{"perplexity/colours": None}] * 2
    assert {line["step"] for line in files["curves.jsonl"]} == {3}


def test_an_answer_that_is_not_finite_is_asked_for_again(tmp_path):
    """In the file it would be another one: null."""
    asked: list[list[int]] = []

    def ask(numbers: list[int], add: Any) -> None:
        asked.append(numbers)
        add(numbers, [[float("inf"), 3] if i == 1 else [0.5, 3] for i in numbers])

    for _ in range(2):
        cache = AnswerCache(tmp_path / "answers.jsonl")
        assert cache.complete(["a", "b", "c"], ask) == [[0.5, 3], [float("inf"), 3], [0.5, 3]]
    assert asked == [[0, 1, 2], [1]]
    assert len(read_appended(tmp_path / "answers.jsonl")) == 1
    json_below(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"learning_rate": float("inf")}}, "training.learning_rate: must be a finite number"),
        (
            {"training": {"arguments": {"adam_epsilon": float("nan")}}},
            "adam_epsilon: must be finite, not nan",
        ),
        ({"method": {"name": "ewc", "strength": float("inf")}}, "strength: must be a finite number, not inf"),
    ],
)
def test_a_number_of_the_configuration_must_be_finite(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run(tiny_config(tmp_path) | change, QUIET)
    assert not (tmp_path / "run" / "run.json").exists()
