"""The report: run directories in, one self-contained HTML page (or a plain table) out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.report.compare import compare_table
    from holdfast.report.figures import FIGURES, Figure
    from holdfast.report.page import write_report

__all__ = ["FIGURES", "Figure", "compare_table", "write_report"]

_HOME = {"FIGURES": "figures", "Figure": "figures", "compare_table": "compare", "write_report": "page"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `holdfast status` does not wait for the page's templates."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
