"""A table of methods x labeled subjects x seeds on one dataset with one recipe, a run folder per cell.

    python benchmarks/method_table.py ACDC --recipe acdc-cpu --runs runs/acdc-cpu --out benchmarks/results/acdc-cpu.json
    python benchmarks/method_table.py LA --recipe la --labeled 8 --seeds 1 --device cuda --runs runs/la

A method may carry settings of its own, for ablations: ``arco:sampler=naive`` or ``plgcl:contrast_weight=0``.

Every cell is a run folder; finished cells are not trained again, an interrupted one is resumed, so the list can be
stopped and started at will, also by two processes at once (``--share 0/2`` and ``--share 1/2``). Seeds are named on
the command line before anything is trained and none is left out. The last iteration is evaluated on ``val``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from _common import write_result

from scantly.files import read_json, write_json
from scantly.training.resolve import resolve
from scantly.training.run import Run
from scantly.training.train import train_config


def cells(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(method, labeled, seed) in the order in which they are trained: one seed after the other."""
    return [
        (method, labeled, seed)
        for seed, labeled, method in itertools.product(arguments.seeds, arguments.labeled, arguments.methods)
        if not (labeled == "all" and method != "supervised")
    ]


def folder_of(arguments: argparse.Namespace, method: str, labeled: str, seed: int) -> Path:
    """The run folder of a cell."""
    name = method.translate(str.maketrans(":=,", "---"))
    folder: Path = arguments.runs / f"{name}-{labeled}-{seed}"
    return folder


def train_cell(arguments: argparse.Namespace, method: str, labeled: str, seed: int) -> None:
    """Train and evaluate one cell unless that is done."""
    folder = folder_of(arguments, method, labeled, seed)
    run = Run(folder)
    if (folder / "evaluation" / "val.json").is_file():
        return
    name, _, own = method.partition(":")
    sets = [*arguments.set, *(f"method.{setting}" for setting in own.split(",") if setting)]
    flags = {
        "method": name,
        "labeled": None if labeled == "all" else labeled,
        "seed": seed,
        "device": arguments.device,
    }
    config = resolve(arguments.dataset, recipe=arguments.recipe, flags=flags, sets=sets)
    started, worked = time.monotonic(), time.process_time()
    train_config(config, folder, resume=True, quiet=True)
    spent = {"seconds": round(time.monotonic() - started), "cpu_seconds": round(time.process_time() - worked)}
    write_json(folder / "spent.json", spent)
    run.evaluate("val")
    print(f"{folder.name}: {run.summary('val')['overall']['dice']['mean']:.4f}", flush=True)


METRICS = {"dice": "dice", "hd95_voxels": "hd95", "asd_voxels": "asd"}


def collect(arguments: argparse.Namespace) -> dict[str, Any]:
    """Means of every finished cell, and over the seeds; distances in voxels."""
    rows = []
    for method, labeled, seed in cells(arguments):
        folder = folder_of(arguments, method, labeled, seed)
        if not (folder / "evaluation" / "val.json").is_file():
            continue
        names = {"method": method, "labeled": labeled, "seed": seed}
        rows.append({**names, **figures_of(Run.open(folder).summary("val")), **read_json(folder / "spent.json")})
    return {"cells": rows, "over_seeds": means_over_seeds(rows, arguments.labeled, arguments.methods)}


def figures_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the table has of one evaluation."""
    overall, classes = summary["overall"], summary["classes"]
    figures = {}
    for metric, short in METRICS.items():
        figures[short] = overall[metric]["mean"]
        figures |= {f"{short} {name}": row[metric]["mean"] for name, row in classes.items()}
    return {**figures, "missed": overall["missed"], "spurious": overall["spurious"]}


def means_over_seeds(rows: list[dict[str, Any]], counts: Iterable[str], methods: Iterable[str]) -> list[dict[str, Any]]:
    """One row per labeled count and method, in their order."""
    over_seeds = []
    for labeled, method in itertools.product(counts, methods):
        found = [row for row in rows if (row["method"], row["labeled"]) == (method, labeled)]
        if found:
            mean = {
                key: statistics.fmean(row[key] for row in found)
                for key in found[0]
                if key.split()[0] in METRICS.values()
            }
            spread = statistics.stdev(row["dice"] for row in found) if len(found) > 1 else None
            over_seeds.append(
                {"method": method, "labeled": labeled, "seeds": len(found), **mean, "std of dice over seeds": spread}
            )
    return over_seeds


def main() -> None:
    """Train what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--out", type=Path, help="JSON file of the table")
    parser.add_argument("--recipe", help="default: as the plan of the dataset says")
    parser.add_argument(
        "--methods", nargs="+", default=["supervised", "mean_teacher"], help="names, with settings after a colon"
    )
    parser.add_argument("--labeled", nargs="+", default=["3", "7", "all"], help="subjects; 'all' is supervised only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="on the CPU one thread is used")
    parser.add_argument("--set", nargs="+", default=[], help="settings for every cell")
    parser.add_argument("--share", default="0/1", help="this process's share of the cells, for instance 0/2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, arguments.share.split("/"))
    for method, labeled, seed in cells(arguments)[part::parts]:
        train_cell(arguments, method, labeled, seed)
    table = collect(arguments)
    for row in table["over_seeds"]:
        print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
    if arguments.out:
        head = {"recipe": arguments.recipe, "settings": arguments.set, "split": "val"}
        write_result(arguments.out, {**head, **table})


if __name__ == "__main__":
    main()
