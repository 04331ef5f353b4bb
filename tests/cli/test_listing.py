"""The lists of methods and tuners: each line is a whole sentence, and each first line fits."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.methods import METHODS
from holdfast.tuners import TUNERS
from support.command import holdfast


@pytest.mark.parametrize(("listing", "known"), [("methods", METHODS), ("tuners", TUNERS)])
def test_no_description_is_cut(listing: str, known: Any, capsys: Any) -> None:
    assert holdfast(listing) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [page.name for page in known.pages()]
    for line, page in zip(lines, known.pages(), strict=True):
        assert line.endswith(".") and line.endswith(page.doc.splitlines()[0]), page.name


def test_the_help_of_learn_lists_the_keys_that_learn_takes(capsys: Any) -> None:
    """And no other: of a task, what DATA and --name do not say."""
    holdfast("learn", "--help")
    said = capsys.readouterr().out
    keys = {line.split()[0] for line in said.partition("\nKeys")[2].splitlines() if line[:2] == "  " and line[2] != " "}
    assert {"task.columns", "task.max_new_tokens", "task.subset", "training.epochs", "gate.on_fail", "model"} <= keys
    assert not {key for key in keys if key.startswith(("stream", "output"))}
    assert not keys & {"task.name", "task.path", "task.dataset"}
    holdfast("run", "--help")
    assert "\n  stream.tasks.columns " in capsys.readouterr().out
