"""What a benchmark will cost: time by steps tried on made-up images, disk by the size of what is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from scantly.benchmark.cells import NNUNET, Cell
from scantly.inference.predict import select_device
from scantly.methods import catalogue
from scantly.methods.base import Batch, Method, Progress, Stage
from scantly.training.config import RunConfig
from scantly.training.cpu_bf16 import mend_convolutions
from scantly.training.feed import stage_rows
from scantly.training.optimizers import TrainingHandles
from scantly.training.stages import stage_spans
from scantly.training.train import build_method

__all__ = ["Estimate", "estimates"]


@dataclass(frozen=True)
class Estimate:
    """About what one cell takes.

    Attributes:
        cell: Its name.
        seconds: Of training, with validation and evaluation left out.
        disk_bytes: Of its checkpoints and model, with predictions left out.
        source: ``measured`` on cells of the same row, ``tried``: from a step per stage on this machine, or ``guessed``:
            as a supervised cell, for nnU-Net.
    """

    cell: str
    seconds: float
    disk_bytes: float
    source: Literal["measured", "tried", "guessed"]


def estimates(cells: Sequence[Cell], known: dict[tuple[str, str], float], *, threads: int) -> Iterator[Estimate]:
    """One after the other; cells that differ in seed and labeled count alone are tried once.

    Args:
        cells: Resolved cells.
        known: Mean seconds of finished cells by dataset and row.
        threads: PyTorch threads of a cell; 0: as PyTorch chooses.
    """
    if threads:
        torch.set_num_threads(threads)
    tried: dict[tuple[str, str], tuple[float, float]] = {}
    for cell in cells:
        assert cell.config is not None
        row = (cell.dataset, cell.row)
        if row not in tried:
            tried[row] = _try(cell.config, timed=row not in known)
        seconds, disk = tried[row]
        source: Literal["measured", "tried", "guessed"] = "guessed" if cell.row == NNUNET else "tried"
        source = "measured" if row in known else source
        yield Estimate(cell.name, known.get(row, seconds), disk, source)


def _try(config: RunConfig, *, timed: bool) -> tuple[float, float]:
    """Seconds of the whole training (0 if not ``timed``), and bytes of its files."""
    device = select_device(config.training.device)
    torch.manual_seed(config.training.seed)
    method = build_method(config).to(device).train()
    method.generator = torch.Generator(device).manual_seed(0)
    if device.type == "cpu" and config.training.precision == "bf16":
        mend_convolutions(method)
    if config.training.channels_last and config.plan.spatial_dims == 2:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = 0.0
    for span in stage_spans(method.stages(), config.training.steps) if timed else ():
        seconds += span.length * _step_seconds(method, span.stage, config, device)
    return seconds, _disk_bytes(method)


def _step_seconds(method: Method, stage: Stage, config: RunConfig, device: torch.device) -> float:
    method.enter_stage(stage, first=True)
    handles = TrainingHandles(method, stage, config.training, 3)
    batch = _batch(method, stage, config, device)
    bf16 = config.training.precision == "bf16"
    times = []
    for iteration in range(3):  # the first one makes buffers and kernels
        _synchronize(device)
        begun = time.perf_counter()
        progress = Progress(iteration, 3, stage.name, iteration, 3)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            method.step(batch, progress, handles)
        method.after_step(progress)
        _synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _batch(method: Method, stage: Stage, config: RunConfig, device: torch.device) -> Batch:
    """Noise of the right shape; labels hold every class."""
    pool = catalogue.load(config.method_name).uses_unlabeled and bool(config.split["unlabeled"])
    labeled, unlabeled, extra = stage_rows(stage, config.plan, pool=pool)
    side = tuple(config.plan.patch_size)
    channels, classes = len(config.plan.normalization), method.task.num_classes

    def images(rows: int) -> torch.Tensor:
        return torch.rand(rows, channels, *side, device=device)

    def labels(rows: int) -> torch.Tensor:
        return torch.randint(classes, (rows, *side), device=device)

    x, y, u = images(labeled), labels(labeled), images(unlabeled)
    batch = Batch(x, y, u, x, y, u, tuple("a" * labeled), tuple("b" * unlabeled))
    batch.pseudo_labels = batch.pseudo_labels_raw = labels(unlabeled)
    if extra:
        batch.extra, batch.extra_labels = images(extra), labels(extra)
    return batch


def _disk_bytes(method: Method) -> float:
    """Full state with a momentum per parameter in the last checkpoint; the predictor in the best one and the model."""
    state = sum(value.nbytes for value in method.state_dict().values())
    momentum = sum(p.nbytes for p in method.parameters() if p.requires_grad)
    return float(state + momentum + 2 * _bytes(method.predictor))


def _bytes(network: nn.Module) -> int:
    return sum(value.nbytes for value in network.state_dict().values())
