"""Train a method on a dataset folder: what ``scantly train`` and ``scantly.train`` do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from scantly.arguments import checked
from scantly.data.build import build_store
from scantly.data.dataset import Dataset
from scantly.data.store import Store
from scantly.inference.predict import select_device
from scantly.methods import catalogue
from scantly.methods.base import Method, Task
from scantly.networks import synchronize_batch_norm
from scantly.networks.precision import say_slow_bf16
from scantly.settings import parse
from scantly.training.config import RunConfig
from scantly.training.cpu_bf16 import mend_convolutions
from scantly.training.engine import Engine
from scantly.training.environment import describe_environment
from scantly.training.memory import check_memory
from scantly.training.parallel import launched, rank_zero_first, same_weights
from scantly.training.progress import ProgressLine
from scantly.training.resolve import resolve
from scantly.training.run import Run

__all__ = ["build_method", "train", "train_config"]

_LOGGER = logging.getLogger("scantly")


@checked(labeled="7 or '10%'", size="(64, 64)", settings="['method.consistency=0.5']")
def train(
    dataset: str | Path,
    *,
    method: str,
    out: str | Path,
    labeled: int | str | None = None,
    recipe: str | Path | None = None,
    protocol: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    size: Sequence[int] | None = None,
    config: str | Path | None = None,
    settings: Mapping[str, Any] | Sequence[str] = (),
    device: str | None = None,
    precision: str | None = None,
    resume: bool = False,
) -> Run:
    """Train a method on a dataset folder into a run folder.

    Args:
        dataset: Dataset folder (nnU-Net v2 raw layout).
        method: Name in the catalogue.
        out: Run folder, new, or one of the same configuration.
        labeled: Number of labeled subjects, a share such as ``"10%"``, or ``None`` for all.
        recipe: Name of a recipe, or a YAML file of one's own.
        protocol: ``clean`` or ``literature``.
        steps: Iterations, all stages together.
        seed: Seed of everything drawn.
        size: Training size, ``H W`` or ``H W D`` as the literature writes it.
        config: YAML file with further settings.
        settings: ``["method.consistency=0.5"]`` or nested ``{"method": {"consistency": 0.5}}``.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``32`` or ``bf16``.
        resume: Continue an unfinished run.

    Returns:
        The finished run.

    Raises:
        ScantlyError: one sentence on what is wrong and what to do; earlier results are untouched.
    """
    flags = {
        "method": method,
        "labeled": labeled,
        "protocol": protocol,
        "steps": steps,
        "seed": seed,
        "size": size,
        "device": device,
        "precision": precision,
    }
    resolved = resolve(dataset, recipe=recipe, config_file=config, flags=flags, sets=settings)
    return train_config(resolved, out, resume=resume)


def build_method(config: RunConfig) -> Method:
    """The method of a configuration, freshly initialized from torch's global generator."""
    plan = config.plan
    dataset = Dataset.open(Path(config.data.dataset))
    task = Task(
        channels=len(dataset.channels),
        classes=dataset.classes,
        spatial_dims=plan.spatial_dims,
        patch_size=tuple(plan.patch_size),
        network_name=config.network.name,
        network_arguments=config.network.arguments,
    )
    method = catalogue.load(config.method_name)
    return method(task, parse(method.Config, config.method_settings, where="method"))


def train_config(config: RunConfig, out: str | Path, *, resume: bool = False, quiet: bool = False) -> Run:
    """Train a resolved configuration.

    Args:
        config: From :func:`~scantly.training.resolve.resolve`.
        out: Run folder.
        resume: Continue an unfinished run.
        quiet: Show no progress.

    Returns:
        The finished run; one that was finished before is returned as it is.
    """
    run = Run(Path(out))
    settings = config.training
    device = select_device(settings.device)
    with launched(settings, device.type) as fabric, run.locked() if fabric.is_global_zero else nullcontext():
        torch.manual_seed(settings.seed)
        method = build_method(config)  # before anything is written: it may refuse network or settings
        check_memory(config, fabric.device, method.stages())
        if fabric.is_global_zero:
            environment = describe_environment(fabric.device, world_size=fabric.world_size)
            run.claim(config, environment, resume=resume)
        fabric.barrier()
        if run.finished:
            _LOGGER.info("%s is finished already; nothing to train", run.folder)
            return run
        with rank_zero_first("preparation"):
            store = prepare_store(config, quiet=quiet or not fabric.is_global_zero)
        if fabric.world_size > 1:
            same_weights(method)
            synchronize_batch_norm(method)
        method.to(fabric.device)
        if config.training.channels_last and config.plan.spatial_dims == 2:
            method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if fabric.device.type == "cpu" and settings.precision == "bf16":
            say_slow_bf16(fabric.device.type)
            mend_convolutions(method)
        torch.manual_seed(settings.seed + fabric.global_rank)  # dropout differs between ranks
        if settings.compile:
            for child in method.children():
                child.compile()
        dataset = Dataset.open(Path(config.data.dataset))
        Engine(run, config, method, dataset=dataset, store=store, fabric=fabric, quiet=quiet).fit()
    return run


def prepare_store(config: RunConfig, *, quiet: bool = False) -> Store:
    """Prepare all cases that the run reads; only labels of labeled cases enter the store."""
    split = config.split
    names = [*split["labeled"], *split["unlabeled"], *split["val"]]
    dataset = Dataset.open(Path(config.data.dataset))
    with ProgressLine("preparing", len(names), quiet=quiet) as line:
        return build_store(
            dataset,
            names,
            config.plan,
            root=Path(config.data.store) if config.data.store else None,
            with_labels=set(split["labeled"]),
            check_labels=set(split["val"]),
            progress=lambda done, _total, name: line.update(done, note=name),
        )
