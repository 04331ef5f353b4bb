"""A run goes on only with the inputs that it began with: models, texts, tokenizer and code; others are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from holdfast.config.model import ModelConfig
from holdfast.data.tokens.file import build_tokens
from holdfast.deploy.export import export
from holdfast.deploy.serve import serve
from holdfast.errors import RunDirectoryError
from holdfast.lab.pretrain import pretrain
from holdfast.models.weights import check_weights
from holdfast.runner.evaluate import evaluate
from holdfast.runner.inputs import model_inputs, path_inputs
from holdfast.runner.run import run
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from support.command import holdfast
from support.tiny import tiny_config, tiny_model, tiny_tokenizer, write_model

QUIET = Progress(quiet=True)
OWN = '''
"""A method of one's own."""
from holdfast.api import Method

class Own(Method):
    """Nothing."""
    name = "own"
'''


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "general.txt").write_text("red and green\nblue is not red\n" * 8)
    (folder / "wiki").mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / "wiki" / name).write_text("a tide comes and goes\n" * 8)
    (folder / "own.py").write_text(OWN)
    run(configuration(folder), QUIET)
    return folder


def configuration(folder: Path) -> dict[str, Any]:
    rehearsal = {"name": "rehearsal", "source": "general", "path": str(folder / "wiki"), "samples": 4}
    config = tiny_config(folder, tuner={"name": "lora", "r": 2}, method=[str(folder / "own.py"), rehearsal])
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"max_steps": 1}
    config["evaluation"]["general"] = [{"name": "colours", "path": str(folder / "general.txt")}]
    return config


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy in which the second stage is left to train; its configuration still names the original's places."""
    for path in made.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace(str(made), str(tmp_path)))
    (tmp_path / "run" / "manifest.jsonl").unlink()
    shutil.rmtree(tmp_path / "run" / "stages" / "02-green")
    return tmp_path


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.norm.weight"] += 0.01
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def merge_letters(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a":', '"A":'))


CHANGES = {
    "general": (
        lambda f: (f / "general.txt").write_text("other words\n" * 16),
        r"general ability colours: its texts or questions: \w+ -> \w+",
    ),
    "rehearsal": (
        lambda f: (f / "wiki" / "b.txt").write_text("other words\n" * 9),
        r"method rehearsal: path: \S*b\.txt: \w+ -> \w+",
    ),
    "rehearsal, one file more": (
        lambda f: (f / "wiki" / "c.txt").write_text("more\n"),
        r"method rehearsal: path: \S*c\.txt: \(absent\) -> \w+",
    ),
    "weights": (change_weights, r"model: model\.safetensors: \w+ -> \w+"),
    "configuration of the model": (
        lambda f: change_json(f / "model" / "config.json", rms_norm_eps=1e-3),
        r"model: config\.json: \w+ -> \w+",
    ),
    "tokens": (merge_letters, r"tokenizer: tokenizer\.json: \w+ -> \w+"),
    "chat template": (
        lambda f: (f / "model" / "chat_template.jinja").write_text(
            "{% for message in messages %}{{ message.content + '</s>' }}{% endfor %}"
        ),
        r"tokenizer: chat_template\.jinja: \(absent\) -> \w+",
    ),
    "method": (lambda f: (f / "own.py").write_text(OWN + "\n# other\n"), r"method own: own\.py: \w+ -> \w+"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changed_is_refused_and_named(case, place):
    change, line = CHANGES[case]
    change(place)
    with pytest.raises(RunDirectoryError, match=rf"changed since this run began:\n  {line}\nput .*--accept-changes"):
        run(configuration(place), QUIET)
    assert not (place / "run" / "stages" / "02-green").exists()


def test_nothing_is_refused_where_nothing_changed(place):
    run(configuration(place), QUIET)
    assert (place / "run" / "stages" / "02-green" / "stage.json").exists()
    assert "changes" not in read_json(place / "run" / "run.json")


def test_changes_that_are_accepted_are_written_down_and_not_asked_again(place, caplog):
    change_weights(place)
    red = place / "tasks" / "red" / "train.json"
    red.write_text(json.dumps(json.loads(red.read_text())[1:]))
    file = place / "run.yaml"
    file.write_text(json.dumps(configuration(place)))
    assert holdfast("run", file) == 2
    assert holdfast("run", file, "--accept-changes") == 0
    assert "goes on with what changed" in caplog.text
    record = read_json(place / "run" / "run.json")
    [change] = record["changes"]
    assert [line.partition(": ")[0] for line in change["accepted"]] == ["the data of task 'red'", "model"]
    assert record["inputs"]["model"] == model_inputs(ModelConfig(name=str(place / "model")))
    assert holdfast("run", file) == 0


def cut_rows(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())[:-2]))


BARS = {
    "test rows": (lambda f: cut_rows(f / "tasks" / "red" / "test.json"), "task 'red' has 6 test rows, not 8"),
    "general texts": (
        lambda f: (f / "general.txt").write_text("one\n"),
        "general ability colours has 1 rows, not 16",
    ),
}


@pytest.mark.parametrize("case", BARS)
def test_results_that_would_not_fit_together_are_refused_all_the_same(case, place):
    change, line = BARS[case]
    config = configuration(place)
    change(place)
    with pytest.raises(RunDirectoryError, match="changed since this run began"):
        run(config, QUIET)
    with pytest.raises(RunDirectoryError, match=rf"not fit together:\n  {line}\n.*--accept-changes cannot"):
        run(config, QUIET, accept_changes=True)


def test_another_set_of_tasks_is_refused_all_the_same(place):
    config = configuration(place)
    del config["stream"]["order"]
    with pytest.raises(RunDirectoryError, match="tasks: red, green -> blue, green, red\ntasks can only be appended"):
        run(config, QUIET, accept_changes=True)


def test_other_versions_are_a_warning_that_run_json_keeps(place, caplog, monkeypatch):
    now = read_json(place / "run" / "run.json")["versions"]
    monkeypatch.setattr("holdfast.records.directory.versions", lambda: now | {"torch": "9.9", "python": "4.0"})
    for _ in range(2):
        caplog.clear()
        run(configuration(place), QUIET)
        assert f"torch {now['torch']} -> 9.9)" in caplog.text and "python" not in caplog.text
    record = read_json(place / "run" / "run.json")
    assert [change["versions"] for change in record["changes"]] == [[f"torch {now['torch']} -> 9.9"]]
    assert record["versions"] == now


def test_an_adapter_is_not_measured_served_or_exported_on_another_base(place, tmp_path, monkeypatch, caplog):
    change_weights(place)
    trusted = {"trust": True}  # of the run's own method, which a file defines
    commands = {
        "evaluate": lambda **accept: evaluate(place / "run", progress=QUIET, **trusted, **accept),
        "export": lambda **accept: export(place / "run", tmp_path / "out", **trusted, **accept),
        "merge": lambda **accept: export(place / "run", tmp_path / "merged", merge=True, **trusted, **accept),
        "serve": lambda **accept: serve(place / "run", progress=QUIET, **trusted, **accept),
    }
    monkeypatch.setattr("holdfast.deploy.serve._serve", lambda *_: None)
    for command in commands.values():
        with pytest.raises(RunDirectoryError, match=r"model: model\.safetensors: .*\n.*--accept-changes"):
            command()
        command(accept_changes=True)
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_run_of_an_older_version_is_compared_from_now_on(place):
    record = read_json(place / "run" / "run.json")
    del record["inputs"]
    (place / "run" / "run.json").write_text(json.dumps(record))
    run(configuration(place), QUIET)
    change_weights(place)
    with pytest.raises(RunDirectoryError, match=r"model\.safetensors"):
        run(configuration(place), QUIET)


def test_a_hub_model_is_known_by_its_commit(tmp_path, monkeypatch):
    """In the layout of huggingface_hub's cache, which tests read without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for commit in ("0123456789" * 4, "f" * 40):
        folder = tmp_path / "models--some--model"
        write_model(folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        assert model_inputs(ModelConfig(name="some/model")) == {"commit on the hub": commit}
        assert check_weights(ModelConfig(name="some/model"))
    pinned = ModelConfig(name="some/model", revision="0123456789" * 4)
    assert model_inputs(pinned) == {"commit on the hub": pinned.revision}
    assert model_inputs(ModelConfig(name="some/other")) == {}


def test_weights_of_every_kind_are_looked_at(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert len([name for name in model_inputs(ModelConfig(name=str(tmp_path / "shards"))) if "safetensors" in name]) > 2
    assert "pytorch_model.bin" in model_inputs(ModelConfig(name=str(tmp_path / "bin")))


def test_a_token_file_is_known_by_its_manifest(tmp_path):
    (tmp_path / "text.txt").write_text("the tide comes in\n" * 20)
    build_tokens([tmp_path / "text.txt"], tmp_path / "tokens", tiny_tokenizer())
    [name] = path_inputs(tmp_path / "tokens")
    assert Path(name).name == "manifest.json"


def test_a_laboratory_run_does_not_go_on_from_another_model(tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the tide comes in\n" * 20)
    build_tokens([tmp_path / "text.txt"], tmp_path / "tokens", tiny_tokenizer())
    config = {
        "model": {"path": str(tmp_path / "model")},
        "data": [str(tmp_path / "tokens")],
        "context": 16,
        "stop": {"tokens": 64},
        "training": {"batch_size": 2},
        "output": str(tmp_path / "out"),
    }
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("holdfast.lab.pretrain.LabRun.train", _exit)
        pretrain(config, QUIET)
    change_weights(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"model: model\.safetensors"):
        pretrain(config, QUIET)
    assert pretrain(config, QUIET, accept_changes=True)["step"] == 2
    result = tmp_path / "out" / "result.json"
    result.write_text(result.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(RunDirectoryError, match=r"result\.json: is damaged"):
        pretrain(config, QUIET)


def _exit(lab: Any) -> None:
    raise SystemExit
