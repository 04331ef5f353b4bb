"""The house stands: imports only go down, no files import each other in a circle, and everything fits on a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from support.paths import ROOT

SOURCE = ROOT / "src"
ROOMS = [
    "version",
    "errors",
    "metrics",
    "system",
    "config",
    "losses",
    "engines",
    "models",
    "api",
    "tuners",
    "scoring",
    "data",
    "records",
    "rehearsal",
    "evaluation",
    "methods",
    "report",
    "training",
    "runner",
    "sweep",
    "deploy",
    "lab",
    "cli",
]
"""From the ground up: a room imports from those before it alone."""

FACES = ("__init__", "__main__", "shards", "soft_prompts")
"""In the package's root, above all rooms: its public names, and names of old that stay."""

LONG: dict[str, str] = {}
"""Functions that may have more than 80 lines, each with its reason."""

FILES = {".".join(p.relative_to(SOURCE).with_suffix("").parts): p for p in sorted(SOURCE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def imports(module: str) -> Iterator[str]:
    """The modules that a module names in an import, inside functions and for type checkers too."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = next((n for n in (inner, f"{inner}.__init__", node.module) if n in FILES), None)
                yield name or f"{node.module}.__init__"
        elif isinstance(node, ast.Import):
            yield from (f"{alias.name}.__init__" if alias.name not in FILES else alias.name for alias in node.names)


def test_every_module_stands_in_a_room():
    assert {room(module) for module in FILES} == {*ROOMS, *FACES}


def test_no_import_runs_up():
    height = {name: floor for floor, name in enumerate([*ROOMS, *FACES])}
    up = [
        f"{module} imports {other}"
        for module in FILES
        for other in imports(module)
        if other in FILES and room(module) not in FACES and height[room(other)] > height[room(module)]
    ]
    assert not up, "\n".join(up)


def test_no_circle():
    graph = {module: {other for other in imports(module) if other in FILES} - {module} for module in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_no_module_is_long(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_no_function_is_long():
    functions = {
        f"{module}:{node.name}": node
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {name for name, node in functions.items() if (node.end_lineno or 0) - node.lineno >= 80}
    assert long == set(LONG)
