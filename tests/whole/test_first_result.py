"""The first page's command and file give the screen that it shows, here with a tiny model."""

from __future__ import annotations

import re
import shlex

from support.command import holdfast
from support.paths import DOCS, ROOT
from support.tiny import write_model

PAGE = (DOCS / "index.md").read_text(encoding="utf-8")


def shape(line: str) -> str:
    """A line without its numbers, runs of spaces and what a tiny model of another name would change."""
    return re.sub(r"\s+", " ", re.sub(r"[+−-]?\d[\d.,:%]*", "N", line)).strip()


def test_the_first_command_gives_the_first_screen(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    [command] = re.findall(r"^    holdfast (learn docs/tickets.csv (?:.*\\\n)?.*)$", PAGE, re.MULTILINE)
    words = [
        {"HuggingFaceTB/SmolLM2-135M-Instruct": "model"}.get(w, w) for w in shlex.split(command.replace("\\\n", " "))
    ]
    assert "model" in words
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    assert holdfast(*words) == 0
    said = {shape(line) for line in capfd.readouterr().out.splitlines()}
    [shown] = re.findall(r"^```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    wanted = [
        shape(line) for line in shown.splitlines() if not line.startswith("  everyday")
    ]  # that needs a chat template
    assert not [line for line in wanted if line not in said], said
    assert (tmp_path / "models" / "support" / "report.html").is_file()
