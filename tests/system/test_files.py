"""Files: lines are added whole, what a kill cut off is passed over, and no JSON of ours holds NaN or infinity."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from holdfast.errors import RunDirectoryError
from holdfast.system.files import (
    append_jsonl,
    cut_torn_line,
    finite,
    is_finite,
    json_text,
    read_appended,
    read_json,
    read_jsonl,
    whole_folder,
    write_json,
    write_jsonl,
    write_text,
)
from support.json_files import strict_json
from support.paths import ROOT

NOT_FINITE = {"loss": math.nan, "terms": {"task": math.inf, "x": [-math.inf, 1.5]}, "pair": (np.float64("nan"), True)}
WRITTEN = {"loss": None, "terms": {"task": None, "x": [None, 1.5]}, "pair": [None, True]}


def test_a_number_that_is_not_finite_is_null_in_every_file(tmp_path):
    write_json(tmp_path / "one.json", NOT_FINITE)
    write_jsonl(tmp_path / "lines.jsonl", [NOT_FINITE, {"a": 1}])
    append_jsonl(tmp_path / "grown.jsonl", NOT_FINITE)
    append_jsonl(tmp_path / "grown.jsonl", {"a": 1}, sync=True)
    assert strict_json((tmp_path / "one.json").read_text()) == WRITTEN == read_json(tmp_path / "one.json")
    for name in ("lines.jsonl", "grown.jsonl"):
        assert [strict_json(line) for line in (tmp_path / name).read_text().splitlines()] == [WRITTEN, {"a": 1}]
        assert read_jsonl(tmp_path / name) == read_appended(tmp_path / name) == [WRITTEN, {"a": 1}]
    assert finite(NOT_FINITE) == WRITTEN and not is_finite(NOT_FINITE) and is_finite(WRITTEN)


def test_a_state_that_is_not_finite_is_refused(tmp_path):
    """It would be another state when it is read back."""
    with pytest.raises(ValueError, match=r"state\.json: a state cannot hold NaN or infinity: \{'best': inf\}"):
        write_json(tmp_path / "state.json", {"best": math.inf}, exact=True)
    assert not (tmp_path / "state.json").exists()
    write_json(tmp_path / "state.json", {"best": 0.1}, exact=True)
    assert read_json(tmp_path / "state.json") == {"best": 0.1}


def test_only_a_line_feed_ends_a_line(tmp_path):
    row = {"response": "one\u2028two\u0085three\n\x0bfour"}
    append_jsonl(tmp_path / "rows.jsonl", row)
    append_jsonl(tmp_path / "rows.jsonl", row)
    assert read_appended(tmp_path / "rows.jsonl") == read_jsonl(tmp_path / "rows.jsonl") == [row, row]


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_a_line_that_a_kill_cut_off_is_passed_over_and_lines_are_added_after_it(tmp_path, whole):
    path = tmp_path / "rows.jsonl"
    assert read_appended(path) == []
    rows = [{"step": step} for step in range(whole)]
    path.write_text("".join(json_text(row) + "\n" for row in rows) + '{"step": 1')
    assert read_appended(path) == rows
    cut_torn_line(path)
    append_jsonl(path, {"step": 9})
    assert read_jsonl(path) == [*rows, {"step": 9}]


NO_FILES = {
    "api.declared": "a default in a listing",
    "api.task": "a fingerprint",
    "config.describe": "a message",
    "data.chat": "calls of tools as a chat template reads them",
    "data.conversation": "calls and tools of a row",
    "data.given": "a digest",
    "data.load": "a version",
    "data.on_disk": "rows of a run, in a file without a name",
    "data.source": "a digest",
    "deploy.model_card": "text of a card",
    "deploy.openai.application": "an answer of the server",
    "deploy.openai.exchange": "an answer of the server",
    "deploy.openai.request": "calls of tools as a chat template reads them",
    "deploy.serve": "a string within a template",
    "lab.count": "a key of a cache in memory",
    "lab.sources": "the name of a folder",
    "models.answers": "a digest",
    "models.convert.tokenizer": "strings within a template",
    "models.endpoint": "a question to a server",
    "models.pretrained": "a digest",
    "records.read": "a comparison",
    "rehearsal.cache": "a digest",
    "report.compare": "a comparison",
    "runner.inputs": "a digest",
    "runner.rebuild.rows": "what a row says",
    "sweep.plan": "the name of a run",
}
"""Modules that make JSON which ends in no JSON file."""


def writers(path: Path) -> Iterator[str]:
    """``json.dump`` and ``json.dumps``, however they are called, and ``open`` that adds to a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dump", "json.dumps"):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module == "json":
            yield "from json import"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "open":
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            modes = [value.value for value in values if isinstance(value, ast.Constant)]
            if any(isinstance(mode, str) and mode[:1] == "a" for mode in modes):
                yield "open to append"


def test_nothing_else_writes_json():
    package = ROOT / "src" / "holdfast"
    found = {
        ".".join(path.relative_to(package).with_suffix("").parts): set(writers(path)) for path in package.rglob("*.py")
    }
    assert found.pop("system.files") == {"json.dumps", "open to append"}
    found = {module: what for module, what in found.items() if what}
    assert found == {module: {"json.dumps"} for module in NO_FILES}, "a file's JSON comes from system/files.py"


def test_the_check_finds_what_it_looks_for(tmp_path):
    code = 'path.open("a")\nopen(path, mode="ab")\njson.dump(1, file)\npath.open("rb")\nfrom json import dumps\n'
    (tmp_path / "code.py").write_text(code)
    found = ["from json import", "json.dump", "open to append", "open to append"]
    assert sorted(writers(tmp_path / "code.py")) == found
    with pytest.raises(ValueError, match="NaN"):
        strict_json(json.dumps(math.nan))


def test_nothing_is_written_through_a_link(tmp_path):
    """Somebody else's directory may hold links to files of the user's in the places of files that are written."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "file").write_text("mine")
    (tmp_path / "page.html.partial").symlink_to(mine / "file")
    (tmp_path / "page.html").symlink_to(mine / "file")
    (tmp_path / "events.jsonl").symlink_to(mine / "file")
    (tmp_path / "model.partial").symlink_to(mine)
    (tmp_path / "model").symlink_to(mine)
    write_text(tmp_path / "page.html", "a page")
    with whole_folder(tmp_path / "model") as partial:
        (partial / "new").write_text("new")
    for write in (lambda path: append_jsonl(path, {"a": 1}), cut_torn_line):
        with pytest.raises(RunDirectoryError, match=r"events.jsonl: is a link to another file"):
            write(tmp_path / "events.jsonl")
    assert (tmp_path / "page.html").read_text() == "a page" and not (tmp_path / "page.html").is_symlink()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("file", "mine")]
