"""The index of papers: those that the code cites, each with where it is used and the tests that guard it."""

from __future__ import annotations

import inspect
import re

import pytest

from holdfast.methods import known
from support.pages import titles
from support.paths import DOCS, ROOT

PAPER = re.compile(r"arXiv\s+(\d{4}\.\d{4,5})")
ROWS = {
    identifier: line
    for line in (DOCS / "papers.md").read_text(encoding="utf-8").splitlines()
    for identifier in PAPER.findall(line)
}
METHODS = {name: cls for name, cls in known().items() if cls.__module__.startswith("holdfast.")}
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "methods").glob("*.md"))}


def cited() -> set[str]:
    """The papers that the sources name."""
    files = [path for kind in ("*.py", "*.yaml") for path in (ROOT / "src").rglob(kind)]
    return {found for path in files for found in PAPER.findall(path.read_text(encoding="utf-8"))}


def page_of(name: str) -> str:
    [stem] = [stem for stem, page in PAGES.items() if name in titles(page)]
    return stem


def test_the_index_has_the_papers_that_the_code_cites():
    assert set(ROWS) == cited()
    assert len(ROWS) > 60


@pytest.mark.parametrize("identifier", ROWS)
def test_a_row_links_to_its_paper(identifier):
    assert f"[arXiv {identifier}](https://arxiv.org/abs/{identifier})" in ROWS[identifier]
    assert ROWS[identifier].count("arxiv.org") == 1
    assert re.search(r"`tests/[\w/]+\.py` *[|,]", ROWS[identifier])


@pytest.mark.parametrize("name", METHODS)
def test_the_papers_of_a_method_lead_to_its_page(name):
    """A paper that a method's docstring cites has a row with a link to its page, and a test that the page names."""
    page = page_of(name)
    for identifier in PAPER.findall(inspect.getdoc(METHODS[name]) or ""):
        row = ROWS[identifier]
        assert f"](methods/{page}.md)" in row, f"{name}: {identifier}"
        guards = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert any(f"`{guard}`" in PAGES[page].partition("## Guarded by")[2] for guard in guards), (
            f"{name}: {identifier}"
        )
