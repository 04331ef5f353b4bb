"""The pages of the methods: one for each, all of one shape, and their defaults those of the code."""

from __future__ import annotations

import re

import pytest

from holdfast.methods import known
from support.pages import defaults, titles
from support.paths import DOCS, ROOT

FOLDER = DOCS / "methods"
SECTIONS = [
    "What it does",
    "Equation",
    "Cost",
    "When to use it",
    "Defaults",
    "Paper and published code",
    "Guarded by",
]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md")) if path.stem != "README"}
METHODS = {name: cls for name, cls in known().items() if cls.__module__.startswith("holdfast.")}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_one_page(name):
    assert len([stem for stem, page in PAGES.items() if name in titles(page)]) == 1


@pytest.mark.parametrize("stem", PAGES)
def test_a_page_has_the_common_shape(stem):
    page = PAGES[stem]
    assert set(titles(page)) <= set(METHODS) and page.startswith("# `")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == SECTIONS
    for line in page.splitlines():
        assert len(line) <= 120 or line.startswith("|"), line


@pytest.mark.parametrize("stem", PAGES)
def test_the_defaults_of_a_page_are_those_of_the_code(stem):
    """Every option has a row, but for those that a preset has in common with `rehearsal`."""
    common = METHODS["rehearsal"].Options.model_fields
    found = defaults(PAGES[stem])
    assert sorted(found) == sorted(titles(PAGES[stem]))
    for name, values in found.items():
        options = METHODS[name].Options.model_fields
        for key, value in values.items():
            assert key in options, f"{name}: there is no option {key}"
            assert options[key].default == value, f"{name}.{key}"
        is_preset = name != "rehearsal" and issubclass(METHODS[name], METHODS["rehearsal"])
        for key, option in options.items():
            if key not in values:
                assert is_preset and option.default == common[key].default, f"{name}.{key} has no row"


@pytest.mark.parametrize("stem", PAGES)
def test_the_tests_and_pages_that_a_page_names_are_there(stem):
    for name in re.findall(r"`(tests/[\w/.]+|benchmarks/[\w/.]+)`", PAGES[stem]):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES[stem]):
        assert "://" in link or (FOLDER / link).exists(), link
