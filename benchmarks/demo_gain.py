"""What unlabeled scans are worth in ``scantly demo``: both trainings for several seeds, each with its own cohort.

    python benchmarks/demo_gain.py --folder runs/demo-gain --out benchmarks/results/demo-gain.json

Same seed, same two labeled subjects and same number of iterations for both methods; no seed is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _common import write_result

from scantly.demo import LABELED, METHODS, SUBJECTS, TEST, generate, train_pair


def main() -> None:
    """Train what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder of cohorts and runs; continued if it exists")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, help="JSON file of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in arguments.seeds:
        folder = arguments.folder / str(seed)
        dataset = generate(folder, seed=seed)
        runs = train_pair(dataset, folder / "runs", seed=seed)
        dice = {
            method: run.summary("test")["overall"]["dice"]["mean"] for method, run in zip(METHODS, runs, strict=True)
        }
        rows.append({"seed": seed, **dice, "gain": dice["mean_teacher"] - dice["supervised"]})
        print({key: round(value, 4) for key, value in rows[-1].items()}, flush=True)
    positive = sum(row["gain"] > 0 for row in rows)
    print(f"Mean Teacher is better in {positive} of {len(rows)} seeds")
    if arguments.out:
        result = {
            "recipe": "demo",
            "labeled": LABELED,
            "subjects": SUBJECTS,
            "test": TEST,
            "metric": "mean Dice over classes, test subjects, last iteration",
            "seeds": rows,
            "better_in": positive,
            "mean_gain": sum(row["gain"] for row in rows) / len(rows),
        }
        write_result(arguments.out, result, ("torch", "numpy"))


if __name__ == "__main__":
    main()
