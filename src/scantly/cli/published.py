"""How published results are printed."""

from __future__ import annotations

from collections.abc import Sequence

from scantly.benchmark.published import LINEAGES, MEAN, METRICS, PublishedResult
from scantly.cli.output import say, say_wrapped

__all__ = ["say_published"]


def say_published(results: Sequence[PublishedResult]) -> None:
    """Print the means of published results, by dataset, lineage and source; rows of single classes are left out.

    Args:
        results: Those of one method.
    """
    means = sorted((row for row in results if row.class_name == MEAN), key=lambda row: row.dataset)
    if not means:
        say("\nPublished results: none in the tables we ship.")
        return
    say("\nPublished results (means over classes; numbers of different lineages are not comparable):")
    groups: dict[tuple[str, str], dict[str, list[PublishedResult]]] = {}
    for row in means:
        groups.setdefault((row.dataset, row.lineage), {}).setdefault(row.source, []).append(row)
    for (dataset, lineage), sources in groups.items():
        say_wrapped(f"{dataset}, lineage {lineage}: {LINEAGES[lineage]}")
        for source, rows in sources.items():
            say_wrapped(source, indent=4)
            _say_rows(rows)


def _say_rows(rows: Sequence[PublishedResult]) -> None:
    """One line per labeled count (and variant), one column per metric, then what is noted on them."""
    lines: dict[str, dict[str, str]] = {}
    widths: dict[str, int] = {}
    for row in rows:
        head = f"{METRICS[row.metric][0]} [{row.unit}]"
        cell = f"{row.value:.{row.decimals}f}" + ("" if row.spread is None else f" ± {row.spread:g}")
        lines.setdefault(_label(row), {})[head] = cell
        widths[head] = max(widths.get(head, len(head)), len(cell))
    left = max(len(label) for label in ("labeled", *lines))
    say("".join([f"      {'labeled':<{left}}", *(f"  {head:>{width}}" for head, width in widths.items())]))
    for label, line in lines.items():
        cells = (f"  {line.get(head, ''):>{width}}" for head, width in widths.items())
        say("".join([f"      {label:<{left}}", *cells]).rstrip())
    for note in _notes(rows):
        say_wrapped(f"note: {note}", indent=6)


def _label(row: PublishedResult) -> str:
    """How many were labeled, and the variant."""
    unit = "%" if row.labeled_unit == "percent" else row.labeled_unit[: -1 if row.labeled == 1 else None]
    return f"{row.labeled:g} {unit}" + (f", {row.variant}" if row.variant else "")


def _notes(rows: Sequence[PublishedResult]) -> list[str]:
    """Each note once, with the lines and metrics it is on unless it is on all."""
    noted: dict[str, list[PublishedResult]] = {}
    for row in rows:
        for note in filter(None, row.note.split("; ")):
            noted.setdefault(note, []).append(row)
    told = []
    for note, on in noted.items():
        metrics = list(dict.fromkeys(row.metric for row in on))
        labels = list(dict.fromkeys(_label(row) for row in on))
        every_line = set(labels) == {_label(row) for row in rows if row.metric in metrics}
        every_metric = set(metrics) == {row.metric for row in rows}
        place = [] if every_line else labels
        place += [] if every_metric else [" and ".join(METRICS[metric][0] for metric in metrics)]
        told.append(f"{note} ({'; '.join(place)})" if place else note)
    return told
