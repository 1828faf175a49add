"""Memory of preparing and training 300 volumes against 10: it must not grow with the cohort.

    python benchmarks/scale.py --out benchmarks/results/scale-cpu.json

Generated volumes of 256 x 256 x 128 voxels. Preparation in parallel processes, then training of a tiny network with two
loader processes, each as a process of its own whose whole tree is watched: the peak is the largest sum of proportional
set sizes (PSS: private memory, and shared pages once), sampled several times a second. ``--mapped`` measures the
training with memory-mapped files instead of reads, for comparison. Linux only; needs about 25 MB of disk per volume.
"""

from __future__ import annotations

import argparse
import mmap
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from _common import write_description, write_result

SHAPE = (128, 256, 256)
LABELED = 4
ALLOWED_GROWTH = 0.2


def write_cohort(root: Path, volumes: int) -> None:
    """Uncompressed volumes of few grey levels, each another excerpt of one endless pattern."""
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    levels = [np.sin(np.arange(n) / period) for n, period in zip(SHAPE, (9, 17, 23), strict=True)]
    smooth = levels[0][:, None, None] + levels[1][None, :, None] + levels[2]
    pattern = (40 + 12 * smooth + random.normal(scale=2, size=SHAPE)).astype(np.uint8)
    first = root / "header.nii"
    nibabel.Nifti1Image(pattern.T, np.eye(4)).to_filename(first)
    header = first.read_bytes()[: -pattern.nbytes]
    for number in range(volumes):
        image = np.roll(pattern, int(random.integers(pattern.size))) + np.uint8(number % 7)
        name = f"scan_{number:03d}"
        (root / "imagesTr" / f"{name}_0000.nii").write_bytes(header + image.tobytes())
        if number < LABELED:
            label = (image > np.quantile(image[::8, ::8, ::8], 0.9)).astype(np.uint8)
            (root / "labelsTr" / f"{name}.nii").write_bytes(header + label.tobytes())
    write_description(root, volumes, "bright", ".nii")


def configuration(root: Path, steps: int) -> Any:
    from scantly.training.resolve import resolve

    flags = {"method": "mean_teacher", "labeled": LABELED, "store": str(root / "cache"), "workers": 2, "device": "cpu"}
    sets = {
        "plan": {
            "spatial_dims": 3,
            "patch_size": [32, 32, 32],
            "spacing": None,
            "labeled_batch_size": 1,
            "unlabeled_batch_size": 4,
        },
        "network": {"name": "unet", "arguments": {"widths": [4, 8], "dropout": [0.0, 0.0]}},
        "training": {"steps": steps},
    }
    return resolve(root / "data", flags=flags, sets=sets)


def prepare(root: Path, steps: int, _: bool) -> None:
    from scantly.training.train import prepare_store

    prepare_store(configuration(root, steps))


def train(root: Path, steps: int, mapped: bool) -> None:
    import torch

    from scantly.data import arrays
    from scantly.training.train import train_config

    torch.set_num_threads(1)
    if mapped:
        arrays._LocalFile.read = read_mapped
    train_config(configuration(root, steps), root / f"run-{mapped}", quiet=True)


def read_mapped(file: Any, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """Stands in for the reading of a local file; the map is kept with the file."""
    if not hasattr(file, "map"):
        file.map = mmap.mmap(file._file.fileno(), 0, access=mmap.ACCESS_READ)
    return [file.map[start:stop] for start, stop in spans]


def tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            values = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(int(values[1]), []).append(int(path.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def proportional_set_size(pid: int) -> int:
    """Bytes; 0 for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def watched(work: Callable[..., None], *arguments: Any) -> dict[str, float]:
    """Run in a new process; peak memory of its tree in MB, and seconds."""
    process: BaseProcess = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    started = time.perf_counter()
    process.start()
    peak = most = 0
    while process.is_alive():
        pids = tree(process.pid or 0)
        peak, most = max(peak, sum(map(proportional_set_size, pids))), max(most, len(pids))
        process.join(0.15)
    if process.exitcode:
        raise SystemExit(f"{work.__name__} ended with status {process.exitcode}")
    return {"peak_megabytes": peak / 1e6, "processes": most, "seconds": time.perf_counter() - started}


def measure(volumes: int, steps: int, folder: Path | None, mapped: bool) -> dict[str, Any]:
    root = Path(tempfile.mkdtemp(dir=folder))
    try:
        write_cohort(root / "data", volumes)
        found: dict[str, Any] = {"preparation": watched(prepare, root, steps, False)}
        found["store_megabytes"] = sum(path.stat().st_size for path in (root / "cache").rglob("*.b2nd")) / 1e6
        found["training"] = watched(train, root, steps, False)
        if mapped:
            found["training, files mapped"] = watched(train, root, steps, True)
    finally:
        shutil.rmtree(root)
    for name, one in found.items():
        if isinstance(one, dict):
            print(
                f"{volumes:4} volumes, {name:24} {one['peak_megabytes']:8.0f} MB at most, {one['seconds']:6.1f} s",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--volumes", type=int, default=300)
    parser.add_argument("--against", type=int, default=10)
    parser.add_argument("--steps", type=int, default=80, help="four unlabeled patches each")
    parser.add_argument("--mapped", action="store_true", help="also train with memory-mapped files")
    parser.add_argument("--folder", type=Path, help="where the cohort is written; default: the system's")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    counts = (arguments.against, arguments.volumes)
    found = {str(n): measure(n, arguments.steps, arguments.folder, arguments.mapped) for n in counts}
    few, many = (found[str(n)] for n in counts)
    growth = {
        name: many[name]["peak_megabytes"] / few[name]["peak_megabytes"] - 1
        for name in few
        if isinstance(few[name], dict)
    }
    for name, share in growth.items():
        print(f"growth of the peak, {name}: {share:+.1%}")
    if arguments.out:
        result = {"volume (D, H, W)": SHAPE, "steps": arguments.steps, "cohorts": found, "growth": growth}
        write_result(arguments.out, result, ("torch", "blosc2", "numpy"))
    if max(growth["preparation"], growth["training"]) > ALLOWED_GROWTH:
        raise SystemExit(f"memory grew by more than {ALLOWED_GROWTH:.0%}")


if __name__ == "__main__":
    main()
