"""Exports of models that see: plain transformers answers questions about pictures as the run did."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available

from holdfast import run
from holdfast.config.model import ModelConfig
from holdfast.deploy.export import export
from holdfast.models.pretrained import load_model_config, load_tokenizer
from holdfast.models.sight import PROCESSOR_FILES, load_sight
from holdfast.system.files import read_json, read_jsonl, write_json
from holdfast.system.progress import Progress
from support.sight import _NoVideo, seeing_config, write_seeing, write_seen_tasks

FAMILIES = ("llava", "qwen2_5_vl")
QUIET = Progress(quiet=True)
STAGE = "stages/02-green"


def taught(folder: Path, family: str, **changes: Any) -> Path:
    """A run on a tiny model whose answers differ from picture to picture."""
    if not (folder / "model").exists():
        write_seeing(folder / "model", family)
        write_seen_tasks(folder / "tasks")
        settings = read_json(folder / "model" / "processor_config.json")
        write_json(folder / "model" / "processor_config.json", settings | {"kept": "as it was"})
    config = seeing_config(folder, family, **changes)
    run(config | {"training": config["training"] | {"epochs": 1, "learning_rate": 3e-3}}, QUIET)
    return Path(config["output"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run of a family and a tuner, once."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, tuner: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / family
        folder.mkdir(exist_ok=True)
        if (family, tuner) not in made:
            made[family, tuner] = taught(folder, family, tuner=tuner, output=str(folder / tuner))
        return made[family, tuner]

    return get


def plain_processor(folder: Path, family: str) -> Any:
    """transformers' own; without torchvision one of the same files whose part for videos is left out."""
    if is_torchvision_available() or family == "llava":
        return AutoProcessor.from_pretrained(folder)
    import transformers

    images, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    kind = getattr(transformers, read_json(folder / "processor_config.json")["processor_class"])
    return _NoVideo(kind, images, tokenizer, None, chat_template=tokenizer.chat_template)


def plain_answers(folder: Path, family: str, rows: list[dict[str, Any]], pictures: Path) -> list[str]:
    """What plain transformers and PEFT answer, a question at a time."""
    if (folder / "adapter_config.json").exists():
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        model: Any = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), folder)
        model.generation_config = type(model.generation_config).from_pretrained(folder)
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder)
    processor, answers = plain_processor(folder, family), []
    for row in rows:
        parts = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
        image = Image.open(pictures / row["image"]).convert("RGB")
        inputs = processor(text=[text], images=[image], return_tensors="pt", add_special_tokens=False)
        new = model.eval().generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["full", "adapter", "merged"])
def test_plain_transformers_answers_as_the_run_did(runs: Any, family: str, what: str, tmp_path: Path):
    directory = runs(family, "full" if what == "full" else "lora")
    exported = export(directory, tmp_path / "out", merge=what == "merged")
    assert exported.sees
    settings = read_json(tmp_path / "out" / "generation_config.json")
    config = read_json(directory.parent / "model" / "config.json")
    assert settings["suppress_tokens"] == [config.get("image_token_id", config.get("image_token_index"))]
    base = directory.parent / "model"
    for name in PROCESSOR_FILES:
        assert (tmp_path / "out" / name).exists() == (base / name).exists()
    assert read_json(tmp_path / "out" / "processor_config.json") == read_json(base / "processor_config.json")
    for task in ("red", "green"):
        measured = read_jsonl(directory / STAGE / "responses" / f"{task}.jsonl")
        rows = read_json(directory.parent / "tasks" / task / "test.json")
        found = plain_answers(tmp_path / "out", family, rows, directory.parent / "tasks" / task)
        assert found == [one["response"] for one in measured]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_differ_from_picture_to_picture(runs: Any, family: str):
    tasks = [read_jsonl(runs(family, "full") / STAGE / "responses" / f"{task}.jsonl") for task in ("red", "green")]
    assert all(len({one["response"] for one in task}) > 1 for task in tasks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_folder_of_a_stage_is_a_model_to_begin_with(runs: Any, family: str):
    config = ModelConfig(name=str(runs(family, "full") / STAGE / "model"))
    sight = load_sight(config, load_model_config(config), load_tokenizer(config))
    assert sight is not None and sight.processor.image_processor.size


@pytest.mark.parametrize("template", ["auto", "plain"])
def test_the_card_asks_about_a_picture(
    runs: Any, template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = runs("llava", "lora")
    if template == "plain":
        output = str(directory.parent / "plain")
        directory = taught(directory.parent, "llava", tuner="lora", data={"template": template}, output=output)
    export(directory, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "It sees" in card and "--enable-lora" in card
    [measured, *_] = read_jsonl(directory / STAGE / "responses" / "red.jsonl")
    [row, *_] = read_json(directory.parent / "tasks" / "red" / "test.json")
    [program] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    for name, value in (
        ("FOLDER", tmp_path / "out"),
        ("PICTURE.png", directory.parent / "tasks" / "red" / row["image"]),
        ("QUESTION", row["prompt"]),
        ("max_new_tokens=64", "max_new_tokens=3"),
    ):
        assert name in program
        program = program.replace(name, str(value))
    torch.manual_seed(0)
    exec(program, {})
    assert capsys.readouterr().out.strip() == measured["response"]


def test_an_adapter_of_the_tower_is_not_said_to_be_served(runs: Any, tmp_path: Path):
    directory = taught(
        runs("llava", "lora").parent,
        "llava",
        tuner={"name": "lora", "target": "vision", "r": 2},
        output=str(tmp_path / "run"),
    )
    export(directory, tmp_path / "out")
    assert "`vllm serve` does not take this adapter" in (tmp_path / "out" / "README.md").read_text()
