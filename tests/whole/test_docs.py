"""The Python of the documentation's pages runs as it stands there, and what the pages say of it holds."""

from __future__ import annotations

import json
import re
from typing import Any

import datasets
import pytest

from support.paths import DOCS
from support.tiny import write_model

PAGES = DOCS / "integrations"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with what the pages name: a model, general texts and two tasks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_model(tmp_path / "path" / "to" / "model")
    texts = [f"the {a} sea moves the {b} weed and holds it fast" for a in "abcdefgh" for b in "uvw"]
    (tmp_path / "general.txt").write_text("\n".join(texts), encoding="utf-8")
    for task, letters in {"july": "abcdef", "august": "ghijkl"}.items():
        rows = [{"prompt": f"ask {a}{b}?", "completion": f" {b}{a}"} for a in letters for b in "uvwxyz"]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


def executed(page: str) -> list[dict[str, Any]]:
    """Run the page's blocks one after another; the names as they are after each."""
    blocks = PYTHON.findall((PAGES / page).read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "page"}
    after = []
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
        after.append(dict(names))
    return after


def terms(trainer: Any) -> list[dict[str, float]]:
    """The named terms of each line of the log that has a loss; they add up to it."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    found = [{k.removeprefix("term/"): v for k, v in line.items() if k.startswith("term/")} for line in lines]
    for line, named in zip(lines, found, strict=True):
        assert sum(named.values()) == pytest.approx(line["loss"], rel=1e-3)
    return found


def check_once(trainer: Any, report: dict[str, Any]) -> None:
    lines = terms(trainer)
    assert set(lines[0]) == {"task", "gere", "gere/ce"}
    assert lines[0]["gere"] == pytest.approx(0, abs=1e-4) and lines[-1]["gere"] > 0
    assert set(report) == {"before", "after", "change", "texts"} and report["texts"] == 24 // 11


def test_trainer(folder):
    once, one_after_another, own = executed("trainer.md")
    check_once(once["trainer"], once["report"])
    assert (folder / "july" / "rehearsal" / "gere" / "manifest.json").is_file()
    trainer = one_after_another["trainer"]
    assert set(terms(trainer)[-1]) == {"task", "replay"}
    assert sorted(set(trainer.methods[0].memory.tasks)) == [1, 2]
    assert own["ContinualWeightedTrainer"].__name__ == "ContinualWeightedTrainer"


def test_sft(folder):
    pytest.importorskip("trl", reason="TRL is not installed")
    once, one_after_another = executed("sft.md")
    check_once(once["trainer"], once["report"])
    assert set(terms(one_after_another["trainer"])[-1]) == {"task", "replay"}
    assert sorted(set(one_after_another["replay"].memory.tasks)) == [1, 2]


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_python_of_every_page_compiles(page):
    for block in PYTHON.findall((PAGES / page).read_text(encoding="utf-8")):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_links_lead_somewhere(page):
    text = (PAGES / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (PAGES / target).exists(), f"{page} links to {target}"
