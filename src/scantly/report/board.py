"""The leaderboard of a section: every method by its labeled counts, with diagrams, ranks and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scantly.benchmark.comparison import beside_published
from scantly.errors import RunError
from scantly.evaluation import (
    DEFINITIONS,
    OVERALL,
    Labeled,
    ScoredRun,
    compare_over_seeds,
    learning_curve,
    mean_over_seeds,
    rank_methods,
    summarize_runs,
)
from scantly.report.groups import Method, Section
from scantly.report.learning_diagram import learning_curve_diagram
from scantly.report.plots import Plot
from scantly.report.rank_diagram import critical_difference_diagram
from scantly.report.tables import Cell, Column, columns, difference_texts, number_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Board", "BoardRow", "BoardTable", "board", "published_rows", "scored_runs"]

_METRICS = ("dice", "jaccard", "hd95_voxels", "asd_voxels", "hd95_mm", "asd_mm")
_BASELINE = "supervised"
_MOST_DRAWN = 25


@dataclass(frozen=True)
class BoardRow:
    """One method in one table: its place, its bound, and a cell per labeled count (``None``: no run)."""

    rank: str
    name: str
    note: str
    cells: tuple[tuple[Cell, str] | None, ...]


@dataclass(frozen=True)
class BoardTable:
    """One class in one metric.

    Attributes:
        class_number: Of the class, the mean over classes first, from 0.
        metric_number: Of the metric, from 0.
        title: Both in words.
        rows: The best method first, by the smallest labeled count.
    """

    class_number: int
    metric_number: int
    title: str
    rows: tuple[BoardRow, ...]


@dataclass(frozen=True)
class Board:
    """A section's leaderboard; see the template for what each part is shown as."""

    classes: tuple[str, ...]
    metrics: tuple[Column, ...]
    counts: tuple[str, ...]
    tables: tuple[BoardTable, ...]
    curve: Plot | None
    rankings: tuple[tuple[str, Plot], ...]
    tests: tuple[tuple[str, tuple[dict[str, str], ...]], ...]
    shortened: tuple[str, ...]


def scored_runs(section: Section) -> list[ScoredRun]:
    """The runs of a section as the statistics take them."""
    return [
        ScoredRun(method.row, method.labeled, result.seed, result.table)
        for method in section.methods
        for result in method.results
    ]


def board(section: Section) -> Board | None:
    """The leaderboard; ``None`` where there is one method only, or one labeled count per method says all."""
    if len(section.methods) < 2 or not _distinct(section):
        return None
    runs = scored_runs(section)
    shown = columns(section, _METRICS)
    summary = summarize_runs(runs, metrics=[column.metric for column in shown])
    counts = _counts(section.methods)
    classes = (OVERALL, *section.classes) if len(section.classes) > 1 else section.classes
    tables = tuple(
        _table(section, summary, name, column, counts, place=(number, place))
        for number, name in enumerate(classes)
        for place, column in enumerate(shown)
    )
    return Board(
        classes=classes,
        metrics=tuple(shown),
        counts=tuple(_count_text(count, section.unit) for count in counts),
        tables=tables,
        curve=_curve(section, runs, counts),
        rankings=_rankings(section, runs, counts),
        tests=_tests(section, runs, counts),
        shortened=_shortened(section),
    )


def published_rows(section: Section) -> list[dict[str, Any]]:
    """Published beside measured numbers, see :func:`~scantly.benchmark.comparison.beside_published`."""
    recipes = {result.run.config.get("recipe") for result in section.results}
    if section.protocol != "literature" or len(recipes) != 1 or not _distinct(section):
        return []
    summary = summarize_runs(scored_runs(section))
    rows = []
    for method in section.methods:
        config = method.results[0].run.config
        part = summary[(summary["method"] == method.row) & (summary["labeled"] == method.labeled)]
        training, labeled = config.get("training", {}), config.get("split", {}).get("labeled", ())
        rows.append(
            {
                "row": method.row,
                "method": str(config["method"]["name"]),
                "labeled": method.labeled,
                "subjects": len({section.groups.get(case, case) for case in labeled}),
                "complete": training.get("steps") == training.get("published_steps"),
                "split": section.split,
                "means": {(row["class"], row["metric"]): row["mean"] for row in part.to_dict("records")},
            }
        )
    return beside_published(str(recipes.pop()), rows, section.protocol)


def _distinct(section: Section) -> bool:
    """Rows of one name with one count must be one method."""
    places = [(method.row, method.labeled) for method in section.methods]
    return len(set(places)) == len(places)


def _counts(methods: Sequence[Method]) -> list[Labeled]:
    counts: set[Labeled] = {method.labeled for method in methods}
    return sorted(counts, key=lambda count: float("inf") if count == "all" else float(count))


def _count_text(count: Labeled, unit: str) -> str:
    return f"all {unit}s" if count == "all" else f"{count} {unit}{'' if count == 1 else 's'}"


def _table(
    section: Section,
    summary: pd.DataFrame,
    name: str,
    column: Column,
    counts: Sequence[Labeled],
    *,
    place: tuple[int, int],
) -> BoardTable:
    part = summary[(summary["class"] == name) & (summary["metric"] == column.metric)]
    found = {(row["method"], row["labeled"]): row for row in part.to_dict("records")}
    names = list(dict.fromkeys(method.row for method in section.methods))
    higher = DEFINITIONS[column.metric].higher_is_better
    ordered = sorted(names, key=lambda row: _sort_key(row, found, counts, higher=higher))
    best: dict[Labeled, str] = {count: _best(found, count, higher=higher) for count in counts if count != "all"}
    rows = []
    for rank, row in enumerate(ordered, start=1):
        cells: list[tuple[Cell, str] | None] = []
        for count in counts:
            values = found.get((row, count))
            method = next((m for m in section.methods if (m.row, m.labeled) == (row, count)), None)
            if values is None or method is None:
                cells.append(None)
                continue
            spread, mean = float(values["std_over_seeds"]), float(values["mean"])
            told = "" if math.isnan(spread) else f"± {number_text(column, spread)}"
            text = number_text(column, None if math.isnan(mean) else mean)
            cells.append((Cell(text, told, best=text == best.get(count, "") and text != "–"), method.anchor))
        rows.append(BoardRow(str(rank), row, _note(section, row), tuple(cells)))
    unit = f" ({column.unit})" if column.unit else ""
    return BoardTable(*place, f"{column.title}{unit}, {name}", tuple(rows))


def _sort_key(row: str, found: Mapping[Any, Any], counts: Sequence[Labeled], *, higher: bool) -> tuple[float, ...]:
    """By the smallest labeled count that the row has; then the next."""
    key = []
    for count in counts:
        mean = float(found[row, count]["mean"]) if (row, count) in found else math.nan
        key.append(math.inf if math.isnan(mean) else (-mean if higher else mean))
    return tuple(key)


def _best(found: Mapping[Any, Any], count: Labeled, *, higher: bool) -> str:
    """The best mean of a count as printed."""
    means = [row for (_, labeled), row in found.items() if labeled == count and not math.isnan(row["mean"])]
    if len(means) < 2:
        return ""
    row = (max if higher else min)(means, key=lambda row: row["mean"])
    return number_text(Column(row["metric"], "", ""), float(row["mean"]))


def _note(section: Section, row: str) -> str:
    bounds = {method.bound for method in section.methods if method.row == row and method.bound}
    return ", ".join(sorted(bounds))


def _curve(section: Section, runs: Sequence[ScoredRun], counts: Sequence[Labeled]) -> Plot | None:
    if len([count for count in counts if count != "all"]) < 2:
        return None
    try:
        curve = learning_curve(runs, metric="dice")
    except RunError:  # several methods with all labels: no one upper bound
        curve = learning_curve([run for run in runs if run.labeled != "all"], metric="dice")
    return learning_curve_diagram(curve, unit=section.unit, salt=f"{section.protocol} board")


def _of_count(runs: Sequence[ScoredRun], count: Labeled) -> list[ScoredRun]:
    return [run for run in runs if run.labeled == count]


def _rankings(section: Section, runs: Sequence[ScoredRun], counts: Sequence[Labeled]) -> tuple[tuple[str, Plot], ...]:
    drawn = []
    for count in counts:
        of_count = _of_count(runs, count)
        names = {run.method for run in of_count}
        if count == "all" or not 2 <= len(names) <= _MOST_DRAWN:
            continue
        try:
            ranking = rank_methods(mean_over_seeds(of_count), groups=section.groups)
        except RunError:  # too few cases for a test
            continue
        plot = critical_difference_diagram(ranking, unit=section.unit, salt=f"{section.protocol} {count}")
        drawn.append((_count_text(count, section.unit), plot))
    return tuple(drawn)


def _tests(
    section: Section, runs: Sequence[ScoredRun], counts: Sequence[Labeled]
) -> tuple[tuple[str, tuple[dict[str, str], ...]], ...]:
    """Every method against the supervised one with the same labels, in Dice."""
    column = columns(section, ("dice",))[0]
    baselines = {m.row for m in section.methods if m.results[0].run.config["method"]["name"] == _BASELINE}
    found = []
    for count in counts:
        of_count = _of_count(runs, count)
        names = list(dict.fromkeys(run.method for run in of_count))
        baseline = next((name for name in names if name in baselines and not _is_planned(section, name)), None)
        if count == "all" or baseline is None or len(names) < 2:
            continue
        compared = compare_over_seeds(of_count, groups=section.groups, against=baseline)
        rows = tuple(
            {"method": str(row["a"]), **difference_texts(column, row)}
            for row in sorted(compared.to_dict("records"), key=lambda row: -row["difference"])
        )
        found.append((f"{_count_text(count, section.unit)}, against {baseline}", rows))
    return tuple(found)


def _is_planned(section: Section, row: str) -> bool:
    """A supervised row that does not share the others' recipe is no baseline for them."""
    recipes = [method.results[0].run.config.get("recipe") for method in section.methods if method.row == row]
    others = [method.results[0].run.config.get("recipe") for method in section.methods if method.row != row]
    return bool(recipes and others) and recipes[0] is None and all(recipe is not None for recipe in others)


def _shortened(section: Section) -> tuple[str, ...]:
    """Lengths that are not the recipe's own, each once."""
    said: dict[str, None] = {}
    for result in section.results:
        training = result.run.config.get("training", {})
        published, steps = training.get("published_steps"), training.get("steps")
        if published and steps and published != steps:
            recipe = result.run.config.get("recipe")
            said[f"{steps:,} of the {published:,} iterations of recipe {recipe}"] = None
    return tuple(said)
