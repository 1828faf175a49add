"""Time and memory of whole-volume prediction: the literature's window grid against Gaussian windows and one pass.

    python benchmarks/inference.py --out benchmarks/results/inference-cpu.json
    python benchmarks/inference.py --run RUN --cases 4 --out agreement.json

The first measures an untrained V-Net on a volume of noise, in one process and on one thread of a CPU: modes in turn,
time of the process. Memory is that of a process of its own per mode: its largest resident size after the prediction
over its size before. The second compares, on cases of a trained run, the Dice of both grids against the reference.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_result

from scantly import networks
from scantly.data.dataset import Dataset
from scantly.evaluation import dice_per_class
from scantly.inference.grid import tile
from scantly.inference.predict import Predictor
from scantly.inference.settings import InferenceSettings
from scantly.inference.windows import predict_array
from scantly.training.run import Run

LITERATURE = InferenceSettings(window="uniform", stride=(4, 18, 18))
GAUSSIAN = InferenceSettings()
WHOLE = InferenceSettings(window="whole")
MODES = {
    "literature fp32": (LITERATURE, "32"),
    "gaussian fp32": (GAUSSIAN, "32"),
    "gaussian bf16": (GAUSSIAN, "bf16"),
    "whole fp32": (WHOLE, "32"),
    "whole bf16": (WHOLE, "bf16"),
}
VOLUME, PATCH = (88, 160, 160), (80, 112, 112)


def clock(device: torch.device) -> float:
    """Seconds: of the process on a CPU, of the wall after synchronizing on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


class Bench:
    """A V-Net in both precisions, and a volume."""

    def __init__(self, volume: tuple[int, ...], patch: tuple[int, ...]) -> None:
        torch.manual_seed(0)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.patch = patch
        self.network = networks.build("vnet", spatial_dims=3, in_channels=1, out_channels=2).eval().to(self.device)
        self.array = np.random.default_rng(0).normal(size=(1, *volume)).astype(np.float32)

    def predict(self, mode: str) -> np.ndarray:
        """What :class:`Predictor` does between preparation and the way back."""
        settings, precision = MODES[mode]
        bf16 = precision == "bf16"
        layout = torch.channels_last_3d if bf16 and self.device.type == "cpu" else torch.contiguous_format
        self.network.to(memory_format=layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            return predict_array(
                self.network,
                self.array,
                spatial_dims=3,
                patch_size=self.patch,
                device=self.device,
                settings=settings,
            )


def measure_times(bench: Bench, repetitions: int) -> dict[str, float]:
    """Median seconds per mode."""
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in ("gaussian fp32", "gaussian bf16"):  # libraries choose their kernels in the first passes
        bench.predict(mode)
    for _ in range(repetitions):
        for mode in MODES:
            started = clock(bench.device)
            bench.predict(mode)
            times[mode].append(clock(bench.device) - started)
            print(f"{mode:18} {times[mode][-1]:8.2f} s", flush=True)
    return {mode: statistics.median(values) for mode, values in times.items()}


def memory_of(mode: str, volume: tuple[int, ...], patch: tuple[int, ...]) -> dict[str, float]:
    """Growth of this process's resident size in MB while it predicts once."""
    bench = Bench(volume, patch)
    with torch.no_grad():
        bench.network(torch.zeros(1, 1, 32, 32, 32))
    before = resident("VmRSS")
    bench.predict(mode)
    return {"before_mb": before, "growth_mb": resident("VmHWM") - before}


def resident(field: str) -> float:
    """Resident size of this process, now or at most (``VmHWM``), in MB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field))


def measure_memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """One process per mode."""
    found = {}
    for mode in MODES:
        words = [sys.executable, __file__, "--memory-of", mode, "--size", *map(str, arguments.size)]
        words += ["--patch", *map(str, arguments.patch)]
        found[mode] = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        print(f"{mode:18} {found[mode]['growth_mb']:8.0f} MB", flush=True)
    return found


def agreement(folder: Path, count: int, split: str, window: tuple[int, ...]) -> dict[str, Any]:
    """Dice per case of a trained run in each mode, and of their label maps with those of the literature's grid."""
    run = Run.open(folder)
    dataset = Dataset.open(Path(run.settings.data.dataset))
    names = list(getattr(run.split, split))[:count]
    predictors = {}
    for name, (settings, precision) in MODES.items():
        sides = {} if settings.window == "whole" else {"patch_size": window}
        values = {"window": settings.window, **settings.model_dump(exclude_defaults=True), **sides}
        predictors[name] = Predictor.load(folder, precision=precision, inference=values)
    classes = len(dataset.classes)
    rows = []
    for name in names:
        case = dataset.case(name)
        reference = dataset.read_label(name).array
        labels = {mode: predictor.predict(case.images).labels for mode, predictor in predictors.items()}
        dice = {mode: float(np.nanmean(dice_per_class(found, reference, classes))) for mode, found in labels.items()}
        first, *others = MODES
        between = {mode: float(np.nanmean(dice_per_class(labels[mode], labels[first], classes))) for mode in others}
        rows.append({"case": name, "dice": dice, f"dice with {first}": between})
        print(json.dumps(rows[-1]), flush=True)
    means = {mode: statistics.mean(row["dice"][mode] for row in rows) for mode in MODES}
    return {"run": folder.name, "window_zyx": window, "split": split, "cases": rows, "mean_dice": means}


def triple(sides: list[int]) -> tuple[int, ...]:
    """H W D as (z, y, x)."""
    return (sides[2], sides[0], sides[1])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=[*VOLUME[1:], VOLUME[0]], metavar=("H", "W", "D"))
    parser.add_argument("--patch", type=int, nargs=3, default=[*PATCH[1:], PATCH[0]], metavar=("H", "W", "D"))
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--memory-of", choices=list(MODES), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help="a finished 3D run: Dice of both grids on its cases")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    volume, patch = triple(arguments.size), triple(arguments.patch)
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of, volume, patch)))
        return
    if arguments.run:
        result: dict[str, Any] = agreement(arguments.run, arguments.cases, arguments.split, patch)
        print(json.dumps(result["mean_dice"], indent=2))
    else:
        result = measure(volume, patch, arguments)
    if arguments.out:
        write_result(arguments.out, result, ("torch", "numpy", "monai"))


def measure(volume: tuple[int, ...], patch: tuple[int, ...], arguments: argparse.Namespace) -> dict[str, Any]:
    """Times, ratios to the literature's grid, memory and agreement of the untrained network's probabilities."""
    bench = Bench(volume, patch)
    factors = bench.network.factors
    windows = {mode: len(tile(volume, patch, settings, factors).windows) for mode, (settings, _) in MODES.items()}
    seconds = measure_times(bench, arguments.repetitions)
    speedup = {mode: seconds["literature fp32"] / value for mode, value in seconds.items()}
    memory = measure_memory(arguments)
    for mode in MODES:
        print(f"{mode:18} {windows[mode]:3} windows {seconds[mode]:8.2f} s {speedup[mode]:6.1f} times as fast")
    return {
        "network": "vnet, 9,448,866 parameters",
        "volume_zyx": volume,
        "patch_zyx": patch,
        "literature_stride_zyx": LITERATURE.stride,
        "repetitions": arguments.repetitions,
        "windows": windows,
        "seconds": seconds,
        "speedup_over_literature_fp32": speedup,
        "memory": memory,
        "volume_mb": float(np.prod(volume) * 4 / 1e6),
    }


if __name__ == "__main__":
    main()
