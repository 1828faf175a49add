"""Adds the cells of results folders of ``scantly benchmark`` to a table of ``method_table.py``.

    python benchmarks/benchmark_cells.py results --table benchmarks/results/acdc-cpu-consistency.json --dataset acdc

A cell that is in the table already must have the same figures, to the last digit, or nothing is written: figures of
another machine or version do not belong in one table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _common import write_result
from method_table import figures_of, means_over_seeds

from scantly.files import read_json
from scantly.training.run import Run

COSTS = ("seconds", "cpu_seconds")


def cells_of(results: Path, dataset: str) -> list[dict[str, Any]]:
    """The done cells of a results folder, as the table has them."""
    rows = []
    for path in sorted((results / "outcomes" / dataset).glob("*.json")):
        outcome = read_json(path)
        run = Run(results / "cells" / dataset / path.stem)
        if outcome["state"] != "done":
            continue
        method, labeled, seed = path.stem.rsplit("-", 2)
        spent = {name: round(sum(attempt[name] for attempt in outcome["attempts"])) for name in COSTS}
        names = {"method": method, "labeled": labeled, "seed": int(seed.removeprefix("seed"))}
        rows.append({**names, **figures_of(run.summary("val")), **spent})
    return rows


def merged(known: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both, sorted by seed and labeled count, those of the table first.

    Raises:
        SystemExit: if a cell is in both with other figures.
    """
    table = {(row["labeled"], row["seed"], row["method"]): row for row in known}
    for row in found:
        key = row["labeled"], row["seed"], row["method"]
        there = table.setdefault(key, row)
        if {**there, **dict.fromkeys(COSTS)} != {**row, **dict.fromkeys(COSTS)}:
            raise SystemExit(
                f"{key} has Dice {there['dice']} in the table and {row['dice']} here; nothing was written."
            )
    return sorted(table.values(), key=lambda row: (row["seed"], row["labeled"]))


def main() -> None:
    """Write the table anew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="results folders")
    parser.add_argument("--table", type=Path, required=True, help="JSON file")
    parser.add_argument("--dataset", required=True, help="name of the dataset in the benchmark file")
    parser.add_argument("--methods", nargs="*", help="those that are added; default: all")
    parser.add_argument(
        "--names", nargs="*", default=[], metavar="LABEL=NAME", help="what a row is called in the table"
    )
    arguments = parser.parse_args()
    table = read_json(arguments.table)
    names = dict(name.split("=", 1) for name in arguments.names)
    found = [row for results in arguments.results for row in cells_of(results, arguments.dataset)]
    found = [{**row, "method": names.get(row["method"], row["method"])} for row in found]
    rows = merged(table["cells"], [row for row in found if not arguments.methods or row["method"] in arguments.methods])
    counts, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("labeled", "method"))
    over_seeds = means_over_seeds(rows, counts, methods)
    head = {name: value for name, value in table.items() if name not in {"cells", "over_seeds", "environment"}}
    write_result(arguments.table, {**head, "cells": rows, "over_seeds": over_seeds})
    print(f"{len(rows)} cells, of which {len(rows) - len(table['cells'])} are new")


if __name__ == "__main__":
    main()
