"""The site: every page is in its navigation, links lead somewhere on GitHub and there, versions lie side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from support.paths import ROOT
from support.scripts import script

pages, versions = script("pages"), script("versions")


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    pages.lay_out(folder)
    return folder


def test_every_page_is_in_the_navigation_once(laid_out):
    nav = yaml.safe_load((laid_out / "zensical.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r'"([^"]+\.md)"', json.dumps(nav))
    there = {path.relative_to(laid_out / "pages").as_posix() for path in (laid_out / "pages").rglob("*.md")}
    assert sorted(named) == sorted(there) and len(there) > 100
    assert "*" not in json.dumps(nav)


def test_the_reference_has_every_command_key_and_public_name(laid_out):
    from holdfast import api

    read = {path.stem: path.read_text(encoding="utf-8") for path in (laid_out / "pages" / "reference").glob("*.md")}
    assert {"## holdfast learn", "## holdfast lab experiment"} <= set(read["commands"].splitlines())
    assert "| `training.learning_rate` |" in read["configuration"] and "## gate" in read["configuration"]
    assert len(re.findall(r"^::: holdfast\.", read["api"], re.MULTILINE)) == len(api.__all__)


def test_links_lead_to_pages_or_into_the_repository(laid_out):
    found = {"docs/index.md": "index.md", "docs/methods/ewc.md": "methods/ewc.md", "README.md": "overview.md"}

    def on_site(text: str) -> str:
        return pages.on_site(text, "docs/methods/ewc.md", found, "https://x.org/main")

    assert on_site("[a](../index.md#b) [c](https://y.org) [d](#e)") == "[a](../index.md#b) [c](https://y.org) [d](#e)"
    assert on_site("[a](../../README.md#the-demo)") == "[a](../overview.md#the-demo)"
    assert on_site("[a](../../src/holdfast/errors.py)") == "[a](https://x.org/main/src/holdfast/errors.py)"
    kept = "`[a](nowhere.md)`\n\n    [a](nowhere.md)\n\n```\n[a](nowhere.md) θ*\n```\n"
    assert on_site(kept) == kept
    assert on_site("near θ*, `θ*`") == "near θ\\*, `θ*`"
    found["docs/keep.png"] = "keep.png"
    assert on_site("![a b](../keep.png)") == "![a b](../keep.png)"
    with pytest.raises(SystemExit, match=r"there is no docs/real-demo\.png on the site"):
        on_site("![a](../real-demo.png)")
    with pytest.raises(SystemExit, match=r"nowhere\.md: there is no docs/methods/nowhere\.md"):
        on_site("[a](nowhere.md)")


def test_the_navigation_takes_up_new_pages_by_pattern_and_tells_of_others():
    there = {"index.md", "methods/a.md", "methods/b.md", "alone.md"}
    nav, rest = pages.navigation(
        ["index.md", {"Methods": ["methods/b.md", "methods/*.md"]}, {"None": ["x/*.md"]}], there
    )
    assert nav == ["index.md", {"Methods": ["methods/b.md", "methods/a.md"]}] and rest == {"alone.md"}
    for wrong, reason in ((["gone.md"], "gone.md: no such page"), (["index.md", {"A": "index.md"}], "named twice")):
        with pytest.raises(SystemExit, match=reason):
            pages.navigation(wrong, there)


def test_versions_lie_side_by_side_and_latest_is_the_newest(tmp_path):
    site, folder = tmp_path / "site", tmp_path / "all"
    site.mkdir()
    folder.mkdir()
    for version in ("main", "0.9", "0.10", "0.9", "main"):
        (site / "index.html").write_text(version, encoding="utf-8")
        found = versions.add(site, folder, version)
    assert found == ["0.10", "0.9", "main"]
    assert {name: (folder / name / "index.html").read_text() for name in [*found, "latest"]} == {
        "0.10": "0.10",
        "0.9": "0.9",
        "main": "main",
        "latest": "0.10",
    }
    listed = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    assert [one["version"] for one in listed if one["aliases"] == ["latest"]] == ["0.10"]
    with pytest.raises(SystemExit, match="is no version of the documentation"):
        versions.add(site, folder, "../elsewhere")


def test_the_workflow_builds_with_the_pinned_tool():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(r"^zensical==", constraints, re.MULTILINE)
    assert "make docs" in (ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8")
