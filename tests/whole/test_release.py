"""A release: the README that a package index shows, the notes, the workflows and the image."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from holdfast import __version__
from support.paths import ROOT
from support.scripts import script

SHELL = [ROOT / ".ci" / name for name in ("run", "wheel", "gate")] + sorted((ROOT / "examples" / "slurm").iterdir())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def checked_by(program: str, *arguments: str | Path) -> None:
    """Run a linter that the extra dev installs; the test is skipped where it is not there."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.is_file() else shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed")
    done = subprocess.run([found, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_index_gets_a_readme_whose_links_are_absolute():
    pytest.importorskip("hatch_fancy_pypi_readme", reason="hatch-fancy-pypi-readme is not installed")
    import tomllib

    from hatch_fancy_pypi_readme._builder import build_text
    from hatch_fancy_pypi_readme._config import load_and_validate_config

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["readme"]
    config = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    settings = load_and_validate_config(config | {"fragments": [{"path": str(ROOT / "README.md")}]})
    text = build_text(settings.fragments, settings.substitutions, version=__version__)
    before = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) == len(re.findall(r"\]\(([^)\s]+)\)", before)) > 50
    assert not [link for link in links if not link.startswith("https://")]
    home = "https://github.com/holdfast-learn/holdfast"
    tagged = [link.removeprefix(f"{home}/blob/v{__version__}/") for link in links if f"{home}/blob" in link]
    assert not [link for link in tagged if not (ROOT / link.partition("#")[0]).exists()]
    assert "](https://raw.githubusercontent.com/holdfast-learn/holdfast/v" in text


def test_the_notes_of_a_release_are_its_section():
    notes = script("release_notes").notes
    log = "# Changelog\n\n## [Unreleased]\n\nNew: [a](docs/a.md).\n\n## [0.1.0] - 2026-01-01\n\n- [b](https://x.org)\n"
    assert notes(log, "0.1.0") == "- [b](https://x.org)\n"
    assert notes(log, "Unreleased") == "New: [a](https://github.com/holdfast-learn/holdfast/blob/main/docs/a.md).\n"
    with pytest.raises(SystemExit, match=r"no section 0\.2\.0; there are Unreleased, 0\.1\.0"):
        notes(log, "0.2.0")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for version in re.findall(r"^## \[(.+?)\]", changelog, re.MULTILINE):
        assert len(notes(changelog, version)) > 100


def test_publishing_waits_for_a_maintainer():
    """Nothing is uploaded or pushed by a workflow unless a variable of the repository says so."""
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            for step in job["steps"]:
                does = json.dumps(step)
                if re.search(r"pypi-publish|docker push|git push", does):
                    assert "vars.PUBLISH_" in str(job.get("if", "")) + str(step.get("if", "")), f"{path.name}: {name}"
    publish = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8"))
    assert publish["jobs"]["pypi"]["permissions"] == {"id-token": "write"} and publish["permissions"] == {}


def test_workflows_and_action_follow_their_schemas():
    checked_by("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *WORKFLOWS)
    checked_by("check-jsonschema", "--builtin-schema", "vendor.github-actions", "action.yml")


def test_workflows_are_safe():
    checked_by("zizmor", "--offline", "--quiet", ".github", "action.yml")


def test_scripts_are_clean():
    checked_by("shellcheck", *SHELL)


def test_the_image_is_clean():
    checked_by("hadolint", "Dockerfile")


def test_the_image_gets_what_the_wheel_is_built_from():
    """The context has the files that pyproject.toml names, and the image installs with the pinned versions."""
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line[:1] == "!"}
    assert {"src", "experiments/lab", "LICENSE", "README.md", "pyproject.toml", "constraints.txt"} == kept
    stages = re.findall(r"^FROM \S+ AS (\w+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert stages[-1] == "cpu" and "cuda" in stages
    [targets] = re.findall(r"target: \[(.*)\]", (ROOT / ".github/workflows/image.yml").read_text(encoding="utf-8"))
    assert set(targets.split(", ")) == {"cpu", "cuda"}
