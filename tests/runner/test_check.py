"""`holdfast check` finds what a run would die of, and a run finds it before anything is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from holdfast.metrics.chance import against_chance
from holdfast.report.text import at_chance, number
from holdfast.system.files import read_json
from support.command import holdfast
from support.tiny import tiny_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    path = folder / "run.yaml"
    path.write_text(json.dumps(tiny_config(folder)))
    return path


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("schedule=cosin", "cosin is not a valid SchedulerType"),
        ("schedule=cosine_with_min_lr", "training.schedule: 'cosine_with_min_lr' cannot be used: One of min_lr"),
        ("schedule=reduce_lr_on_plateau", "reduce_lr_on_plateau"),
        ("arguments={lr_scheduler_kwargs: {x: 1}}", "training.schedule: 'cosine' cannot be used"),
        ("optimizer=galore_adamw", "training.optimizer: 'galore_adamw' cannot be used: You need to install"),
        ("arguments={adam_beta1: 2}", "training.optimizer: 'adamw_torch' cannot be used: Invalid beta"),
        ("arguments={dataloader_num_workers: -1}", "training.arguments: cannot be used: num_workers"),
        ("arguments={dataloader_prefetch_factor: 2}", "dataloader_prefetch_factor"),
    ],
)
def test_what_a_run_would_die_of(config: Path, capsys: pytest.CaptureFixture[str], key: str, said: str) -> None:
    for command in ("check", "run"):
        assert holdfast(command, config, f"training.{key}") == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("holdfast: training") and said in message
    assert not list((config.parent / "run").rglob("*.jsonl"))


def test_an_adapter_is_no_model(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    assert holdfast("check", config, f"model.name={tmp_path}") == 2
    said = capsys.readouterr().err
    assert "is an adapter and not a whole model" in said and "(some/base)" in said and "--merge" in said


def test_float16_weights_are_not_trained(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(json.loads(config.read_text())["model"], tmp_path / "model")
    described = json.loads((model / "config.json").read_text()) | {"dtype": "float16"}
    (model / "config.json").write_text(json.dumps(described))
    assert holdfast("check", config, f"model={{name: {model}, dtype: stored}}") == 2
    assert "auto, float32 or bfloat16 would do" in capsys.readouterr().err
    assert holdfast("check", config, f"model={{name: {model}}}") == 0


def test_general_abilities_are_measured_on_demand(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --general the questions and chance; with it what a run measures before training, and the verdict."""
    questions = tmp_path / "questions.jsonl"
    rows = [
        {
            "question": f"is it {k}?",
            "choices": ["a", "b", "c", "d"][: 2 + 2 * (k % 2)],
            "answer": k // 2 % 2 + 2 * (k % 2),
        }
        for k in range(8)
    ]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("red and green\nblue\n")
    measures = [
        {"name": "quiz", "path": str(questions), "kind": "choices"},
        {"name": "texts", "path": str(tmp_path / "texts.txt")},
        {"name": "no", "path": str(tmp_path / "texts.txt"), "kind": "refusals"},
    ]
    general = f"evaluation.general={json.dumps(measures)}"
    assert holdfast("check", config, general) == 0
    said = capsys.readouterr().out
    assert "quiz: 8 questions by acc, chance 0.375" in said
    assert "texts: perplexity, 2 texts" in said and "no: refusals, 2 prompts" in said
    assert holdfast("check", config, general, "--general") == 0
    said = capsys.readouterr().out
    output = tmp_path / "run"
    assert holdfast("run", config, general, f"output={output}", "method=frozen") == 0
    matrix = read_json(output / "matrix.json")
    for name in ("quiz", "perplexity/texts", "refusals/no"):
        assert f"{name}: {number(matrix['general'][name][0])}" in said
    found = matrix["chance"]["quiz"]
    right = round(8 * matrix["general"]["quiz"][0])
    assert found == against_chance(right, 8, 0.375) and list(matrix["chance"]) == ["quiz"]
    verdict = "at chance, so a fall cannot show" if found["at_chance"] else "above chance"
    assert f"of 8 questions, chance 0.375: {verdict}" in said
    assert (at_chance(matrix) is not None) is found["at_chance"]
    assert (at_chance(matrix) or "") in capsys.readouterr().err


def test_nothing_to_measure_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert holdfast("check", config, "--general") == 2
    assert "evaluation.general: names no measure" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["gere", "kl_replay"])
def test_a_text_that_is_not_there_is_found_first(config: Path, capsys: pytest.CaptureFixture[str], method: str) -> None:
    for command in ("check", "run"):
        assert holdfast(command, config, f"method={{name: {method}, path: nowhere.txt}}") == 2
        said = capsys.readouterr().err
        assert f"method {method}: path: there is no file or folder 'nowhere.txt'" in said
        assert "before training" not in said


@pytest.mark.parametrize(("measured", "warned"), [("texts.txt", True), ("other.txt", False)])
def test_a_measure_of_what_is_rehearsed_is_told(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, measured: str, warned: bool
) -> None:
    for name in ("texts.txt", "other.txt"):
        (tmp_path / name).write_text("\n".join(f"the {a} sea holds" for a in "abcdefgh"))
    general = f"evaluation.general=[{{name: sea, path: {tmp_path / measured}}}]"
    assert holdfast("check", config, f"method={{name: gere_kl, path: {tmp_path / 'texts.txt'}}}", general) == 0
    told = [line for line in caplog.messages if "'sea' is measured on what gere_kl rehearses" in line]
    assert len(told) == warned


def test_an_output_that_cannot_be_used(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    assert holdfast("run", config, "method=frozen", f"output={tmp_path / 'run'}") == 0
    assert holdfast("check", config, "method=frozen", f"output={tmp_path / 'run'}") == 0
    capsys.readouterr()
    for name, said in (("file", "is a file"), ("other", "holds other files"), ("run", "another configuration")):
        assert holdfast("check", config, f"output={tmp_path / name}") == 2
        assert said in capsys.readouterr().err


def test_a_penalty_may_be_zero_in_two_steps_and_no_more(config: Path, tmp_path: Path) -> None:
    """Warm-up begins with a learning rate of 0, so the second step too starts from the anchor."""
    output = f"output={tmp_path / 'out'}"
    assert holdfast("run", config, "method=ewc", "training.max_steps=2", output) == 0


def test_rows_that_are_too_long_are_listed_at_once(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """In the test split, too, whose prompts need room for the response."""
    long = [{"instruction": "red " * 60, "output": f"red {n}"} for n in range(3)]
    short = [{"instruction": f"blue {n}", "output": "blue"} for n in range(9)]
    folder = tmp_path / "task"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(short + long))
    stream = f"stream={{path: {folder}}}"
    assert holdfast("check", config, stream, "data.max_length=48") == 2
    said = capsys.readouterr().err
    assert "6 rows cannot be used" in said and "train.json: row 10: has" in said and "test.json: row 12: has" in said
    out = f"output={tmp_path / 'out'}"
    assert (
        holdfast("run", config, stream, "data.max_length=48", "data.on_bad_row=skip", "training.max_steps=1", out) == 0
    )
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["tasks"]["task"]
    assert (counts["train"], counts["test"]) == (9, 9)
