"""A run's directory that somebody else wrote runs no code and sends no key, unless it is trusted."""

from __future__ import annotations

import json
import shutil

import pytest

from holdfast.config.run import load_config
from holdfast.errors import ConfigError
from holdfast.records.trust import require_trust
from support.command import holdfast
from support.paths import GOLDEN

EVIL = "open('ran', 'w').close()\nfrom holdfast.api import Method\nclass Evil(Method):\n    name = 'evil'\n"


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A finished run whose record names a Python file, which leaves a trace where it is run."""
    shutil.copytree(GOLDEN / "old_runs" / "full-ewc", tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    record = json.loads((tmp_path / "place" / "run" / "run.json").read_text())
    record["config"]["method"] = [{"name": "evil.py"}]
    (tmp_path / "place" / "run" / "run.json").write_text(json.dumps(record))
    (tmp_path / "place" / "evil.py").write_text(EVIL)
    return tmp_path / "place"


@pytest.mark.parametrize("command", [("evaluate",), ("export", "--to", "out"), ("serve", "--port", "0")])
def test_its_code_is_not_run(command, hostile, capsys):
    assert holdfast(command[0], "run", *command[1:]) == 2
    said = capsys.readouterr().err
    assert "runs the Python file evil.py" in said and "add --trust" in said
    assert not (hostile / "ran").exists() and not (hostile / "out").exists()


@pytest.mark.parametrize("command", [("report",), ("compare",), ("gate", "--max-forgetting", "1")])
def test_reading_runs_nothing_and_asks_nothing(command, hostile, capsys):
    assert holdfast(command[0], "run", *command[1:]) == 0
    assert not (hostile / "ran").exists()


def test_a_trusted_run_is_exported(hostile):
    assert holdfast("export", "run", "--to", "out", "--trust") == 0
    assert (hostile / "ran").exists() and (hostile / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "measures", "said"),
    [
        ({"model": {"name": "m", "trust_remote_code": True}}, False, "trust_remote_code: runs the Python code"),
        ({"evaluation": {"general": [{"kind": "lm_eval", "tasks": ["x"], "include_path": "p"}]}}, True, "include_path"),
        ({"evaluation": {"judge": {"url": "http://a.example/v1", "model": "j", "key_variable": "KEY"}}}, True, "KEY"),
        ({"evaluation": {"judge": {"url": "http://localhost:1/v1", "model": "j", "key_variable": "KEY"}}}, True, None),
        ({"evaluation": {"judge": {"url": "http://a.example/v1", "model": "j", "key_variable": "NONE"}}}, True, None),
        ({"evaluation": {"judge": {"url": "http://a.example/v1", "model": "j", "key_variable": "KEY"}}}, False, None),
        ({}, True, None),
    ],
)
def test_what_needs_trust(changes, measures, said, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY", "secret")
    config = load_config({"model": "m", "stream": "trace", "output": "o"} | changes)
    if said is None:
        require_trust(tmp_path, config, False, measures=measures)
        return
    with pytest.raises(ConfigError, match=said) as told:
        require_trust(tmp_path, config, False, measures=measures)
    assert "secret" not in str(told.value)
    require_trust(tmp_path, config, True, measures=measures)
