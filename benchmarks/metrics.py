"""Speed of Dice, Jaccard, HD95 and ASD together, against medpy, in one run.

    python benchmarks/metrics.py --out benchmarks/results/metrics-cpu.json

Two cases: a left atrium in a volume of 88 x 150 x 200 voxels, and one organ in a CT of 100 x 512 x 512. The
prediction is the reference deformed (Dice about 0.9). Ours is :func:`scantly.evaluation.score_case` on label
maps, which gives the other metrics, in voxels and mm, as well. The values of both must agree, or nothing is
written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _common import median_seconds, write_result
from medpy.metric import binary
from numpy.typing import NDArray
from scipy.ndimage import zoom

from scantly.evaluation import score_case

Labels = NDArray[np.uint8]
COLUMNS = ("dice", "jaccard", "hd95_voxels", "asd_voxels")


@dataclass(frozen=True)
class Workload:
    """A case to measure: image shape (z, y, x), radii of its structure in voxels, spacing in mm."""

    name: str
    shape: tuple[int, int, int]
    radii: tuple[float, float, float]
    spacing: tuple[float, float, float]
    required: float


WORKLOADS = (
    Workload("left atrium, 200x150x88", (88, 150, 200), (26, 36, 44), (0.625, 0.625, 0.625), 10),
    Workload("one organ, 512x512x100", (100, 512, 512), (20, 45, 45), (2.5, 0.8, 0.8), 100),
)


def structure(workload: Workload, deformation: float = 0.0) -> Labels:
    """Ellipsoid with smooth bumps; other bumps of the given strength are added for the prediction."""
    rng = np.random.default_rng(1)
    axes = np.meshgrid(*[np.arange(n, dtype=np.float32) for n in workload.shape], indexing="ij", sparse=True)
    places = zip(axes, workload.shape, workload.radii, strict=True)
    distance = sum(((axis - n / 2) / radius) ** 2 for axis, n, radius in places)
    bumps, others = (rng.normal(size=[n // 12 + 1 for n in workload.shape]).astype(np.float32) for _ in range(2))
    coarse = 0.3 * bumps + deformation * others
    factors = [n / m for n, m in zip(workload.shape, coarse.shape, strict=True)]
    return (distance + zoom(coarse, factors, order=1) < 1).astype(np.uint8)


def with_medpy(prediction: Labels, reference: Labels) -> list[float]:
    measures: tuple[Callable[..., float], ...] = (binary.dc, binary.jc, binary.hd95, binary.asd)
    return [float(measure(prediction, reference)) for measure in measures]


def with_scantly(prediction: Labels, reference: Labels, workload: Workload) -> list[float]:
    classes = ("background", "structure")
    row = score_case(prediction, reference, classes=classes, spacing=workload.spacing, case=workload.name)[0]
    return [float(row[column]) for column in COLUMNS]


def measure(workload: Workload, repetitions: int) -> dict[str, object]:
    """Both libraries on one workload; the difference of their values must be rounding error."""
    reference, prediction = structure(workload), structure(workload, deformation=0.4)
    ours, theirs = with_scantly(prediction, reference, workload), with_medpy(prediction, reference)
    difference = float(np.max(np.abs(np.subtract(ours, theirs))))
    if difference > 1e-6:
        raise SystemExit(f"{workload.name}: values differ by {difference}")
    seconds = median_seconds(lambda: with_scantly(prediction, reference, workload), 5 * repetitions)
    medpy_seconds = median_seconds(lambda: with_medpy(prediction, reference), repetitions)
    return {
        "case": workload.name,
        "foreground_voxels": int(np.count_nonzero(reference)),
        "values": dict(zip(COLUMNS, ours, strict=True)),
        "largest_difference": difference,
        "scantly_seconds": seconds,
        "medpy_seconds": medpy_seconds,
        "ratio": medpy_seconds / seconds,
        "required_ratio": workload.required,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repetitions", type=int, default=3, help="of medpy; ours five times as many")
    arguments = parser.parse_args()
    results = [measure(workload, arguments.repetitions) for workload in WORKLOADS]
    print(f"{'case':<28}{'medpy s':>10}{'scantly s':>11}{'ratio':>8}{'required':>10}")
    for result in results:
        print(
            f"{result['case']:<28}{result['medpy_seconds']:>10.3f}{result['scantly_seconds']:>11.4f}"
            f"{result['ratio']:>8.1f}{result['required_ratio']:>10.0f}"
        )
    if arguments.out:
        summary = {
            "what": "Dice + Jaccard + HD95 + ASD of one structure, medians of wall times in one process",
            "repetitions": arguments.repetitions,
            "results": results,
        }
        write_result(arguments.out, summary, ("numpy", "scipy", "medpy"))


if __name__ == "__main__":
    main()
