"""Time of signed distance maps of labels, made and looked up, against a bare pass of the network that learns them.

    python benchmarks/distance_maps.py --out benchmarks/results/distance-maps-cpu.json

Per size: the maps of a batch of labels by SciPy (CPU) and by parabolas (any device), the look-up of maps made before
(CPU), and one forward and backward pass of the network with both heads on as many images. On a CPU the time is that of
the process, with one thread.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from training_step import clock

from scantly.losses import distance_maps
from scantly.methods.base import Task
from scantly.methods.parts.distances import LabelDistances, distance_network, foreground_masks

CASES = {
    "ACDC, recipe acdc-cpu": (4, (96, 96), 8, "unet", {"widths": [8, 16, 32, 64, 128], "dropout": [0.0] * 5}),
    "ACDC, recipe acdc": (4, (256, 256), 12, "unet", {}),
    "LA, recipe la": (2, (80, 112, 112), 2, "vnet", {}),
}


def rounded_labels(classes: int, shape: tuple[int, ...], rows: int, device: str) -> torch.Tensor:
    """Nested round structures in the middle of each row."""
    axes = [torch.linspace(-1, 1, side, device=device) for side in shape]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0).sqrt()
    inner = (classes - radius * 2 * classes).ceil().clamp(0, classes - 1).long()
    return inner.expand(rows, *shape).contiguous()


def median(call: Any, device: str, repetitions: int) -> float:
    """Median seconds of a call, the first left out."""
    times = []
    for _ in range(repetitions + 1):
        start = clock(device)
        call()
        times.append(clock(device) - start)
    return sorted(times[1:])[repetitions // 2]


def measure(case: str, device: str, repetitions: int) -> dict[str, Any]:
    """Seconds of every way, and their share of a pass."""
    classes, shape, rows, name, arguments = CASES[case]
    dims = len(shape)
    task = Task(1, ("background", "a", "b", "c")[:classes], dims, shape, name, arguments)  # type: ignore[arg-type]
    network = distance_network(task).to(device).train()
    labels = rounded_labels(classes, shape, rows, device)
    masks = foreground_masks(labels, classes).flatten(0, 1)
    both = torch.cat([masks, ~masks])
    images = torch.rand(rows, 1, *shape, device=device)

    def network_pass() -> None:
        logits, distances = network.both(images)
        (logits.sum() + distances.sum()).backward()

    seconds = {"pass": median(network_pass, device, repetitions)}
    seconds["parabolas"] = median(lambda: distance_maps._by_parabolas(both), device, repetitions)
    if device == "cpu":
        kept = LabelDistances(classes, "outside", limit=2**30)
        kept(labels)
        seconds["scipy"] = median(lambda: distance_maps._by_scipy(both), device, repetitions)
        seconds["looked up"] = median(lambda: kept(labels), device, repetitions)
    return {
        "case": case,
        "rows": rows,
        "maps": len(both),
        "seconds": seconds,
        "share of a pass": {way: value / seconds["pass"] for way, value in seconds.items() if way != "pass"},
    }


def main() -> None:
    """Measure every case and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = [measure(case, device, arguments.repetitions) for case in CASES]
    for row in found:
        print(row["case"], {way: round(value, 4) for way, value in row["seconds"].items()})
    if arguments.out:
        write_result(arguments.out, {"repetitions": arguments.repetitions, "cases": found})


if __name__ == "__main__":
    main()
