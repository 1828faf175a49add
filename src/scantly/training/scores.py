"""What an evaluation found: the scores of the cases that could be scored, and why the others could not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scantly.errors import ScantlyError, together
from scantly.evaluation import Convention, Row, make_table, summarize

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Scores", "scores_of"]


@dataclass(frozen=True)
class Scores:
    """Scores of the cases that could be scored.

    Attributes:
        table: Per case and class.
        summary: Of the table; ``failed`` lists the other cases, if there are any, with ``case`` and ``reason``.
        failed: The other cases, and why.
        place: CSV file of the table; None if it was not written.
    """

    table: pd.DataFrame
    summary: dict[str, Any]
    failed: Mapping[str, ScantlyError]
    place: Path | None = None

    @property
    def error(self) -> ScantlyError | None:
        """All failures as one error; None if there are none."""
        return _error(self.failed, self.summary["overall"]["cases"]) if self.failed else None


def scores_of(rows: Sequence[Row], failed: Mapping[str, ScantlyError], *, convention: Convention) -> Scores:
    """Table and summary.

    Args:
        rows: Of :func:`scantly.evaluation.score_case`, of all cases that could be scored.
        failed: The other cases, and why.
        convention: How empty masks count.

    Raises:
        ScantlyError: if no case could be scored.
    """
    if failed and not rows:
        raise _error(failed, 0)
    table = make_table(rows)
    listed = [{"case": name, "reason": str(error)} for name, error in failed.items()]
    summary = summarize(table, protocol=convention, convention=convention) | ({"failed": listed} if listed else {})
    return Scores(table, summary, failed)


def _error(failed: Mapping[str, ScantlyError], scored: int) -> ScantlyError:
    return together(failed, f"{len(failed)} of {len(failed) + scored} cases cannot be scored")
