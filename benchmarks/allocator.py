"""A training step on the CPU with glibc's defaults and with freed memory kept, as the command line does.

    OMP_NUM_THREADS=1 python benchmarks/allocator.py --out benchmarks/results/allocator-cpu.json

Each measurement is a process of its own, as the setting holds for a whole process; both are repeated in turn and the
median of each taken. CPU seconds, so that other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from _common import write_result

from scantly.cli.allocator import keep_freed_memory
from scantly.losses import cross_entropy_dice
from scantly.networks import build

CASES = {
    "unet, 16 slices of 128 x 128": ("unet", 2, (16, 1, 128, 128)),
    "vnet, 4 patches of 64 x 64 x 32": ("vnet", 3, (4, 1, 32, 64, 64)),
}


def measure(case: str, keep: bool, steps: int) -> dict[str, float]:
    """CPU seconds and peak memory of a step, in this process."""
    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    name, dims, shape = CASES[case]
    network = build(name, spatial_dims=dims, in_channels=1, out_channels=2)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    images, labels = torch.randn(shape), torch.randint(0, 2, (shape[0], *shape[2:]))
    used = [0.0, 0.0]
    for step in range(steps + 1):
        before = resource.getrusage(resource.RUSAGE_SELF)
        optimizer.zero_grad()
        cross_entropy_dice(network(images), labels).backward()
        optimizer.step()
        after = resource.getrusage(resource.RUSAGE_SELF)
        if step:  # the first one warms up
            used[0] += after.ru_utime - before.ru_utime
            used[1] += after.ru_stime - before.ru_stime
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"own": used[0] / steps, "system": used[1] / steps, "peak_mb": peak}


def median_of(found: list[dict[str, float]]) -> dict[str, float]:
    """Median of each number over the repetitions."""
    return {key: statistics.median(run[key] for run in found) for key in found[0]}


def main() -> None:
    """Measure every case, or one in this process when called by itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("CASE", "keep|default"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case, kind = arguments.one
        print(json.dumps(measure(case, kind == "keep", arguments.steps)))
        return
    result = {}
    for case in CASES:
        runs: dict[str, list[dict[str, float]]] = {"default": [], "keep": []}
        for kind in ("default", "keep") * arguments.repetitions:
            words = [sys.executable, __file__, "--steps", str(arguments.steps), "--one", case, kind]
            runs[kind].append(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))
        medians = {kind: median_of(found) for kind, found in runs.items()}
        totals = {kind: values["own"] + values["system"] for kind, values in medians.items()}
        result[case] = {"cpu_seconds_per_step": medians, "times_as_fast": totals["default"] / totals["keep"]}
        print(case, {kind: round(total, 3) for kind, total in totals.items()}, f"{result[case]['times_as_fast']:.2f}")
    if arguments.out:
        write_result(arguments.out, {"cases": result})


if __name__ == "__main__":
    main()
