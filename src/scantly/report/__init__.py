"""One self-contained HTML page that compares runs: tables, statistics, plots, slices, configurations."""

from scantly.report.page import compare
from scantly.report.tables import comparison_table

__all__ = ["compare", "comparison_table"]
