"""A damaged file of a run is named by whatever reads it, and never used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from holdfast.config.run import RunConfig
from holdfast.deploy.export import export
from holdfast.deploy.serve import application
from holdfast.errors import RunDirectoryError
from holdfast.models.weights import load_language_model
from holdfast.records.read import read_run
from holdfast.report import write_report
from holdfast.runner.evaluate import evaluate
from holdfast.runner.reload import find_stage
from holdfast.runner.run import run
from holdfast.system.files import read_appended
from holdfast.system.manifest import MANIFEST
from holdfast.system.progress import Progress
from support.command import holdfast
from support.paths import GOLDEN
from support.resumed import results
from support.tiny import tiny_config

QUIET = Progress(quiet=True)
METHODS = ["replay", {"name": "ewc", "samples": 4}]
ADAPTER = "stages/01-red/adapter/adapter_model.safetensors"


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zeros(path: Path) -> None:
    """A file of the same size and safetensors header, all of whose numbers are 0."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content[:start] + bytes(len(content) - start))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, RunConfig]:
    """A run that was stopped in its second stage after a checkpoint, and its configuration; ``whole`` was not."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "general.txt").write_text("red and green\n" * 4)
    config = tiny_config(folder, tuner={"name": "lora", "r": 2}, method=METHODS)
    config["stream"]["order"] = ["red", "green"]
    config["training"] |= {"max_steps": 3, "save_every": 2}
    config["evaluation"]["general"] = [{"name": "colours", "path": str(folder / "general.txt")}]
    run(config | {"output": str(folder / "whole")}, QUIET)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("holdfast.runner.stage.StageWatch.after_step", _stop_in_green)
        run(config, QUIET)
    return folder, find_stage(folder / "run").config


def _stop_in_green(watch: Any, step: int, last: bool) -> bool:
    if watch.stage.name == "green" and step == 3:
        raise SystemExit
    return False


@pytest.fixture
def place(made, tmp_path) -> Path:
    shutil.copytree(made[0] / "run", tmp_path / "run")
    return tmp_path / "run"


def test_every_file_is_in_a_manifest_but_logs_and_what_is_made_anew(made):
    folder = made[0]
    noted = set()
    for line in read_appended(folder / "whole" / MANIFEST):
        noted |= {str(Path(line["path"], name)) for name in line["files"]}
    there = {str(path.relative_to(folder / "whole")) for path in (folder / "whole").rglob("*") if path.is_file()}
    assert there - noted == {MANIFEST, ".lock", "events.jsonl", "report.html"}


def commands(place: Path, config: RunConfig) -> dict[str, Callable[[], Any]]:
    return {
        "run": lambda: run(config.model_copy(update={"output": str(place)}), QUIET),
        "report": lambda: write_report([place], place / "report.html"),
        "evaluate": lambda: evaluate(place, stage=1, output=place.parent / "again", progress=QUIET),
        "serve": lambda: application(find_stage(place, 1)),
        "export": lambda: export(place, place.parent / "out", stage=1),
        "merge": lambda: export(place, place.parent / "out", stage=1, merge=True),
    }


CHECKPOINT = "stages/02-green/checkpoint/checkpoint-2"
READ = {
    ADAPTER: ("run", "evaluate", "serve", "export", "merge"),
    "stages/01-red/adapter/adapter_config.json": ("run", "evaluate", "serve", "export"),
    "stages/01-red/method/ewc.safetensors": ("run", "evaluate"),
    "stages/01-red/method/replay.json": ("run",),
    "stages/01-red/stage.json": ("run", "evaluate", "export"),
    "stages/01-red/evaluation.json": ("run",),
    "stages/01-red/responses/red.jsonl": ("run", "report"),
    "stages/01-red/statistics.safetensors": ("report",),
    "run.json": ("run", "report", "evaluate", "export"),
    "matrix.json": ("report", "evaluate", "export"),
    **{
        f"{CHECKPOINT}/{name}": ("run",)
        for name in (
            "adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.pt", "rng_state.pth",
            "trainer_state.json", "method/ewc.safetensors", "method/replay.json", "complete.json",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("file", READ)
def test_whatever_reads_a_damaged_file_names_it(file, made, place):
    flip(place / file)
    for name in READ[file]:
        with pytest.raises(RunDirectoryError, match=rf"{Path(file).name}: is damaged.*(restore|delete)"):
            commands(place, made[1])[name]()
            pytest.fail(f"{name} used it")
    assert not (place.parent / "out").exists()


def replace(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    """Put another value into a JSON file, and take all checksums away, as an edit by hand or an attacker does."""
    for folder in path.parents[:5]:
        (folder / MANIFEST).unlink(missing_ok=True)
    for complete in path.parent.glob("complete.json"):
        facts = json.loads(complete.read_text())
        complete.write_text(json.dumps({key: v for key, v in facts.items() if key not in ("files", "checksum")}))
    whole = place = json.loads(path.read_text())
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    path.write_text(json.dumps(whole))


STATE = "stages/01-red/method"
WRONG = {
    "the log": (f"{CHECKPOINT}/trainer_state.json", ("log_history",), {}, "log_history: input should be a valid list"),
    "a foreign key": (f"{CHECKPOINT}/trainer_state.json", ("x",), 1, "x: is no field"),
    "another step": (f"{CHECKPOINT}/trainer_state.json", ("global_step",), 1, "global_step: must be that"),
    "the cost": (f"{CHECKPOINT}/complete.json", ("cost", "seconds"), None, "is damaged; delete"),
    "the optimizer": (
        f"{CHECKPOINT}/optimizer.json",
        ("groups", 0, "weight_decay"),
        "x",
        "weight_decay: cannot be 'x'",
    ),
    "an input": ("run.json", ("inputs", "tokenizer"), 1.5, "inputs.tokenizer: input should be a valid dictionary"),
    "a memory": (f"{STATE}/replay.json", ("tasks", 0), "x", "tasks.0: input should be a valid integer, not 'x'"),
    "a memory's rows": (f"{STATE}/replay.json", ("places",), [], "must have an entry for each row"),
    "a penalty": (f"{STATE}/ewc.json", ("spread",), [], "spread: input should be a valid number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_another_shape_is_named_without_checksums(case, made, place):
    name, keys, value, said = WRONG[case]
    file = place / name
    replace(file, keys, value)
    with pytest.raises(RunDirectoryError, match=said):
        commands(place, made[1])["run"]()


def test_a_memory_of_another_model_s_tokens_is_named(made, place):
    """Its token ids are beyond the model's vocabulary, which training would find in its midst."""
    (place / MANIFEST).unlink()
    shutil.rmtree(place / CHECKPOINT)
    file = place / STATE / "replay.safetensors"
    tensors = {key: t + 100 if key in ("input_ids", "labels") else t for key, t in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(RunDirectoryError, match=r"method/replay: is not a state .* (must be those of|is none of them)"):
        commands(place, made[1])["run"]()


def test_an_evaluation_s_own_files_are_compared(made, place):
    evaluated = commands(place, made[1])["evaluate"]
    evaluated()
    flip(place.parent / "again" / "responses" / "red.jsonl")
    with pytest.raises(RunDirectoryError, match=r"again/responses/red\.jsonl: is damaged"):
        evaluated()


def test_an_adapter_of_zeros_is_not_used(made, place):
    zeros(place / ADAPTER)
    for name in READ[ADAPTER]:
        with pytest.raises(RunDirectoryError, match=r"adapter_model\.safetensors: is damaged: its SHA-256"):
            commands(place, made[1])[name]()


def test_what_the_message_says_helps(made, place):
    """The damaged checkpoint is deleted, as the message says: the run goes on and ends as it would have."""
    flip(place / CHECKPOINT / "optimizer.safetensors")
    with pytest.raises(RunDirectoryError, match=rf"delete \S*{CHECKPOINT}, and the command that wrote it"):
        commands(place, made[1])["run"]()
    shutil.rmtree(place / CHECKPOINT)
    (place / "matrix.json").unlink()
    commands(place, made[1])["run"]()
    assert results(place) == results(made[0] / "whole")


def torn(path: Path) -> Iterator[bytes]:
    """The file with its last line cut off at three places."""
    content = path.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    for place in (last + 1, (last + len(content)) // 2, len(content) - 1):
        yield content[:place]


def test_a_torn_last_line_of_a_log_stops_nothing(made, place):
    log = place / "events.jsonl"
    for content in list(torn(log)):
        log.write_bytes(content)
        assert read_run(place).events
        commands(place, made[1])["report"]()
    commands(place, made[1])["run"]()
    found, expected = results(place), results(made[0] / "whole")
    assert all(found[key] == expected[key] for key in ("matrix", "weights", "responses"))


def test_an_export_and_a_stage_s_model_are_compared_where_they_are_loaded(tmp_path):
    config = tiny_config(tmp_path)
    config["stream"]["order"] = ["red"]
    run(config | {"training": {"max_steps": 1}}, QUIET)
    stage = tmp_path / "run" / "stages" / "01-red" / "model"
    export(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "holdfast.json").read_text())["files"].keys() >= {"config.json", "README.md"}
    for folder in (stage, tmp_path / "out"):
        load_language_model(folder)
        flip(folder / "model.safetensors")
        with pytest.raises(RunDirectoryError, match=r"model\.safetensors: is damaged"):
            load_language_model(folder)
        with pytest.raises(RunDirectoryError, match=r"model\.safetensors: is damaged"):
            run(config | {"model": str(folder), "output": str(tmp_path / f"next-{folder.name}")}, QUIET)


def test_a_damaged_answer_of_an_evaluation_that_was_killed_is_named(tmp_path):
    from holdfast.models.answers import AnswerCache

    AnswerCache(tmp_path / "answers.jsonl").add("question", "answer")
    assert AnswerCache(tmp_path / "answers.jsonl").find("question") == "answer"
    (tmp_path / "answers.jsonl").write_text((tmp_path / "answers.jsonl").read_text().replace("answer", "answfr"))
    with pytest.raises(RunDirectoryError, match=r"answers\.jsonl: line 1 is damaged"):
        AnswerCache(tmp_path / "answers.jsonl")


@pytest.mark.parametrize(
    "line", ["status run", "rollback run --to 2", "rebuild run --without green", "report run", "run config.yaml"]
)
def test_a_stage_that_is_missing_before_another_is_told(line, tmp_path, monkeypatch, capsys):
    shutil.copytree(GOLDEN / "old_runs" / "full-ewc", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "stages" / "01-red").rename(tmp_path / "red")
    code, said = holdfast(*line.split()), capsys.readouterr().err
    if line == "report run":  # it shows what is there
        assert code == 0
    else:
        assert code == 2 and "is missing, though " in said, said


@pytest.mark.parametrize(
    "line",
    [
        "status run",
        "rollback run --to 1",
        "rebuild run --without green",
        "serve run",
        "evaluate run",
        "export run --to x",
    ],
)
def test_stages_that_are_all_gone_are_told(line, tmp_path, monkeypatch, capsys):
    """As of a run that was copied without them; pages show the rest (tests/report/test_report.py)."""
    shutil.copytree(GOLDEN / "old_runs" / "full-ewc", tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "stages")
    monkeypatch.chdir(tmp_path)
    assert holdfast(*line.split()) == 2
    assert "run/stages: is missing or empty" in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda lines: lines[1:], lambda lines: [lines[0], *lines]], ids=["gone", "twice"])
def test_a_line_of_responses_that_is_gone_or_twice_is_told(change, tmp_path, monkeypatch, capsys):
    shutil.copytree(GOLDEN / "old_runs" / "full-ewc", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run" / "stages" / "00-start" / "responses" / "green.jsonl"
    lines = change(file.read_text().splitlines(keepends=True))
    file.write_text("".join(lines))
    assert holdfast("gate", "run", "--max-forgetting", "1") == 2
    assert f"green.jsonl: is damaged: it has {len(lines)} rows, and the task " in capsys.readouterr().err
