"""The loader alone: patches per second for batches of the LA recipe, by number of worker processes.

    python benchmarks/loader.py --out benchmarks/results/loader-cpu.json

A generated cohort like the 80 left atrium scans: volumes of about 200 x 150 x 88 voxels with whole numbers, normalized
and not resampled, patches of 112 x 112 x 80 in batches of 2 + 2. Batches are taken as fast as they come; the file
cache is warm. A training step that takes longer than the seconds per batch does not wait for data, if workers load
ahead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from _common import write_description, write_result
from scipy import ndimage

from scantly.data.batches import BatchSource
from scantly.data.build import build_store
from scantly.data.dataset import Dataset
from scantly.data.loader import make_loader
from scantly.data.plan import Plan


def write_cohort(root: Path, volumes: int, labeled: int) -> Dataset:
    """Smooth anatomy and noise in 120 grey levels, a ball as the structure."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for number in range(volumes):
        random = np.random.default_rng(number)
        shape = (88, int(random.integers(132, 161)), int(random.integers(148, 245)))
        coarse = random.normal(size=[n // 12 + 2 for n in shape])
        smooth = ndimage.zoom(coarse, [n / m for n, m in zip(shape, coarse.shape, strict=True)], order=1)
        image = np.clip(40 + 20 * smooth + random.normal(scale=3, size=shape), 0, 120).astype(np.uint8)
        name = f"scan_{number:03d}"
        nibabel.Nifti1Image(image.T, np.eye(4)).to_filename(root / "imagesTr" / f"{name}_0000.nii.gz")
        if number < labeled:
            grid = np.indices(shape)
            distance = sum((axis - n / 2) ** 2 for axis, n in zip(grid, shape, strict=True))
            label = (distance < 30**2).astype(np.uint8)
            nibabel.Nifti1Image(label.T, np.eye(4)).to_filename(root / "labelsTr" / f"{name}.nii.gz")
    write_description(root, volumes, "ball", ".nii.gz")
    return Dataset.open(root)


def plan() -> Plan:
    """As the LA recipe: no resampling, z-score."""
    return Plan.model_validate(
        {
            "spatial_dims": 3,
            "normalization": [{"scheme": "zscore"}],
            "patch_size": [80, 112, 112],
            "labeled_batch_size": 2,
            "unlabeled_batch_size": 2,
        }
    )


def rate(source: BatchSource, workers: int, batches: int) -> float:
    """Patches per second once the loader runs; the first batches start the workers and are not counted."""
    first = 8
    loader = make_loader(source, 0, first + batches, workers, pin_memory=False)
    for _ in range(first):
        next(loader)
    started = time.perf_counter()
    patches = sum(len(batch.labeled) + len(batch.unlabeled) for batch in loader)
    return patches / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=80)
    parser.add_argument("--labeled", type=int, default=8)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp())
    try:
        dataset = write_cohort(root / "data", arguments.volumes, arguments.labeled)
        names = sorted(dataset.train)
        labeled, unlabeled = names[: arguments.labeled], names[arguments.labeled :]
        started = time.perf_counter()
        store = build_store(dataset, names, plan(), root=root / "cache", with_labels=labeled)
        result: dict[str, Any] = {
            "volumes": arguments.volumes,
            "patch (W, H, D)": [112, 112, 80],
            "rows": [2, 2],
            "batches": arguments.batches,
            "preparation_seconds": time.perf_counter() - started,
            "store_megabytes": sum(path.stat().st_size for path in (root / "cache").rglob("*.b2nd")) / 1e6,
            "patches_per_second": {},
        }
        source = BatchSource(store, labeled, unlabeled, plan(), labeled_batch_size=2, unlabeled_batch_size=2, seed=0)
        for name in names:
            store.read_image(name, (slice(None),) * 3)  # the file cache is warm
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        for workers in arguments.workers:
            per_second = rate(source, workers, arguments.batches)
            result["patches_per_second"][str(workers)] = per_second
            print(f"{workers} workers on {cores} cores: {per_second:6.1f} patches/s, {4 / per_second:.3f} s per batch")
        started = time.process_time()
        for iteration in range(arguments.batches):
            source[iteration]
        result["cpu_seconds_per_batch"] = (time.process_time() - started) / arguments.batches
        print(f"one core's time per batch: {result['cpu_seconds_per_batch']:.3f} s")
        if arguments.out:
            write_result(arguments.out, result, ("torch", "blosc2", "numpy"))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
