"""The scripts of the folder .ci, as modules."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from support.paths import ROOT


def script(name: str) -> ModuleType:
    """The module that `.ci/NAME.py` is."""
    spec = importlib.util.spec_from_file_location(f"ci_{name}", ROOT / ".ci" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
