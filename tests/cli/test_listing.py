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
