"""One self-contained HTML page that compares runs: tables, statistics, plots, slices, configurations."""

from scantly.report.page import build_report
from scantly.report.tables import comparison_table

__all__ = ["build_report", "comparison_table"]
