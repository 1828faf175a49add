"""The numbers of the page: over seeds, over cases per class, and paired statistics between methods."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from scantly.errors import RunError
from scantly.evaluation import DEFINITIONS, OVERALL, aggregate_seeds, case_means, compare_methods, summarize
from scantly.report.groups import Method, Result, Section, collect

if TYPE_CHECKING:
    import pandas as pd

    from scantly.training.run import Run

__all__ = [
    "Cell",
    "Column",
    "Row",
    "Statistics",
    "case_table",
    "class_tables",
    "columns",
    "comparison_table",
    "difference_texts",
    "gains",
    "number_text",
    "overview",
    "statistics",
]


_TITLES = list(dict.fromkeys(definition.title for definition in DEFINITIONS.values()))
_BY_TITLE = sorted(DEFINITIONS, key=lambda metric: _TITLES.index(DEFINITIONS[metric].title))  # units side by side
_OVERVIEW = ("dice", "jaccard", "hd95_voxels", "asd_voxels", "hd95_mm", "asd_mm")
_LAST = ("", "lower bound", "upper bound")  # so that a difference reads: method minus bound
_SMALLEST_P = 0.001  # smaller p values are written as < 0.001


@dataclass(frozen=True)
class Column:
    """A metric column: key of the definitions, title, and unit (with the tolerance for surface Dice)."""

    metric: str
    title: str
    unit: str


@dataclass(frozen=True)
class Cell:
    """A number as text, its spread as text (empty if there is none), and whether it is the column's best."""

    text: str
    spread: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """A table row: what it is about, its kind (``"method"`` or ``"run"``), and its cells."""

    head: str
    note: str
    kind: str
    cells: tuple[Cell, ...]
    missed: int
    spurious: int
    both_empty: int


@dataclass(frozen=True)
class Statistics:
    """Paired comparisons in one metric, or the sentence that says why there are none."""

    column: Column
    rows: tuple[dict[str, str], ...]
    number: int
    reason: str = ""


def columns(section: Section, metrics: Sequence[str] = tuple(DEFINITIONS)) -> list[Column]:
    """Columns of the section's tables; those in mm only where the spacing is known."""
    chosen = []
    for metric in metrics:
        definition = DEFINITIONS[metric]
        if metric.endswith("_mm") and not section.has_mm:
            continue
        unit = "0 to 1" if definition.unit == "1" else definition.unit
        if metric.startswith("nsd"):
            unit = f"{section.tolerance_mm:g} mm" if metric.endswith("_mm") else "1 voxel"
        chosen.append(Column(metric, definition.title, unit))
    return chosen


def overview(section: Section) -> tuple[list[Column], list[Row]]:
    """Mean over cases and classes of every method (± std over its seeds), followed by its runs."""
    shown = columns(section, _OVERVIEW)
    rows: list[Row] = []
    for method in section.methods:
        summaries = [_summary(section, result.table) for result in method.results]
        overall = aggregate_seeds(summaries)["overall"]
        many = len(method.results) > 1
        seeds = ", ".join(str(result.seed) for result in method.results)
        rows.append(
            Row(
                method.title,
                f"{'seeds' if many else 'seed'} {seeds}",
                "method",
                tuple(_cell(column, overall[column.metric], "seeds") for column in shown),
                overall["missed"],
                overall["spurious"],
                overall["both_empty"],
            )
        )
        if many:
            rows += [
                _run_row(result, summary, shown) for result, summary in zip(method.results, summaries, strict=True)
            ]
    return shown, _mark_best(rows, shown, section)


def _run_row(result: Result, summary: dict[str, Any], shown: Sequence[Column]) -> Row:
    overall = summary["overall"]
    cells = tuple(Cell(number_text(column, overall[column.metric]["mean"])) for column in shown)
    counts = (overall[name] for name in ("missed", "spurious", "both_empty"))
    return Row(result.name, f"seed {result.seed}", "run", cells, *counts)


def class_tables(section: Section) -> tuple[list[Column], list[tuple[str, list[Row]]]]:
    """Mean ± std over cases per class and method, each case being the mean over the method's runs."""
    shown = columns(section, _BY_TITLE)
    rows: dict[str, list[Row]] = {name: [] for name in (*section.classes, OVERALL)}
    for method in section.methods:
        averaged = _over_cases(method)
        counts = aggregate_seeds([_summary(section, result.table) for result in method.results])
        for name, members in rows.items():
            scores = averaged[name]
            count = counts["overall"] if name == OVERALL else counts["classes"][name]
            cells = tuple(_cell(column, scores[column.metric], "cases") for column in shown)
            counted = (count[status] for status in ("missed", "spurious", "both_empty"))
            members.append(Row(method.title, "", "method", cells, *counted))
    return shown, [(name, _mark_best(members, shown, section)) for name, members in rows.items()]


def _over_cases(method: Method) -> dict[str, dict[str, dict[str, float | None]]]:
    """Class (and :data:`OVERALL`) -> metric -> mean and std over cases of the method's mean table."""
    classes: dict[str, dict[str, dict[str, float | None]]] = {}
    for name, rows in method.table.groupby("class", sort=False):
        classes[str(name)] = {metric: _spread(rows[metric]) for metric in DEFINITIONS}
    overall: dict[str, dict[str, float | None]] = {}
    for metric in DEFINITIONS:
        means = [mean for scores in classes.values() if (mean := scores[metric]["mean"]) is not None]
        deviation = _spread(case_means(method.table, metric))["std_over_cases"]
        overall[metric] = {"mean": sum(means) / len(means) if means else None, "std_over_cases": deviation}
    return classes | {OVERALL: overall}


def _spread(values: pd.Series[float]) -> dict[str, float | None]:
    known = values.dropna()
    return {
        "mean": float(known.mean()) if len(known) else None,
        "std_over_cases": float(known.std(ddof=1)) if len(known) > 1 else None,
    }


def _summary(section: Section, table: pd.DataFrame) -> dict[str, Any]:
    return summarize(
        table,
        protocol=section.protocol,
        convention="literature" if section.protocol == "literature" else "clean",
        tolerance_mm=section.tolerance_mm,
    )


def _cell(column: Column, score: dict[str, Any], over: str) -> Cell:
    deviation = score[f"std_over_{over}"]
    spread = "" if deviation is None else f"± {number_text(column, deviation)}"
    return Cell(number_text(column, score["mean"]), spread)


def number_text(column: Column, value: float | None) -> str:
    """A value as tables show it: three decimals for shares, two for distances."""
    if value is None:
        return "–"
    return f"{value:.3f}" if DEFINITIONS[column.metric].unit == "1" else f"{value:.2f}"


def _mark_best(rows: list[Row], shown: Sequence[Column], section: Section) -> list[Row]:
    """Mark the best method of each column as printed; an upper bound does not compete."""
    bounds = {method.title: method.bound for method in section.methods}
    rivals = [index for index, row in enumerate(rows) if row.kind == "method" and bounds[row.head] != "upper bound"]
    if len(rivals) < 2:
        return rows
    marked = [list(row.cells) for row in rows]
    for number, column in enumerate(shown):
        values = {index: float(text) for index in rivals if (text := rows[index].cells[number].text) != "–"}
        if not values:
            continue
        best = (max if DEFINITIONS[column.metric].higher_is_better else min)(values.values())
        for index, value in values.items():
            if value == best:
                cell = rows[index].cells[number]
                marked[index][number] = Cell(cell.text, cell.spread, best=True)
    return [replace(row, cells=tuple(cells)) for row, cells in zip(rows, marked, strict=True)]


def statistics(section: Section) -> list[Statistics]:
    """Paired comparisons of all methods in Dice and in HD95 (mm where known, else voxels)."""
    distance = "hd95_mm" if section.has_mm and section.protocol != "literature" else "hd95_voxels"
    return [_statistics(section, column) for column in columns(section, ("dice", distance))]


def _statistics(section: Section, column: Column) -> Statistics:
    order = sorted(section.methods, key=lambda method: _LAST.index(method.bound))
    tables = {method.title: method.table for method in order}
    if len(tables) < 2:
        return Statistics(column, (), 0, "There is one method only; statistics need a second one.")
    try:
        compared = compare_methods(tables, metric=column.metric, groups=section.groups)
    except RunError as error:
        return Statistics(column, (), 0, f"Not computed: {error}")
    rows = tuple(
        {
            "a": str(row["a"]),
            "b": str(row["b"]),
            **difference_texts(column, row),
        }
        for row in compared.to_dict("records")
    )
    return Statistics(column, rows, int(compared["n"].min()))


def gains(section: Section) -> list[str]:
    """One sentence per method: its difference in Dice to the lower bound, with interval and p value."""
    bound = [method.title for method in section.methods if method.bound == "lower bound"]
    free = {method.title for method in section.methods if not method.bound}
    compared = _statistics(section, columns(section, ("dice",))[0])
    return [
        f"{row['a']}: mean Dice {row['difference']} against {row['b']}; 95 % interval {row['interval']}, "
        f"p {row['p_holm'] if row['p_holm'].startswith('<') else '= ' + row['p_holm']} (Wilcoxon, Holm), "
        f"{row['n']} {section.unit}s."
        for row in compared.rows
        if row["a"] in free and row["b"] in bound
    ]


def difference_texts(column: Column, row: Mapping[Hashable, Any]) -> dict[str, str]:
    """What a table shows of one comparison: difference, interval, p values, number of pairs."""
    return {
        "difference": signed_text(column, row["difference"]),
        "interval": f"{signed_text(column, row['ci_low'])} to {signed_text(column, row['ci_high'])}",
        "p": p_text(row["p"]),
        "p_holm": p_text(row["p_holm"]),
        "n": str(row["n"]),
    }


def signed_text(column: Column, value: float) -> str:
    """A difference with its sign."""
    text = number_text(column, abs(value))
    return text if float(text) == 0 else f"{'+' if value > 0 else '−'}{text}"


def p_text(value: float) -> str:
    """A p value; those below 0.001 are not told apart."""
    return f"< {_SMALLEST_P}" if value < _SMALLEST_P else f"{value:.3f}"


def case_table(section: Section) -> list[tuple[str, list[str]]]:
    """Mean Dice over classes per case and method, the hardest case first."""
    means = [case_means(method.table, "dice") for method in section.methods]
    totals = {case: sum(float(series[case]) for series in means) for case in section.cases}
    order = sorted(totals, key=lambda case: (math.isnan(totals[case]), totals[case]))
    return [(case, ["–" if math.isnan(series[case]) else f"{series[case]:.3f}" for series in means]) for case in order]


def comparison_table(runs: Sequence[Run], split: str | None = None) -> pd.DataFrame:
    """The comparison as one table of numbers, for scripts and the command line.

    Args:
        runs: Evaluated runs; those that differ in their seed only are aggregated.
        split: ``"test"`` or ``"val"``; ``None``: test if all runs have it, else val.

    Returns:
        One row per protocol, method and class (and one for the mean over classes): ``protocol``, ``split``,
        ``method``, ``bound``, ``seeds``, ``cases``, ``class``, ``missed``, ``spurious`` and ``both_empty`` (over
        all seeds), and per metric its mean, ``<metric>_std_over_cases`` and ``<metric>_std_over_seeds`` (NaN where
        there is one value only).

    Raises:
        RunError: as :func:`scantly.report.groups.collect`.
    """
    import pandas as pd

    rows = []
    for section in collect(runs, split):
        for method in section.methods:
            averaged = _over_cases(method)
            seeds = aggregate_seeds([_summary(section, result.table) for result in method.results])
            for name, scores in averaged.items():
                over_seeds = seeds["overall"] if name == OVERALL else seeds["classes"][name]
                row: dict[str, Any] = {
                    "protocol": section.protocol,
                    "split": section.split,
                    "method": method.label,
                    "bound": method.bound,
                    "seeds": len(method.results),
                    "cases": len(section.cases),
                    "class": name,
                    "missed": over_seeds["missed"],
                    "spurious": over_seeds["spurious"],
                    "both_empty": over_seeds["both_empty"],
                }
                for metric in DEFINITIONS:
                    row[metric] = scores[metric]["mean"]
                    row[f"{metric}_std_over_cases"] = scores[metric]["std_over_cases"]
                    row[f"{metric}_std_over_seeds"] = over_seeds[metric]["std_over_seeds"]
                rows.append(row)
    table = pd.DataFrame(rows)
    numbers = [column for column in table.columns if column.startswith(tuple(DEFINITIONS))]
    return table.astype(dict.fromkeys(numbers, float))
