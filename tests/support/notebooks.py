"""A notebook's cells, run one after another as Jupyter would, without a kernel."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from support.command import holdfast

GATE_FAILED = 3
SHELL = {"&", "|", "||", "<", ">", "2>&1"}
"""Words behind which a command's own arguments end."""


def code_cells(notebook: Path) -> list[str]:
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def commands(cell: str) -> Iterator[list[str]]:
    """The words of each command of a cell of bash; a line that ends in a backslash goes on."""
    body = cell.removeprefix("%%bash\n").replace("\\\n", " ")
    for line in body.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def is_plain(cell: str) -> bool:
    """Whether it has commands of holdfast alone, one after another, that need no shell."""
    return "*" not in cell and all(words[0] == "holdfast" and not SHELL & set(words) for words in commands(cell))


def execute(cell: str, names: dict[str, Any]) -> None:
    """Run a cell where it would run: in the current directory.

    Args:
        names: of the Python cells so far.
    """
    if written := re.match(r"%%writefile (\S+)\n", cell):
        Path(written[1]).write_text(cell[written.end() :], encoding="utf-8")
    elif not cell.startswith("%%bash\n"):
        exec(compile(cell, "cell", "exec"), names)
    elif is_plain(cell):
        for words in commands(cell):
            assert holdfast(*words[1:]) in (0, GATE_FAILED), words
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        script = ["bash", "-euc", cell.removeprefix("%%bash\n")]
        subprocess.run(script, check=True, env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"})
