"""What the benchmark scripts share: timing and the record of where a number comes from."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from scantly.files import write_json

LIBRARIES = ("numpy", "scipy")


def environment(libraries: Sequence[str] = LIBRARIES) -> dict[str, Any]:
    """Device and versions: Python, ``libraries``, and torch with its accelerator if it is imported."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {name: metadata.version(name) for name in libraries}
    device = f"CPU, {platform.processor() or platform.machine()}, {threads} threads"
    torch = sys.modules.get("torch")
    if torch is not None:
        versions["torch"] = torch.__version__
        device += f" ({torch.get_num_threads()} used by torch)"
        if torch.cuda.is_available():
            device = f"{torch.cuda.get_device_name()}; {device}"
    return {"device": device, "python": platform.python_version(), "versions": versions}


def median_seconds(call: Callable[[], Any], repetitions: int) -> float:
    """Median wall time of ``call`` in seconds."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def write_result(path: Path, result: Mapping[str, Any], libraries: Sequence[str] = LIBRARIES) -> None:
    """Write a result with its environment as JSON, whole or not at all."""
    write_json(path, {**result, "environment": environment(libraries)})


def write_description(root: Path, volumes: int, structure: str, ending: str) -> None:
    """``dataset.json`` of a generated cohort with one MR channel and one structure."""
    labels = {"background": 0, structure: 1}
    values = {"name": "generated", "channel_names": {"0": "MR"}, "labels": labels}
    write_json(root / "dataset.json", {**values, "numTraining": volumes, "file_ending": ending})
