"""What the project says of itself in several places is the same in each, and `holdfast --version` says it, too."""

from __future__ import annotations

import re
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from holdfast import __version__
from holdfast.cli import main
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"]]


def pins(file: str) -> dict[str, str]:
    """Versions of a file of constraints, by canonical name."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    split = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in split}


def read_yaml(file: str) -> dict:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_the_version_is_one(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["holdfast", "--version"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"holdfast {__version__}\n"
    assert PROJECT["version"] == __version__
    assert read_yaml("CITATION.cff")["version"] == __version__


def test_the_changelog_has_this_version_or_what_becomes_it():
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == ("Unreleased" if "dev" in __version__ else __version__)


def test_pre_commit_has_the_pinned_ruff():
    [hook] = read_yaml(".pre-commit-config.yaml")["repos"]
    assert hook["rev"] == f"v{pins('constraints.txt')['ruff']}"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda found: found.name)
def test_constraints_lie_at_both_ends_of_a_range(requirement):
    name = canonicalize_name(requirement.name)
    [low] = [part.version for part in requirement.specifier if part.operator == ">="]
    lowest = pins("constraints-lowest.txt")[name]
    assert lowest.split(".") == (low.split(".") + ["0"] * 3)[: len(lowest.split("."))]
    assert pins("constraints.txt")[name] in requirement.specifier
