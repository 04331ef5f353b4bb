"""What bad input gets: exit code 2, one clear message, no traceback, nothing lost."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import yaml

from support import forked
from support.command import holdfast
from support.paths import DOCS
from support.tiny import tiny_config, write_model, write_tasks


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_model(folder / "model")
    write_tasks(folder / "tasks")
    return folder


def refused(capsys, place, tmp_path, command="run", **changes) -> str:
    """Run the command in this process and return what it says; anything but exit code 2 fails."""
    config = tiny_config(place) | {"output": str(tmp_path / "out")} | changes
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    code = holdfast(command, file)
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    return said


CONFIGS = {
    "unknown key": ({"seeed": 1}, "seeed: unknown key; did you mean 'seed'?"),
    "unknown key in a section": ({"training": {"epoch": 1}}, "training.epoch: unknown key; did you mean 'epochs'?"),
    "unknown method": ({"method": "replya"}, "there is no method 'replya'; did you mean 'replay'?"),
    "unknown option": ({"method": {"name": "ewc", "strenth": 1}}, "strenth: unknown key; did you mean 'strength'?"),
    "unknown tuner": ({"tuner": "lorra"}, "there is no tuner 'lorra'; did you mean 'lora'?"),
    "unknown lora option": ({"tuner": {"name": "lora", "lora_alhpa": 3}}, "did you mean 'lora_alpha'?"),
    "wrong type": ({"training": {"batch_size": "many"}}, "training.batch_size: must be a whole number, not 'many'"),
    "batch that does not divide": (
        {"training": {"batch_size": 10, "micro_batch_size": 4}},
        "batch_size 10 is not a multiple of micro_batch_size 4; 8 or 12 would be",
    ),
    "no such model": ({"model": "no/such/folder/at/all"}, "model"),
    "context too long": ({"data": {"max_length": 4096}}, "128"),
    "unknown argument": ({"training": {"arguments": {"adam_beta": 1}}}, "adam_beta: unknown key; did you mean 'adam_"),
    "reserved argument": ({"training": {"arguments": {"learning_rate": 1}}}, "use training.learning_rate instead"),
    "unknown schedule": ({"training": {"schedule": "cosinus"}}, "cosinus"),
    "no such texts": (
        {"method": {"name": "gere_ce", "path": "texts"}},
        "method gere_ce: path: there is no file or folder 'texts'",
    ),
    "texts as a corpus that a model wrote": ({"method": {"name": "kl_pre", "path": str(DOCS / "keep.md")}}, "keep.md"),
    "samples without end": (
        {"method": {"name": "replay", "ratio": 1e6}},
        "ratio: must be less than or equal to 100",
    ),
    "samples beyond the context": (
        {"method": {"name": "kl_replay", "length": 100_000}},
        "length: 100000 is more than the model's context of 128 tokens",
    ),
    "unknown task": ({"stream": {"path": "TASKS", "order": ["red", "gren"]}}, "did you mean 'green'?"),
    "epochs for another number of stages": (
        {"training": {"epochs": [1, 2]}},
        "has 2 entries, but the run has 3 stages",
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configuration(case, capsys, place, tmp_path):
    changes, message = CONFIGS[case]
    changes = json.loads(json.dumps(changes).replace("TASKS", str(place / "tasks")))
    assert message in refused(capsys, place, tmp_path, **changes)
    assert not (tmp_path / "out" / "stages").exists(), "nothing is measured before"


def broken_task(tmp_path: Path, train: bytes, test: bytes = b'[{"prompt": "a", "answer": "b"}]') -> dict:
    folder = tmp_path / "tasks" / "broken"
    folder.mkdir(parents=True)
    (folder / "train.json").write_bytes(train)
    (folder / "test.json").write_bytes(test)
    return {"path": str(tmp_path / "tasks")}


ROWS = {
    "no answer": (
        b'[{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": " "}]',
        ["train.json", "row 2", "answer"],
    ),
    "answer absent": (b'[{"prompt": "a", "answer": "b"}, {"prompt": "c"}]', ["train.json", "row 2", "answer"]),
    "invalid JSON": (b'[{"prompt": "a",\n "answer": }]', ["train.json", "line 2"]),
    "not UTF-8": (b'[{"prompt": "a", "answer": "\xff"}]', ["train.json", "UTF-8"]),
    "empty split": (b"[]", ["train.json", "empty"]),
    "unknown shape": (b'[{"question": "a", "reply": "b"}]', ["train.json", "'question', 'reply'", "prompt_answer"]),
    "answer too long": (b'[{"prompt": "a", "answer": "' + b"b" * 500 + b'"}]', ["train.json", "row 1", "128"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows(case, capsys, place, tmp_path):
    train, parts = ROWS[case]
    said = refused(capsys, place, tmp_path, stream=broken_task(tmp_path, train))
    assert all(part in said for part in parts), said


def test_missing_split(capsys, place, tmp_path):
    stream = broken_task(tmp_path, b'[{"prompt": "a", "answer": "b"}]')
    (tmp_path / "tasks" / "broken" / "test.json").unlink()
    said = refused(capsys, place, tmp_path, stream=stream)
    assert "broken" in said and "test" in said


def test_label_outside_labels_json(capsys, place, tmp_path):
    stream = broken_task(tmp_path, b'[{"sentence": "a", "label": "Sprots"}]', b'[{"sentence": "a", "label": "Sports"}]')
    (tmp_path / "tasks" / "broken" / "labels.json").write_text('["Sports", "World"]')
    said = refused(capsys, place, tmp_path, stream=stream)
    assert "row 1" in said and "'Sprots'" in said and "Sports" in said


def test_model_without_tokenizer(capsys, place, tmp_path):
    model = write_model(tmp_path / "model")
    for path in model.glob("token*"):
        path.unlink()
    assert "tokenizer" in refused(capsys, place, tmp_path, model=str(model))


def test_output_is_a_file(capsys, place, tmp_path):
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refused(capsys, place, tmp_path)
    assert (tmp_path / "out").read_text() == "mine"


def test_output_is_a_link_to_nothing(capsys, place, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "server")
    assert f"is a link to {tmp_path / 'server'}, which is not there" in refused(capsys, place, tmp_path)


def test_output_holds_something_else(capsys, place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    assert "thesis.tex" in refused(capsys, place, tmp_path)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_output_cannot_be_written(capsys, place, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, place, tmp_path, output=str(tmp_path / "file" / "out"))


def test_no_configuration(capsys, tmp_path):
    assert holdfast("run", tmp_path / "absent.yaml") == 2
    assert "no such file" in capsys.readouterr().err


def test_another_configuration_in_the_directory(capsys, place, tmp_path):
    file = tmp_path / "run.yaml"
    config = tiny_config(place) | {"output": str(tmp_path / "out"), "method": "frozen"}
    file.write_text(yaml.safe_dump(config))
    assert holdfast("run", file) == 0
    matrix = (tmp_path / "out" / "matrix.json").read_text()
    said = refused(capsys, place, tmp_path, method="sequential", seed=3)
    assert "seed: 0 -> 3" in said and "frozen" in said and "sequential" in said
    assert (tmp_path / "out" / "matrix.json").read_text() == matrix


def test_changed_data_in_the_directory(capsys, tmp_path):
    config = tiny_config(tmp_path, method="frozen") | {"output": str(tmp_path / "out")}
    file = tmp_path / "first.yaml"
    file.write_text(yaml.safe_dump(config))
    assert holdfast("run", file) == 0
    train = tmp_path / "tasks" / "green" / "train.json"
    train.write_text(json.dumps(json.loads(train.read_text())[:-1]))
    said = refused(capsys, tmp_path, tmp_path, method="frozen")
    assert "changed since this run began:\n  the data of task 'green': " in said and "--accept-changes" in said


FULL_DISK = """
import errno, sys, holdfast.system.files
from holdfast.cli import main
write = holdfast.system.files.os.fsync
left = [int(sys.argv.pop(1))]
def fsync(descriptor):
    left[0] -= 1
    if left[0] < 0:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write(descriptor)
holdfast.system.files.os.fsync = fsync
main()
"""


@pytest.mark.parametrize("writes", [3, 30])
def test_no_space_left(writes, place, tmp_path):
    config = tiny_config(place) | {"output": str(tmp_path / "out"), "stream": {"path": str(place / "tasks")}}
    config["training"]["save_every"] = 4
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    run = forked.run("-c", FULL_DISK, writes, "run", file)
    assert run.returncode == 2, run.stderr
    assert "no space is left" in run.stderr and "Traceback" not in run.stderr


def test_a_file_that_cannot_grow_is_never_half_written(tmp_path):
    """A real failure of the system's write, by the process's own limit on file size."""
    code = (
        "import resource, signal, pathlib, sys\n"
        "from holdfast.system.files import write_text\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_text(pathlib.Path(sys.argv[1]), 'new' * 1000)\n"
    )
    path = tmp_path / "matrix.json"
    path.write_text("old")
    run = forked.run("-c", code, path)
    assert run.returncode == 1 and "File too large" in run.stderr
    assert path.read_text() == "old"
    assert resource.RLIMIT_FSIZE is not None and os.name == "posix"
