"""Commands that only name things or read runs, and all commands where they refuse what they are given, answer without
the libraries that take seconds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from holdfast.system.files import locked_folder
from support.paths import ROOT

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "scipy")
NEEDLESS = ("deepspeed", "lm_eval", "matplotlib", "mlflow", "nltk", "plotly", "ray", "sklearn", "trl", "vllm")
"""What `check` of a plain run has no use for, whatever is installed."""

RUN = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from holdfast.cli import main

commands, watched = map(json.loads, sys.argv[1:])
for arguments in commands:
    sys.argv, said, code = ["holdfast", *arguments], StringIO(), 0
    try:
        with redirect_stdout(said), redirect_stderr(said):
            main()
    except SystemExit as stopped:
        code = stopped.code
    heavy = [name for name in watched if name in sys.modules]
    print(json.dumps([code, said.getvalue(), heavy]))
"""


def answered(
    commands: list[list[str]], folder: Path, watched: tuple[str, ...] = HEAVY
) -> list[tuple[int, str, list[str]]]:
    """Exit code, output and watched libraries in the process after each of some commands, which one process runs."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands), json.dumps(watched)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


RUN_OF_OLD = ROOT / "tests/golden/old_runs/full-ewc/run"

SHOWN = {
    "--help": "holdfast",
    "methods": "\newc ",
    "methods ewc": "strength (1000.0)",
    "methods gere": "ce_weight (1.0)",
    "methods o_lora": "not with tree_lora",
    "tuners": "\nlora ",
    "tuners moe_lora": "experts (4)",
    "streams": "trace ",
    "streams trace": "obtained from",
    "streams --metrics": "semantic_similarity",
    f"status {RUN_OF_OLD}": "holds stage 2 (green)",
    f"gate {RUN_OF_OLD} --max-forgetting 1": "gate passed",
    f"report {RUN_OF_OLD} --output page.html": "page.html",
    f"compare {RUN_OF_OLD} {RUN_OF_OLD.parents[1] / 'lora-replay/run'} --allow-different --format csv": "replay",
}


def test_names_options_pages_and_finished_runs_need_no_torch(tmp_path: Path):
    commands = [line.split() for line in SHOWN]
    for (code, said, heavy), (line, part) in zip(answered(commands, tmp_path), SHOWN.items(), strict=True):
        assert code == 0 and part in said and not heavy, (line, heavy, said)


def test_intervals_over_seeds_need_no_more_of_scipy_than_its_functions():
    code = (
        "import sys, numpy as np; from holdfast.metrics import seed_difference, seed_intervals\n"
        "runs = [[[np.arange(9.0) * k], [np.arange(9.0) + k]] for k in range(3)]\n"
        "ends = [run[1] for run in runs]\n"
        "assert seed_intervals(runs)['average'] and seed_difference(ends, ends, paired=True)['p'] == 1\n"
        "print(sorted(name for name in sys.modules if name in ('scipy.stats', 'scipy.optimize', 'scipy.sparse')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


REFUSED = {
    "trainig.epochs=3": "did you mean 'training'",
    "method=ewcc": "did you mean 'ewc'",
    "method={name: ewc, strenght: 3}": "did you mean 'strength'",
    "method=mine.py": "there is no file mine.py",
    "tuner=lroa": "did you mean 'lora'",
    "tuner={name: freeze, block: 1}": "did you mean 'blocks'",
    "stream=[{name: a, path: data/a, metric: acuracy}]": "did you mean 'accuracy'",
    "stream=[{name: a, path: data/b}]": "there is no folder or file 'data/b'",
    "stream={name: trcae}": "did you mean 'trace'",
    "stream.path=nowhere": "there is no folder or data file 'nowhere'",
    "stream.order=[b]": "holds no task 'b'",
    "evaluation.general=[{name: texts, path: texts.txt}]": "texts.txt",
    "model=./nothing": "there is no folder './nothing'",
    "output=data/a/train.jsonl": "is a file",
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration that is right but for its model, in a folder with one task."""
    task = tmp_path / "data" / "a"
    task.mkdir(parents=True)
    for split in ("train", "test"):
        (task / f"{split}.jsonl").write_text(json.dumps({"prompt": f"a {split} question", "answer": "yes"}) + "\n")
    values = {"model": "no-model", "method": "ewc", "stream": {"path": "data"}, "output": "out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


@pytest.mark.parametrize("command", ["check", "run"])
def test_what_trains_refuses_names_keys_files_and_tasks_without_torch(config: Path, command: str):
    refused = REFUSED if command == "check" else {name: REFUSED[name] for name in (*REFUSED,)[::4]}
    commands = [[command, "missing.yaml"], *([command, "config.yaml", override] for override in refused)]
    expected = {"missing.yaml": "there is no such file"} | refused
    for (code, said, heavy), (line, part) in zip(answered(commands, config), expected.items(), strict=True):
        assert code == 2 and part in said and not heavy, (line, heavy, said)
    assert len(commands) == len(expected)


def test_of_a_sweep_check_refuses_names_without_torch(config: Path):
    values = yaml.safe_load((config / "config.yaml").read_text())
    run = {key: value for key, value in values.items() if key != "output"}
    sweep = {"run": run, "grid": {"method": ["ewc", "ewcc"]}, "output": "sweep"}
    (config / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    [(code, said, heavy)] = answered([["check", "sweep.yaml"]], config)
    assert code == 2 and "ewcc: method: there is no method 'ewcc'; did you mean 'ewc'" in said and not heavy, said


def test_check_goes_on_to_the_model_where_nothing_is_wrong_with_the_names(config: Path):
    command = ["check", "config.yaml", "method=o_lora", "tuner=lora"]
    [(code, said, there)] = answered([command], config, ("torch", "transformers.trainer", *NEEDLESS))
    assert code == 2 and "model.name: 'no-model'" in said and there == ["torch", "transformers.trainer"]


LEARNED = {
    "empty.jsonl": ("", "holds no rows; each line is one"),
    "unknown.jsonl": ('{"my question": "a", "reply": "b"}', "'task={columns: {my question: prompt, reply: answer}}'"),
    "half.jsonl": ('{"question": "a", "Answer B": "b"}', "'task={columns: {question: prompt, Answer B: answer}}'"),
    "bad.jsonl": ('{"prompt": 1, "answer": "b"}', "prompt"),
}


def test_learn_refuses_models_and_rows_without_torch_and_leaves_nothing(tmp_path: Path):
    for name, (content, _) in LEARNED.items():
        (tmp_path / name).write_text(content and content + "\n")
    commands = [["learn", name, "--into", "run", "--model", "model"] for name in LEARNED]
    commands.append(["learn", "bad.jsonl", "--into", "run", "--model", "/nowhere/model"])
    expected = [part for _, part in LEARNED.values()] + ["there is no folder '/nowhere/model'"]
    for (code, said, heavy), part in zip(answered(commands, tmp_path), expected, strict=True):
        assert code == 2 and part in said and not heavy, (heavy, said)
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for name, told in (("mine", "is no run but holds other files"), ("~/run", "write the home folder in full")):
        [(code, said, heavy)] = answered([["learn", "bad.jsonl", "--into", name, "--model", "model"]], tmp_path)
        assert code == 2 and told in said and not heavy, (heavy, said)
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"] and not (tmp_path / "~").exists()


MODELS = {
    ("config.json",): "holds no tokenizer",
    ("tokenizer.json",): "holds no config.json",
    ("tokenizer.json", "config.json"): "holds no weights",
    ("tokenizer.json", "config.json", "adapter_config.json"): "is an adapter",
}


def test_a_folder_that_holds_no_whole_model_is_told_without_torch(config: Path):
    commands = []
    for number, files in enumerate(MODELS):
        (config / f"m{number}").mkdir()
        for name in files:
            (config / f"m{number}" / name).write_text("{}")
        commands.append(["run", "config.yaml", f"model=m{number}"])
    for (code, said, heavy), part in zip(answered(commands, config), MODELS.values(), strict=True):
        assert code == 2 and part in said and not heavy, (part, heavy, said)


def test_a_directory_in_use_is_told_without_torch(config: Path):
    with locked_folder(config / "out"):
        [*done] = answered([["run", "config.yaml"], ["learn", "data/a", "--into", "out", "--model", "m"]], config)
    for code, said, heavy in done:
        assert code == 2 and "is in use by another process" in said and not heavy, (heavy, said)


def test_runs_and_ports_are_looked_for_without_torch(tmp_path: Path):
    commands = [[name, "nowhere"] for name in ("serve", "evaluate")] + [["export", "nowhere", "--to", "there"]]
    commands += [["rollback", "nowhere", "--to", "1"], ["export", str(RUN_OF_OLD), "--to", "there", "--stage", "7"]]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        commands.append(["serve", str(RUN_OF_OLD), "--port", str(taken.getsockname()[1])])
        done = answered(commands, tmp_path)
    expected = ["is not a run's directory"] * 4 + ["--stage: 7 is no complete stage", "is taken by another program"]
    for (code, said, heavy), part in zip(done, expected, strict=True):
        assert code == 2 and part in said and not heavy, (part, heavy, said)
