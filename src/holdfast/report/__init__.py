"""The report: run directories in, one self-contained HTML page (or a plain table) out."""

from holdfast.report.compare import FIGURES, Figure, compare_table
from holdfast.report.page import write_report

__all__ = ["FIGURES", "Figure", "compare_table", "write_report"]
