"""The report: run directories in, one self-contained HTML page (or a plain table) out."""

from holdfast.report.compare import compare_table
from holdfast.report.figures import FIGURES, Figure
from holdfast.report.page import write_report

__all__ = ["FIGURES", "Figure", "compare_table", "write_report"]
