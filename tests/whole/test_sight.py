"""Runs on models that see: every method and tuner that can work with one does, the others are refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast import methods, tuners
from holdfast.records.thumbnails import thumbnails
from holdfast.system.files import read_json, read_jsonl
from support.command import holdfast as command
from support.engine_jobs import alone, done, error, job, launch
from support.goes_on import STEPS, check_goes_on, check_method, run, write_texts
from support.guards import tuner_of, weights
from support.paths import DOCS
from support.sight import SEEING, seeing_config
from support.tiny import write_model

OWN = {name: methods.find(name) for name in sorted(methods.METHODS.own)}
TUNERS = {name: tuners.find(name) for name in sorted(tuners.TUNERS.own)}


def refused(name: str) -> bool:
    """Whether a method cannot work with a model that sees, or no tuner that it works with can."""
    bound = OWN[name].tuners or ((tuner_of(name),) if isinstance(tuner_of(name), str) else ())
    return bool(OWN[name].text_only) or (bool(bound) and all(TUNERS[tuner].text_only for tuner in bound))


WORKING = [name for name in OWN if not refused(name)]
FAST = ("kl_replay",)
OPTIONS: dict[str, dict[str, Any]] = {"gere": {"multiple": 0.1}}
OPTIONS |= {name: {"length": 40} for name in ("kl_pre", "ntp_pre", "replace")}  # beside the tokens of a chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sight")
    seeing_config(path)
    write_texts(path)
    return path


def config_of(folder: Path, output: Path, method: Any, tuner: Any = "full", **changes: Any) -> dict[str, Any]:
    config = seeing_config(folder) | {"method": method, "tuner": tuner, "output": str(output)} | changes
    return config | {"training": STEPS}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in WORKING])
def test_a_method_trains_saves_and_continues(name, folder, tmp_path, monkeypatch):
    check_method(OWN[name], OPTIONS.get(name, {}), config_of, folder, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, cls in TUNERS.items() if not cls.text_only])
def test_a_tuner_trains_saves_and_continues(name, folder, tmp_path, monkeypatch):
    method = ["replay", {"name": "gere_kl", "path": str(folder / "general.txt")}]
    check_goes_on(config_of(folder, tmp_path, method, name), tmp_path, monkeypatch, "02-green")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "smolvlm" else pytest.mark.slow) for n in SEEING])
def test_a_family_trains_all_its_parts_and_continues(name, tmp_path, monkeypatch):
    config = seeing_config(tmp_path, name) | {"method": "replay", "training": STEPS}
    check_goes_on(config | {"tuner": {"name": "full", "target": "all"}}, tmp_path, monkeypatch, "02-green")


REFUSED = [(name, {"method": name}) for name in OWN if name not in WORKING]
REFUSED += [(name, {"method": "sequential", "tuner": name}) for name, cls in TUNERS.items() if cls.text_only]


@pytest.mark.parametrize(("name", "changes"), REFUSED)
def test_what_reads_text_alone_is_refused_by_name_with_the_reason(name, changes, folder, tmp_path, capsys):
    config = config_of(folder, tmp_path / "run", **{"method": "sequential"} | changes)
    if "tuner" not in changes:
        del config["tuner"]
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert command("run", tmp_path / "run.yaml") == 2
    said = " ".join(capsys.readouterr().err.split())
    cls: Any = OWN.get(name) if name in OWN and OWN[name].text_only else None
    cls = cls or TUNERS[name if name in TUNERS else [*OWN[name].tuners, tuner_of(name)][0]]
    assert f"{cls.kind} {cls.name}: the model sees (llava), and {cls.text_only}" in said
    assert not (tmp_path / "run" / "stages").exists()


def test_the_page_names_every_method_and_tuner_that_is_refused():
    page = (DOCS / "images.md").read_text(encoding="utf-8")
    section = page.partition("## What is refused")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert named == {name for name, _ in REFUSED}


def test_packing_is_refused(folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(config_of(folder, tmp_path / "run", "sequential")))
    assert command("check", tmp_path / "run.yaml", "data.packing=true") == 2
    assert "data.packing: the model sees (llava)" in " ".join(capsys.readouterr().err.split())


def test_check_shows_the_picture_in_its_place(folder, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(config_of(folder, tmp_path / "run", "sequential")))
    assert command("check", tmp_path / "run.yaml") == 0
    said = capsys.readouterr().out
    assert re.search(r"\[user\]<0-0\.png \d+x\d+, 4 tokens>red\?</s>\[assistant\]\[r</s>\]", said)


def test_a_model_that_reads_text_alone_says_so_of_a_picture(folder, tmp_path, capsys):
    config = config_of(folder, tmp_path / "run", "sequential") | {"model": str(write_model(tmp_path / "text"))}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert command("check", tmp_path / "run.yaml") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "train.json: row 1: shows a picture, and the model reads text alone" in said


def test_rows_with_one_picture_several_and_none_share_a_task(folder, tmp_path):
    config = config_of(folder, tmp_path / "run", "replay")
    tasks = shutil.copytree(folder / "tasks", tmp_path / "tasks")
    for seed, name in enumerate(("red", "green")):
        rows = [
            {"image": f"{seed}-0.png", "prompt": f"{name}?", "answer": "a"},
            {"prompt": f"two and two, {name}?", "answer": "b"},
            {
                "images": [f"{seed}-{n}.png" for n in (1, 2, 1)],
                "prompt": "<image> or <image>, or <image>?",
                "answer": "c",
            },
        ]
        for split, said in (("train", "one"), ("test", "two")):
            own = [row | {"prompt": f"{row['prompt']} {said}"} for row in rows]
            (tasks / name / f"{split}.json").write_text(json.dumps(own))
    matrix = run(config | {"stream": {"path": str(tasks), "order": ["red", "green"]}})
    assert None not in matrix["scores"][-1]
    [rows] = [read_jsonl(path) for path in (tmp_path / "run/stages/02-green/responses").glob("red.jsonl")]
    assert [len(row.get("shown", ())) for row in rows] == [1, 0, 3]


def test_a_run_does_not_go_on_with_another_processor(folder, tmp_path, capsys):
    config = config_of(folder, tmp_path / "run", "sequential")
    model = shutil.copytree(config["model"], tmp_path / "model")
    (tmp_path / "run.yaml").write_text(json.dumps(config | {"model": str(model)}))
    assert command("run", tmp_path / "run.yaml", "stream.order=[red]") == 0
    settings = json.loads((model / "processor_config.json").read_text())
    settings["image_processor"]["image_mean"] = [0.1, 0.1, 0.1]
    (model / "processor_config.json").write_text(json.dumps(settings))
    assert command("run", tmp_path / "run.yaml") == 2
    assert "processor: processor_config.json" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
@pytest.mark.parametrize("tuner", [{"name": "lora", "r": 2}, {"name": "full", "target": "all"}], ids=["lora", "full"])
def test_two_processes_learn_what_one_does(engine, tuner, folder, tmp_path):
    """Texts are rehearsed beside pictures, so that one process may have a picture where the other has none."""
    method = ["replay", {"name": "gere_kl", "path": str(folder / "general.txt")}]
    one = config_of(folder, tmp_path / "one", method, tuner)
    two = config_of(folder, tmp_path / "two", method, tuner) | {"training": STEPS | {"engine": engine}}
    alone([one])
    launch([job(two)], 2, tmp_path)
    assert done(two), error(two)
    wanted, got = (weights(tmp_path / name, "02-green") for name in ("one", "two"))
    assert wanted.keys() == got.keys()
    for key in wanted:  # Adam divides by a gradient's size, so that rounding moves entries whose gradient is near zero
        torch.testing.assert_close(got[key], wanted[key], atol=2e-4, rtol=0, msg=lambda said, key=key: f"{key}: {said}")
    scores = [read_json(tmp_path / name / "matrix.json")["scores"] for name in ("one", "two")]
    assert scores[0] == scores[1]


LEARNING = {"epochs": 14, "batch_size": 8, "learning_rate": 1e-2, "log_every": 5, "save_every": 100}


@pytest.fixture(scope="module")
def forgetting(folder, tmp_path_factory):
    """What is forgotten, by method: bright pictures have one letter and dark ones another, in each task other letters.

    The weights of all parts are trained, so that the answers to the first task depend on what the tower sees.
    """
    output, found = tmp_path_factory.mktemp("learned"), dict[str, dict[str, Any]]()

    def of(method: str, **options: Any) -> dict[str, Any]:
        if method not in found:
            config = config_of(folder, output / method, {"name": method} | options, {"name": "full", "target": "all"})
            found[method] = run(config | {"training": LEARNING})["summary"] | {"path": output / method}
        return found[method]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("replay", {"ratio": 0.5}),
        ("rehearsal", {"loss": "kl"}),
        ("der", {"ratio": 1.0, "weight": 4.0}),
        ("der_pp", {"ratio": 1.0, "weight": 4.0}),
    ],
)
def test_a_method_forgets_less_of_pictures_than_plain_training(method, options, forgetting):
    plain, cured = forgetting("sequential"), forgetting(method, **options)
    assert plain["learned"] > 0.5 and plain["forgetting"] > 0.5
    assert cured["forgetting"] <= plain["forgetting"] - 0.25


def test_the_page_shows_what_test_rows_show(forgetting):
    path = forgetting("sequential")["path"]
    kept = read_json(path / "thumbnails.json")
    rows = [row for file in path.glob("stages/02-green/responses/*.jsonl") for row in read_jsonl(file)]
    assert kept.keys() == {name for row in rows for name in row["shown"]} and len(kept) == 8
    page = (path / "report.html").read_text(encoding="utf-8")
    assert all(url.startswith("data:image/jpeg;base64,") and url in page for url in kept.values())


def test_a_page_takes_no_picture_from_elsewhere(tmp_path):
    """Whoever gives a run's directory away could name an address that sees who opens the page."""
    kept = {"a": "data:image/jpeg;base64,AAAA", "b": "https://elsewhere/seen.png", "c": "javascript:alert(1)"}
    (tmp_path / "thumbnails.json").write_text(json.dumps(kept))
    assert thumbnails(tmp_path).keys() == {"a"}
