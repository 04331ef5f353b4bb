"""When a run has the built-in quiz without its being named, and that runs of earlier versions go on without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import holdfast
from holdfast.config.run import RunConfig, load_config
from holdfast.evaluation import abilities
from holdfast.runner.begun import as_begun
from holdfast.runner.check import print_check
from holdfast.runner.quiz import QUIZ
from holdfast.runner.run import run
from holdfast.runner.setup import prepare, resolve
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from holdfast.system.terminal import open_console
from support.tiny import tiny_config

TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template, tasks, and a quiz of four questions."""
    folder = tmp_path_factory.mktemp("quiz")
    tiny_config(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    rows = [{"question": f"what is {a}?", "choices": list("abcd"), "answer": 0, "subject": "language"} for a in "abcd"]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def short_quiz(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abilities, "QUIZ", folder / "quiz.jsonl")


def configured(folder: Path, output: Path, **changes: Any) -> RunConfig:
    values = tiny_config(folder, output=str(output), **changes)
    values["training"] |= {"epochs": 1, "max_steps": 1}
    return load_config(values)


def test_a_run_that_begins_has_it_records_it_and_goes_on(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, tmp_path / "run")
    matrix = run(config, Progress(quiet=True))
    assert list(matrix["general"]) == ["everyday"] and None not in matrix["general"]["everyday"]
    record = read_json(tmp_path / "run" / "run.json")
    assert record["config"]["evaluation"]["general"] == [QUIZ.model_dump(mode="json")]
    assert record["inputs"]["general ability everyday"]["number of rows"] == "4"
    assert run(config, Progress(quiet=True)) == matrix
    print_check(config, open_console())
    named = config.evaluation.model_copy(update={"general": [QUIZ]})
    assert run(config.model_copy(update={"evaluation": named}), Progress(quiet=True)) == matrix


@pytest.mark.parametrize("changes", [{"data": {"template": "plain"}}, {"evaluation": {"general": []}}])
def test_a_run_without_a_chat_template_or_with_its_own_word_has_it_not(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert prepare(resolve(configured(folder, tmp_path / "run", **changes)), begins=True).general == []


def test_a_run_that_began_without_it_goes_on_without_it(folder: Path, tmp_path: Path) -> None:
    config = configured(folder, tmp_path / "run")
    assert config.evaluation.general is None
    record = {"config": config.model_dump(mode="json")}
    assert as_begun(config, record) == config
    assert prepare(resolve(config)).general == []


def test_learn_measures_it_beside_own_samples(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"red {a}?", "answer": "r"} for a in "abcdefghijkl"]
    (tmp_path / "red.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = ["training.max_steps=1", "evaluation.bootstrap=0", "evaluation.max_new_tokens=2", "method=sequential"]
    matrix = holdfast.learn(
        tmp_path / "red.jsonl", tmp_path / "run", folder / "model", progress=Progress(quiet=True), overrides=overrides
    )
    assert set(matrix["general"]) == {"perplexity/own", "everyday"}


def test_a_model_that_cannot_be_asked_has_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An answer of the quiz has more tokens than the model reads."""
    row = {"question": "which?", "choices": ["a", "b" * 200], "answer": 0}
    (tmp_path / "quiz.jsonl").write_text(json.dumps(row), encoding="utf-8")
    monkeypatch.setattr(abilities, "QUIZ", tmp_path / "quiz.jsonl")
    setup = prepare(resolve(configured(folder, tmp_path / "run")), begins=True)
    assert setup.general == [] and setup.config.evaluation.general is None
    assert "the built-in quiz cannot be asked, so it is left out: everyday: row 1" in caplog.text
