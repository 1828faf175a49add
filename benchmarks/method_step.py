"""Time of a method's step against the sum of its bare passes: every network and head it runs, forward and backward.

    python benchmarks/method_step.py --recipe acdc-cpu --out benchmarks/results/method-step-cpu.json
    python benchmarks/method_step.py --recipe la --size 80 112 112 --rows 2 --precision bf16

The calls of one step (which module, on which tensors, with or without gradient) are recorded and replayed alone, the
backward pass with a gradient of ones. What a step takes beyond them is losses, sampling, views, moving averages and
the optimizer. Steps and replays alternate in one process, so that the ratio holds when the machine's speed drifts; on
a CPU the time is that of the process.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import write_result
from torch import Tensor, nn
from training_step import autocast, clock

from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Progress, Stage, Task
from scantly.networks import PyramidHead
from scantly.settings import parse
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles
from scantly.training.recipes import method_settings, read_recipe

#: Methods of modules that are passes although they are no call of the module.
PARTS = {PyramidHead: ("at", "pooled")}


@dataclass
class Call:
    """One pass: a module's call, or one of its methods."""

    run: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    gradient: bool

    def replay(self) -> None:
        """Forward and, where there was a gradient, backward."""
        with torch.set_grad_enabled(self.gradient):
            output = self.run(*_fresh(self.arguments), **self.options)
            tensors = [x for x in (output if isinstance(output, list | tuple) else [output]) if x.requires_grad]
        if tensors:
            with torch.autocast(tensors[0].device.type, enabled=False):
                torch.autograd.backward(tensors, [torch.ones_like(x) for x in tensors])


def _fresh(value: Any) -> Any:
    """The same tensors as new leaves, so that a replay ends where the call began."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(_fresh(item) for item in value)
    return value


@contextmanager
def recorded(method: Method) -> Iterator[list[Call]]:
    """The outermost calls of the method's modules."""
    calls: list[Call] = []
    depth = 0

    def wrapped(run: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal depth
            if depth == 0:
                calls.append(Call(run, _kept(arguments), options, torch.is_grad_enabled()))
            depth += 1
            try:
                return run(*arguments, **options)
            finally:
                depth -= 1

        return call

    changed: list[tuple[nn.Module, str]] = []
    for module in method.modules():
        if module is method or not (list(module.parameters(recurse=True)) or isinstance(module, nn.MaxPool2d)):
            continue
        parts = next((names for kind, names in PARTS.items() if isinstance(module, kind)), ())
        for name in ("forward", *parts):
            setattr(module, name, wrapped(getattr(module, name)))
            changed.append((module, name))
    try:
        yield calls
    finally:
        for module, name in changed:
            delattr(module, name)


def _kept(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, list | tuple):
        return type(value)(_kept(item) for item in value)
    return value


def make_batch(task: Task, stage: Stage, rows: int, device: str) -> Batch:
    """Images with something to segment, as many rows as the stage asks for."""

    def draw(count: int | None) -> tuple[Tensor, Tensor]:
        count = rows if count is None else count
        coarse = torch.rand(count, 1, *(max(2, side // 16) for side in task.patch_size), device=device)
        mode = "bilinear" if task.spatial_dims == 2 else "trilinear"
        smooth = nn.functional.interpolate(coarse, task.patch_size, mode=mode)
        labels = (smooth[:, 0] * task.num_classes).long().clamp(max=task.num_classes - 1)
        return smooth + 0.05 * torch.randn_like(smooth), labels

    streams = (stage.labeled, stage.unlabeled, stage.extra)
    (x, y), (u, pseudo), (extra, extra_labels) = (draw(stream.count) for stream in streams)
    batch = Batch(x, y, u, x, y, u)
    if stage.relabel:
        batch.pseudo_labels = batch.pseudo_labels_raw = pseudo
    if len(extra):
        batch.extra, batch.extra_labels = extra, extra_labels
    return batch


def measure(name: str, sets: dict[str, Any], task: Task, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Median seconds of a step and of its passes, for each stage of a method."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = arguments.precision == "bf16"
    kind = catalogue.load(name)
    torch.manual_seed(0)
    method = kind(task, parse(kind.Config, sets, where="method")).to(device).train()
    if task.spatial_dims == 2:
        method.to(memory_format=torch.channels_last)
    method.generator = torch.Generator(device).manual_seed(0)
    found = []
    for stage in method.stages():
        method.enter_stage(stage, first=True)
        handles = TrainingHandles(method, stage, TrainingSection(), 1000)
        batch = make_batch(task, stage, arguments.rows, device)

        def step(iteration: int, stage: Stage = stage, handles: Any = handles, batch: Batch = batch) -> None:
            progress = Progress(500 + iteration, 1000, stage.name)
            with autocast(device, bf16):
                method.step(batch, progress, handles)
            method.after_step(progress)

        for iteration in range(2):
            step(iteration)
        times: dict[str, list[float]] = {"step": [], "passes": []}
        for iteration in range(arguments.repetitions):
            with recorded(method) as calls:
                step(2 * iteration)
            started = clock(device)
            step(2 * iteration)
            times["step"].append(clock(device) - started)
            started = clock(device)
            with autocast(device, bf16):
                for call in calls:
                    call.replay()
            times["passes"].append(clock(device) - started)
            method.zero_grad(set_to_none=True)
        seconds = {key: statistics.median(values) for key, values in times.items()}
        ratio = statistics.median(a / b for a, b in zip(times["step"], times["passes"], strict=True))
        found.append({"method": name, **sets, "stage": stage.name, **seconds, "ratio": ratio})
        print(f"{name:14} {stage.name:14} {seconds['step']:8.3f} s {seconds['passes']:8.3f} s {ratio:6.2f}", flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="acdc-cpu")
    parser.add_argument("--methods", nargs="+", default=["supervised", "mean_teacher", "arco", "plgcl", "lclpl"])
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--size", type=int, nargs="+", help="patch, (H W) or (D H W); default: the recipe's")
    parser.add_argument("--rows", type=int, help="labeled and unlabeled rows; default: the recipe's")
    parser.add_argument("--precision", choices=["32", "bf16"], help="default: the recipe's")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = read_recipe(arguments.recipe)
    plan, network = recipe["plan"], recipe.get("network", {})
    arguments.rows = arguments.rows or plan["labeled_batch_size"]
    arguments.precision = arguments.precision or str(recipe.get("training", {}).get("precision", "32"))
    size = tuple(arguments.size or plan["patch_size"])
    dims: Any = len(size)
    classes = tuple(f"class {index}" for index in range(arguments.classes))
    name = network.get("name", "unet" if dims == 2 else "vnet")
    task = Task(1, classes, dims, size, name, network.get("arguments", {}))
    rows = []
    for method in arguments.methods:
        rows += measure(method, method_settings(recipe.get("methods", {}).get(method, {})), task, arguments)
    if arguments.out:
        head = {"recipe": arguments.recipe, "size": size, "rows": arguments.rows, "precision": arguments.precision}
        write_result(arguments.out, {**head, "classes": arguments.classes, "steps": rows}, ("torch",))


if __name__ == "__main__":
    main()
