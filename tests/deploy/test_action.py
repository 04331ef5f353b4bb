"""The action of a pull request, by its script: exit code, summary, and one comment that follows the request."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from holdfast.report.comment import MARK
from support.paths import ROOT
from support.synthetic_runs import make_run

GH = """#!{python}
import json, os, sys
if os.environ.get("GH_FAILS"):
    sys.exit("gh: HTTP 403")
body = [open(word.removeprefix("body=@")).read() for word in sys.argv if word.startswith("body=@")]
with open(os.environ["GH_LOG"], "a") as log:
    print(json.dumps([sys.argv[1:], *body]), file=log)
if "--paginate" in sys.argv:
    print(os.environ.get("GH_KNOWN", ""))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("action") / "run", rows=40)


@pytest.fixture
def act(run, tmp_path):
    """A call of the script: its exit code and output, what it told the job, and its calls of gh."""
    tools = {
        "holdfast": f'#!/bin/sh\nexec {sys.executable} -m holdfast "$@"\n',
        "gh": GH.format(python=sys.executable),
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def call(**given: str) -> tuple[subprocess.CompletedProcess, str, str, list]:
        output, summary, log = (tmp_path / name for name in ("output", "summary", "log"))
        settings = {"RUN": str(run), "LIMITS": "", "PAGE": "", "JUNIT": "", "COMMENT": "true", "NUMBER": "7"}
        job = {"GITHUB_OUTPUT": output, "GITHUB_STEP_SUMMARY": summary, "GITHUB_REPOSITORY": "o/r", "GH_LOG": log}
        path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        environment = os.environ | settings | {name: str(file) for name, file in job.items()} | given | path
        done = subprocess.run(
            ["bash", str(ROOT / ".ci" / "gate")], env=environment, capture_output=True, text=True, check=False
        )
        told, found = (file.read_text(encoding="utf-8") if file.is_file() else "" for file in (output, summary))
        return done, told, found, [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    return call


def test_a_failed_gate_fails_the_job_and_says_so_in_a_new_comment(act, tmp_path):
    done, told, summary, calls = act(
        LIMITS="--max-forgetting 0.0001 --min-average 0.999", PAGE="https://x.org/1", JUNIT=str(tmp_path / "gate.xml")
    )
    assert done.returncode == 3 and told == "verdict=failed\n"
    assert "failed" in summary and (tmp_path / "gate.xml").is_file()
    [_, [asked, body]] = calls
    assert asked[:4] == ["api", "--method", "POST", "repos/o/r/issues/7/comments"]
    assert body.startswith(MARK) and "https://x.org/1" in body and "Forgetting gate: failed" in body


def test_a_comment_of_an_earlier_commit_is_written_anew(act):
    done, told, _, calls = act(LIMITS="--max-forgetting 1.0", GH_KNOWN="11\n12")
    assert (done.returncode, told) == (0, "verdict=passed\n")
    [[listed], [asked, body]] = calls
    assert MARK in listed[-1] and asked[:4] == ["api", "--method", "PATCH", "repos/o/r/issues/comments/12"]
    assert "Forgetting gate: passed" in body


def test_a_comment_that_cannot_be_written_does_not_change_the_verdict(act):
    done, told, _, _ = act(LIMITS="--max-forgetting 1.0", GH_FAILS="1")
    assert (done.returncode, told) == (0, "verdict=passed\n")
    assert "::warning::the comment could not be written" in done.stdout


@pytest.mark.parametrize("given", [{"COMMENT": "false"}, {"NUMBER": ""}])
def test_no_comment_where_none_is_wanted(act, given):
    done, told, _, calls = act(**{"LIMITS": "--max-forgetting 1.0"} | given)
    assert not calls and (done.returncode, told) == (0, "verdict=passed\n")


def test_where_nothing_was_judged_no_verdict_on_an_earlier_commit_stays(act):
    done, told, summary, calls = act(LIMITS="--max-forgetting=lots", GH_KNOWN="11")
    assert (done.returncode, told, summary) == (2, "verdict=error\n", "")
    [_, [asked, body]] = calls
    assert asked[2] == "PATCH" and body.startswith(MARK) and "could not be judged" in body


def test_the_action_hands_the_script_what_it_reads():
    action = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    [step] = [step for step in action["runs"]["steps"] if "/.ci/gate" in step["run"]]
    text = (ROOT / ".ci" / "gate").read_text(encoding="utf-8")
    read = set(re.findall(r"\$\{?([A-Z]\w+)", text))
    assert read - {name for name in read if name.startswith("GITHUB_")} == set(step["env"]) - {"GH_TOKEN"}
    assert all("${{" not in step["run"] for step in action["runs"]["steps"])  # inputs are never pasted into a script
    assert MARK in text
