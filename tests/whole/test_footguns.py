"""The page of footguns: its commands, run one after another, say what it shows."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from support.command import holdfast
from support.paths import DOCS
from support.tiny import write_model, write_tasks

PAGE = (DOCS / "footguns.md").read_text(encoding="utf-8")
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = {title: re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) for title, text in SECTIONS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the page's commands find where they run."""
    folder = tmp_path_factory.mktemp("footguns")
    write_model(folder / "model")
    write_tasks(folder / "tasks", ("may", "june", "july"))
    test = folder / "tasks" / "may" / "test.json"
    rows = json.loads(test.read_text(encoding="utf-8"))
    rows[-1] = json.loads((folder / "tasks" / "may" / "train.json").read_text(encoding="utf-8"))[0]
    test.write_text(json.dumps(rows), encoding="utf-8")
    [config] = re.findall(r"^```yaml\n# run.yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    quick = {"evaluation": {"max_new_tokens": 3, "bootstrap": 50, "shift": 0}}
    (folder / "run.yaml").write_text(json.dumps(yaml.safe_load(config) | quick), encoding="utf-8")
    texts = [f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw"]
    (folder / "general.txt").write_text("\n".join(texts), encoding="utf-8")
    odd = {
        "empty": [{"prompt": f"ask {a}?", "answer": ""} for a in "abcdefgh"],
        "columns": [{"question": f"ask {a}?", "replies": a, "weight": 3} for a in "abcdefgh"],
    }
    for name, rows in odd.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    return folder


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Each command of a block, and the lines that it shows of the answer."""
    parts = [part.splitlines() for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if part]
    return [(command, shown) for command, *shown in parts]


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_every_footgun_shows_a_command():
    assert len(SHOWN) > 12
    assert [title for title, blocks in SHOWN.items() if len(blocks) != 1] == ["More that no message can tell"]


def test_the_commands_say_what_the_page_shows(folder, monkeypatch, capfd, caplog):
    """In one test, since later commands look at the runs of earlier ones."""
    monkeypatch.chdir(folder)
    for title, blocks in SHOWN.items():
        for command, shown in [c for block in blocks for c in commands(block)]:
            caplog.clear()
            words = shlex.split(command)
            if words[0] == "holdfast":
                holdfast(*words[1:])
            else:
                subprocess.run(words, check=True)
            output = capfd.readouterr()
            warned = " ".join(f"holdfast: {record.getMessage()}" for record in caplog.records)
            said = plain(f"{output.out} {output.err} {warned}")
            assert not [line for line in shown if plain(line) not in said], f"{title}: {command}\n{said}"
