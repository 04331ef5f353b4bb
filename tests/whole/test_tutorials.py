"""The tutorials: page and notebook are one, what they call exists, and small they run from first to last cell."""

from __future__ import annotations

import re
import shutil
from itertools import takewhile
from typing import Any

import pytest
import yaml

from holdfast.lab import demo
from support.command import parse
from support.notebooks import SHELL, code_cells, commands, execute
from support.paths import DOCS
from support.scripts import script
from support.tiny import write_chat_model

notebooks = script("notebooks")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WORLD = {"size: 50": "size: 4"}
SMALL = {
    "fair-comparison": WORLD | {"epochs: 5": "epochs: 1", "seed: [0, 1, 2]": "seed: [0, 1]"},
    "laptop-to-cluster": {},
    "lost-manners": {"num_train_epochs=3": "max_steps=2", "rows: 60": "rows: 4"},
    "my-own-method": WORLD | {"epochs: 5": "epochs: 1"},
    "new-tickets-every-month": {"epochs: 25": "max_steps: 2"},
    "why-do-models-forget": {},
}
"""By tutorial: what is replaced in its cells, so that they take seconds."""

every_tutorial = pytest.mark.parametrize("page", notebooks.pages(), ids=lambda page: page.stem)


@every_tutorial
def test_the_notebook_is_that_of_the_page(page):
    """`python .ci/notebooks.py` was called after the last change of the page."""
    made = notebooks.notebook(page.read_text(encoding="utf-8"))
    assert page.with_suffix(".ipynb").read_text(encoding="utf-8") == made


@every_tutorial
def test_its_cells_can_be_read_and_its_commands_exist(page):
    seen = 0
    for cell in code_cells(page.with_suffix(".ipynb")):
        if file := re.match(r"%%writefile (\S+)\n", cell):
            body = cell[file.end() :]
            assert yaml.safe_load(body) if file[1].endswith(".yaml") else compile(body, file[1], "exec")
        elif cell.startswith("%%bash\n"):
            for words in commands(cell):
                if words[0] == "holdfast":
                    parse(list(takewhile(lambda word: word not in SHELL, words[1:])))
                    seen += 1
        else:
            compile(cell, page.name, "exec")
    assert seen


def test_a_command_that_does_not_exist_is_seen():
    parse(["lab", "experiment", "why.yaml", "--out", "runs"])
    for wrong in (["lern", "a.csv"], ["learn", "a.csv", "--in", "run"], ["lab", "experiment", "a", "--outt", "b"]):
        with pytest.raises(Exception, match=r"No such|Missing"):
            parse(wrong)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of the tutorials, a tiny model under the hub name, and a short pretraining."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setitem(demo.PRETRAINING, "stop", {"tokens": 10 * 8 * 64})
    for file in [*notebooks.TUTORIALS.glob("*.csv"), *notebooks.TUTORIALS.glob("*.jsonl")]:
        shutil.copy(file, tmp_path)
    write_chat_model(tmp_path / MODEL, context=512)
    return tmp_path


@pytest.mark.slow
@every_tutorial
def test_it_runs(page, folder):
    small = SMALL[page.stem]
    cells = code_cells(page.with_suffix(".ipynb"))
    for text, less in small.items():
        assert any(text in cell for cell in cells), f"no cell has {text}"
        cells = [cell.replace(text, less) for cell in cells]
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells:
        execute(cell, names)
    pictures = re.findall(r"!\[[^\]]+\]\((\S+)\)", page.read_text(encoding="utf-8"))
    assert pictures and all((folder / picture).stat().st_size > 5_000 for picture in pictures)


@every_tutorial
def test_its_pictures_are_small(page):
    for picture in re.findall(r"!\[[^\]]+\]\((\S+)\)", page.read_text(encoding="utf-8")):
        assert (DOCS / "tutorials" / picture).stat().st_size < 60_000
