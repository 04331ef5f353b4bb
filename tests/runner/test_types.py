"""A run settles its data types once, keeps them, and resumes in bfloat16 as in float32."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.config.run import load_config
from holdfast.errors import RunDirectoryError
from holdfast.models import precision
from holdfast.models.precision import NARROWEST, Machine
from holdfast.models.quantization import weight_options
from holdfast.records.former import with_former_defaults
from holdfast.runner.begun import as_begun
from holdfast.runner.run import run
from holdfast.system.files import read_json
from holdfast.system.progress import Progress
from support import forked
from support.guards import GENERAL, TRAINED, case, configuration, tuner_of
from support.paths import TESTS
from support.resumed import results
from support.tiny import tiny_config, tiny_model, tiny_tokenizer, write_tasks

QUIET = Progress(quiet=True)
KILLED = TESTS / "support" / "killed.py"


def on(monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool) -> None:
    """A machine without a GPU, with instructions for bfloat16 or not."""
    monkeypatch.setattr(Machine, "this", classmethod(lambda cls: cls(False, bfloat16)))


def types(folder: Path) -> tuple[str, str]:
    config = read_json(folder / "run" / "run.json")["config"]
    return config["model"]["dtype"], config["training"]["precision"]


def short(folder: Path, **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder, tuner={"name": "lora", "r": 2}, **changes)
    config["stream"]["order"] = ["red"]
    config["training"] |= {"epochs": 1}
    return config


def test_a_run_keeps_the_types_that_it_began_with(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "NARROWEST", 16)
    on(monkeypatch, bfloat16=True)
    config = short(tmp_path)
    run(config, QUIET)
    assert types(tmp_path) == ("bfloat16", "bfloat16")
    [adapter] = (tmp_path / "run").glob("stages/01-red/adapter/*.safetensors")
    assert {t.dtype for t in load_file(adapter).values()} == {torch.float32}
    on(monkeypatch, bfloat16=False)
    config["stream"]["order"] = ["red", "green"]
    run(config, QUIET)
    record = read_json(tmp_path / "run" / "run.json")
    assert types(tmp_path) == ("bfloat16", "bfloat16") and len(record["stages"]) == 2
    config["model"] = {"name": config["model"], "dtype": "float32"}
    with pytest.raises(RunDirectoryError, match=r"model\.dtype: .bfloat16. -> .float32."):
        run(config, QUIET)


@pytest.mark.parametrize(
    ("given", "settled"),
    [
        ({}, ("float32", "float32")),
        ({"model.dtype": "bfloat16"}, ("bfloat16", "float32")),
        ({"training.precision": "bfloat16"}, ("float32", "bfloat16")),
    ],
    ids=["none", "dtype", "precision"],
)
def test_where_one_is_given_the_other_is_float32(given, settled, tmp_path, monkeypatch):
    """A tiny model is float32 on any machine."""
    from holdfast.runner.setup import prepare, resolve

    on(monkeypatch, bfloat16=True)
    if given:
        monkeypatch.setattr(precision, "NARROWEST", 16)
    config = load_config(short(tmp_path), [f"{key}={value}" for key, value in given.items()])
    found = prepare(resolve(config)).config
    assert (found.model.dtype, found.training.precision) == settled


def test_auto_of_an_earlier_version_was_the_type_of_the_checkpoint(tmp_path):
    config = load_config(short(tmp_path, model={"name": str(tmp_path / "model"), "dtype": "auto"}))
    record = with_former_defaults({"tasks": {}, "config": config.model_dump(mode="json")})
    record["config"]["training"]["precision"] = "bfloat16"
    begun = as_begun(config, record)
    assert begun.model.dtype == "stored" and begun.training.precision == "bfloat16"
    assert weight_options(begun.model, "cpu") == {"dtype": "auto"}


@pytest.mark.parametrize(
    ("tuner", "points"),
    [
        ("lora", [("step", 9)]),
        pytest.param("lora", [("weights", 1), ("step", 3)], marks=pytest.mark.slow),
        pytest.param("full", [("weights", 1), ("step", 3)], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_in_bfloat16_ends_as_it_would_have(tuner, points, tmp_path):
    """Killed in the second stage, which a teacher began, and before it measures the first one."""
    config = tiny_config(tmp_path, tuner={"name": "lora", "r": 3} if tuner == "lora" else "full")
    config["model"] = {"name": config["model"], "dtype": "bfloat16" if tuner == "lora" else "float32"}
    config["method"] = ["lwf", "replay"]
    tasks = [{"name": name, "path": str(tmp_path / "tasks" / name), "metric": "loss"} for name in ("red", "green")]
    config["stream"] = {"tasks": tasks}
    config["training"] |= {"epochs": 2, "save_every": 2, "precision": "bfloat16", "learning_rate": 1e-2}
    whole, broken = (config | {"output": str(tmp_path / name)} for name in ("whole", "broken"))
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    for point in points:
        killed = forked.run(KILLED, tmp_path / "broken.json", *point)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    for one in (broken, whole):
        run(one, QUIET)
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


FAST = ("kl_replay", "replace", "inflora", "dual_prompt", "gere_kl")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in TRAINED])
def test_a_method_trains_in_bfloat16(name, tmp_path):
    """On frozen weights in bfloat16, as the defaults have it on machines that gain by it."""
    (tmp_path / "general.txt").write_text(GENERAL)
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in GENERAL.splitlines()))
    tuner = tuner_of(name)
    tuner = {"name": "lora", "r": 2} if tuner == "full" else tuner
    training = {"epochs": 1, "precision": "bfloat16"}
    config = configuration(tmp_path, tmp_path / "run", name, case(name).options, tuner, 0, training)
    config["model"] = {"name": config["model"], "dtype": "bfloat16"}
    run(config, QUIET)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert len(losses) > 3 and all(math.isfinite(loss) for loss in losses)


def test_the_defaults_on_the_narrowest_model_that_gains(tmp_path, monkeypatch):
    """Trained in bfloat16, which any processor can, it learns what it would in float32."""
    write_tasks(tmp_path / "tasks", ["red"])
    wide = {"hidden_size": NARROWEST, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    tiny_model(**wide).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    on(monkeypatch, bfloat16=True)
    losses = []
    for name, model in (("run", {}), ("float32", {"dtype": "float32"})):
        config = short(tmp_path, model={"name": str(tmp_path / "model")} | model, output=str(tmp_path / name))
        config["training"] |= {"epochs": 4, "learning_rate": 1e-3}
        run(config, QUIET)
        events = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        losses.append([event["loss"] for event in events])
    assert types(tmp_path) == ("bfloat16", "bfloat16")
    assert losses[0] != losses[1] and losses[0][-1] < losses[0][0] / 2
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
