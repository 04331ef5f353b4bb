"""The pages' Python runs as written, their claims about it are true, and every name, file and link in them exists."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

import holdfast
from support.paths import DOCS, ROOT
from support.tiny import write_model

PAGES = DOCS / "integrations"
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_MODULES = {"holdfast.scorers", "holdfast.json"}
"""An entry point group and a file, whose names look like those of modules."""
ALL_PAGES = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/RESULTS.md", "examples/README.md")
    ),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "experiments").rglob("README.md")),
]


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
    pairs = [{"prompt": f"ask {a}{b}?", "chosen": f" {b}{a}", "rejected": f" {a}{b}"} for a in "abc" for b in "uvwxyz"]
    (tmp_path / "preferences.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
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


def test_preferences(folder):
    pytest.importorskip("trl", reason="TRL is not installed")
    [once] = executed("preferences.md")
    check_once(once["trainer"], once["report"])


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md")))
def test_python_of_every_page_compiles(page):
    for block in PYTHON.findall((PAGES / page).read_text(encoding="utf-8")):
        compile(block, page, "exec")


def every_page():
    return pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_addresses(text: str) -> str:
    return re.sub(r"https?://[^\s)>\"]+", "", text)


def names_in(text: str) -> set[str]:
    """Dotted names of the package, and each name that a `from holdfast... import` brings in."""
    dotted = set(re.findall(r"(?<![\w/.-])holdfast(?:\.\w+)+(?![\w-])", text))
    for module, many, few in re.findall(
        r"^\s*from (holdfast[\w.]*) import (?:\(([^)]*)\)|([\w, ]+))", text, re.MULTILINE
    ):
        dotted |= {f"{module}.{name}" for name in re.findall(r"\w+", re.sub(r" as \w+|#.*", "", many or few))}
    return dotted - NOT_MODULES


def resolve(name: str) -> Any:
    """The module, class, function or attribute of a dotted name; ImportError or AttributeError where there is none."""
    parts = name.split(".")
    value: Any = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            importlib.import_module(".".join(parts[:end]))
        value = getattr(value, part)
    return value


def files_in(text: str) -> set[str]:
    """Paths from the project's root, with * for the names in capitals that stand for one of several."""
    rooms = "src|tests|docs|benchmarks|experiments|examples"
    paths = re.findall(rf"(?<![\w/.-])(?:{rooms})/[\w./*-]*[\w/]", without_addresses(text))
    return {re.sub(r"\b(NAME|SCALE)\b", "*", path) for path in paths}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of it."""
    broken = []
    for link in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def prose(text: str) -> list[str]:
    """The lines of a page outside tables and code."""
    lines = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()
    return [line for line in lines if not line.startswith(("|", "    "))]


@every_page()
def test_every_name_of_the_package_resolves(page):
    for name in sorted(names_in(page.read_text(encoding="utf-8"))):
        resolve(name)


@every_page()
def test_every_file_that_is_named_exists(page):
    missing = [path for path in files_in(page.read_text(encoding="utf-8")) if not list(ROOT.glob(path))]
    assert not missing


def test_every_room_of_the_map_exists():
    """The paths within the package that CONTRIBUTING names without src/holdfast before them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = set(
        re.findall(r"`((?!src/|tests/|docs/|benchmarks/)[a-z_]+/[\w./]*)`", text.partition("## Adding a method")[0])
    )
    package = Path(holdfast.__file__).parent
    assert len(rooms) > 20
    assert not [room for room in rooms if not list(package.glob(re.sub(r"\b(NAME|SECTION)\b", "*", room)))]


@every_page()
def test_every_link_leads_to_a_file_and_a_heading(page):
    assert not broken_links(page, page.read_text(encoding="utf-8"))


@every_page()
def test_no_line_of_prose_is_longer_than_120_columns(page):
    assert not [line for line in prose(page.read_text(encoding="utf-8")) if len(line) > 120]


def test_a_dead_reference_is_seen():
    """What the four tests above rest on, with one dead reference of each kind."""
    assert names_in("`holdfast.metrics.summarise` and\nfrom holdfast.api import Method, Metod\n") == {
        "holdfast.metrics.summarise",
        "holdfast.api",
        "holdfast.api.Method",
        "holdfast.api.Metod",
    }
    for dead in ("holdfast.metrics.summarise", "holdfast.api.Metod", "holdfast.convert.convert"):
        with pytest.raises((ImportError, AttributeError)):
            resolve(dead)
    assert files_in("`tests/no/such_file.py`, https://x.org/docs/a.md") == {"tests/no/such_file.py"}
    page = DOCS / "compare.md"
    text = "[a](compare.md#figures) [b](#figures) [c](compare.md#no-heading) [d](nowhere.md) [e](https://x.org)"
    assert broken_links(page, text) == ["compare.md#no-heading", "nowhere.md"]
    assert prose(f"| {'x' * 130} |\n```\n{'y' * 130}\n```\n    {'z' * 130}\n{'w' * 130}\n") == ["", "w" * 130]
