"""Time of a training step: precision and memory layout, and what the methods add to bare network passes.

    python benchmarks/training_step.py --out benchmarks/results/training-step-cpu.json

All variants are timed in turn in one process, so that the ratios hold when the machine's speed drifts. On a CPU the
time is that of the process, not of the wall clock.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import write_result

from scantly.losses import cross_entropy_dice
from scantly.methods import catalogue
from scantly.methods.base import Batch, Progress, Stage, Task
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from scantly.views import WeakConfig, weak

PASSES = {
    "supervised": "1 forward and backward",
    "mean_teacher": "1 of double size, 1 teacher forward, every other step 2",
}


def clock(device: str) -> float:
    """Seconds: of the process on a CPU, of the wall after synchronizing on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def autocast(device: str, bf16: bool) -> torch.autocast:
    """The engine's precision context."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False)


def bare_step(
    task: Task, rows: int, device: str, bf16: bool, channels_last: bool, compiled: bool = False
) -> Callable[[], None]:
    """Forward, loss, backward and SGD of the network alone, on rows that lie on the device."""
    network = task.network().to(device).train()
    images = torch.rand(rows, 1, *task.patch_size, device=device)
    labels = torch.randint(task.num_classes, (rows, *task.patch_size), device=device)
    if channels_last:
        network.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    if compiled:
        network.compile()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, foreach=True)

    def step() -> None:
        with autocast(device, bf16):
            loss = cross_entropy_dice(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def method_step(name: str, task: Task, rows: int, device: str, bf16: bool) -> Callable[[], None]:
    """A method's whole step with the weak view of both streams, channels-last."""
    method_class = catalogue.load(name)
    method = method_class(task, method_class.Config()).to(device).train()
    method.to(memory_format=torch.channels_last)
    method.generator = torch.Generator(device).manual_seed(0)
    handles = TrainingHandles(method, Stage(), TrainingSection(), 1000)
    images = torch.rand(rows, 1, *task.patch_size, device=device)
    labels = torch.randint(task.num_classes, (rows, *task.patch_size), device=device, dtype=torch.uint8)
    progress = Progress(0, 1000)

    def step() -> None:
        seen = weak(WeakConfig(), images, [labels], generator=method.generator)
        unseen = weak(WeakConfig(), images, generator=method.generator)
        rows_seen, rows_unseen = (view.images.contiguous(memory_format=torch.channels_last) for view in (seen, unseen))
        batch = Batch(rows_seen, seen.maps[0].long(), rows_unseen, images, labels.long(), images)
        with autocast(device, bf16):
            method.step(batch, progress, handles)
        method.after_step(progress)

    return step


def measure(variants: dict[str, Callable[[], None]], device: str, repetitions: int) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in range(repetitions + 2):
        for name, step in variants.items():
            started = clock(device)
            step()
            if repetition >= 2:
                times[name].append(clock(device) - started)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, print the ratios, write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also torch.compile (minutes to compile)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    task = Task(1, ("background", "RV", "MYO", "LV"), 2, (arguments.size, arguments.size))
    rows = arguments.rows
    variants: dict[str, Callable[[], None]] = {}
    for bf16 in (False, True):
        precision = "bf16" if bf16 else "fp32"
        variants[f"bare {precision}"] = bare_step(task, rows, device, bf16, False)
        variants[f"bare {precision} channels-last"] = bare_step(task, rows, device, bf16, True)
        variants[f"bare {precision} channels-last, double rows"] = bare_step(task, 2 * rows, device, bf16, True)
        if arguments.compile:
            compiled = bare_step(task, rows, device, bf16, True, compiled=True)
            variants[f"bare {precision} channels-last, compiled"] = compiled
        for name in PASSES:
            variants[f"{name} {precision}"] = method_step(name, task, rows, device, bf16)
    seconds = measure(variants, device, arguments.repetitions)
    ratios: dict[str, Any] = {
        "speedup of channels-last, fp32": seconds["bare fp32"] / seconds["bare fp32 channels-last"],
        "speedup of bf16": seconds["bare fp32"] / seconds["bare bf16"],
        "speedup of bf16 with channels-last": seconds["bare fp32"] / seconds["bare bf16 channels-last"],
    }
    for precision in ("fp32", "bf16"):
        bare, double = (seconds[f"bare {precision} channels-last{more}"] for more in ("", ", double rows"))
        if arguments.compile:
            compiled_seconds = seconds[f"bare {precision} channels-last, compiled"]
            ratios[f"speedup of torch.compile over channels-last, {precision}"] = bare / compiled_seconds
        ratios[f"supervised step over its bare pass, {precision}"] = seconds[f"supervised {precision}"] / bare
        ratios[f"mean_teacher step over a bare pass of as many rows, {precision}"] = (
            seconds[f"mean_teacher {precision}"] / double
        )
    for name, value in {**seconds, **ratios}.items():
        print(f"{name:68} {value:8.3f}")
    if arguments.out:
        result = {"size": arguments.size, "rows": rows, "passes": PASSES, "median_seconds": seconds, "ratios": ratios}
        write_result(arguments.out, result, ("torch", "numpy"))


if __name__ == "__main__":
    main()
