"""The report of a benchmark: the page that compares runs, with costs, published numbers and what is missing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scantly.benchmark.cells import Cell
from scantly.benchmark.grid import Grid, duration
from scantly.errors import RunError
from scantly.evaluation import summarize_runs
from scantly.files import write_json, write_text
from scantly.methods import catalogue
from scantly.report.board import scored_runs
from scantly.report.groups import Section, collect
from scantly.report.page import Extras, write_page
from scantly.training.run import Run

__all__ = ["benchmark_report"]


def benchmark_report(grid: Grid, out: str | Path | None = None) -> Path:
    """Write the report of what is done of a benchmark.

    Beside the page lie ``results.csv`` (one row per dataset, method, labeled count, class and metric: mean and spreads)
    and ``results.json`` (every cell with its means, state and cost).

    Args:
        grid: The benchmark.
        out: The HTML file; ``None``: ``report.html`` in the results folder.

    Returns:
        The HTML file.

    Raises:
        RunError: if no cell is done.
    """
    page = Path(out) if out is not None else grid.folder / "report.html"
    state = grid.state()
    if not state.done:
        raise RunError(f"no cell of the benchmark in {grid.folder} is done; there is nothing to report.")
    sections, names = _sections(grid, state.done)
    extras = Extras(
        title=grid.spec.title,
        about=_about(grid),
        names=names,
        costs=[_costs(grid, section) for section in sections],
        failed=[(name, outcome.reason) for name, outcome in state.failed.items()],
        open_cells=len(state.open),
    )
    write_page(sections, page, extras)
    _write_tables(grid, sections, names, page.parent)
    return page


def _sections(grid: Grid, done: Sequence[Cell]) -> tuple[list[Section], list[str]]:
    sections: list[Section] = []
    names: list[str] = []
    for dataset in dict.fromkeys(cell.dataset for cell in done):
        cells = [cell for cell in done if cell.dataset == dataset]
        runs = [Run.open(grid.run_folder(cell)) for cell in cells]
        rows = {run.folder: _row_title(cell) for run, cell in zip(runs, cells, strict=True)}
        found = collect(runs, cells[0].split, rows=rows)
        sections += found
        names += [dataset] * len(found)
    return sections, names


def _row_title(cell: Cell) -> str:
    """The method's usual name where the row is called after it, else the row's label."""
    known = catalogue.methods()
    return known[cell.row].title if cell.row in known else cell.row


def _about(grid: Grid) -> str:
    spec = grid.spec
    seeds = f"{len(spec.seeds)} seed{'' if len(spec.seeds) == 1 else 's'} ({', '.join(map(str, spec.seeds))})"
    rows = len({cell.row for cell in grid.cells})
    return f"{len(grid.cells)} trainings: {rows} methods, {seeds}, named before anything was trained; none is left out."


def _cell_of(grid: Grid, run: Run) -> Cell:
    return next(cell for cell in grid.cells if grid.run_folder(cell).resolve() == run.folder.resolve())


def _costs(grid: Grid, section: Section) -> list[dict[str, str]]:
    """One row per method: means over its cells with a recorded cost."""
    rows: dict[str, list[tuple[Mapping[str, Any], int]]] = {}
    for method in section.methods:
        for result in method.results:
            outcome = grid.outcome(_cell_of(grid, result.run))
            if outcome is not None and outcome.cost:
                peak = max((int(attempt.get("peak_bytes", 0)) for attempt in outcome.attempts), default=0)
                rows.setdefault(method.row, []).append((outcome.cost, peak))
    table = []
    for name, found in rows.items():
        costs = [cost for cost, _ in found]
        table.append(
            {
                "name": name,
                "seconds": f"{statistics.fmean(cost['seconds_per_iteration'] for cost in costs):.3g}",
                "total": duration(statistics.fmean(cost["seconds"] for cost in costs)),
                "memory": f"{max(peak for _, peak in found) / 1e9:.2f}",
                **{key: "–" if costs[0][key] is None else f"{costs[0][key]:,}" for key in ("parameters", "predicting")},
                "runs": str(len(found)),
            }
        )
    return sorted(table, key=lambda row: float(row["seconds"]))


def _write_tables(grid: Grid, sections: Sequence[Section], names: Sequence[str], folder: Path) -> None:
    import pandas as pd

    tables = []
    for name, section in zip(names, sections, strict=True):
        table = summarize_runs(scored_runs(section))
        table.insert(0, "dataset", name)
        table.insert(1, "protocol", section.protocol)
        table.insert(2, "split", section.split)
        tables.append(table)
    write_text(folder / "results.csv", pd.concat(tables).to_csv(index=False, float_format="%.6g"))
    cells = []
    for cell in grid.cells:
        outcome = grid.outcome(cell)
        done = outcome is not None and outcome.state == "done"
        means = Run.open(grid.run_folder(cell)).summary(str(cell.split))["overall"] if done else {}
        cells.append(
            {
                "dataset": cell.dataset,
                "method": cell.row,
                "labeled": cell.labeled,
                "seed": cell.seed,
                "split": cell.split,
                "state": "open" if outcome is None else outcome.state,
                "reason": "" if outcome is None else outcome.reason,
                "overall": means,
                "cost": {} if outcome is None else dict(outcome.cost),
            }
        )
    write_json(folder / "results.json", {"title": grid.spec.title, "cells": cells})
