"""A run that trains whole modules beside its adapter goes on, and is evaluated, served and exported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from holdfast.deploy.export import export
from holdfast.deploy.serve import application
from holdfast.runner.evaluate import evaluate
from holdfast.runner.reload import find_stage
from holdfast.runner.run import run
from holdfast.runner.setup import prepare, resolve
from holdfast.system.progress import Progress
from support.resumed import results, tensors
from support.tiny import tiny_config

QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tuner = {"name": "lora", "r": 2, "lora_dropout": 0.3, "modules_to_save": ["lm_head"]}  # which the model ties
    config = tiny_config(folder, tuner=tuner)
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"max_steps": 3, "save_every": 2}
    run(config, QUIET)
    return folder / "run"


def test_it_resumes_from_a_stage_and_from_a_checkpoint(directory, tmp_path, monkeypatch):
    place = tmp_path / "run"
    shutil.copytree(directory, place)
    shutil.rmtree(place / "stages" / "02-green")
    config = find_stage(directory).config.model_copy(update={"output": str(place)})
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("holdfast.runner.stage.StageWatch.after_step", _stop_at_3)
        run(config, QUIET)
    assert (place / "stages" / "02-green" / "checkpoint" / "checkpoint-2").is_dir()
    run(config, QUIET)
    assert results(place) == results(directory)
    heads = [folder["base_model.model.lm_head.weight"] for folder in tensors(directory).values() if folder]
    assert len(heads) == 2 == len(set(heads)), "the head was not trained"


def _stop_at_3(watch, step, last):
    if step == 3:
        raise SystemExit
    return False


def test_it_is_evaluated_served_and_exported(directory, tmp_path):
    stored = find_stage(directory)
    assert all(changed == 0 for changed in evaluate(directory, progress=QUIET).changed.values())
    assert application(stored) is not None
    ids = {"input_ids": torch.arange(3, 20)[None]}
    measured = stored.measured_model(prepare(resolve(stored.config))).eval()(**ids).logits
    export(directory, tmp_path / "adapter")
    export(directory, tmp_path / "merged", merge=True)
    base = AutoModelForCausalLM.from_pretrained(stored.config.model.name)
    assert torch.allclose(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**ids).logits, measured)
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(**ids).logits, measured, atol=1e-4)
