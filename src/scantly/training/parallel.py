"""Several processes that train one run: how they start, agree, wait for each other, and end together."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from scantly.errors import ConfigError, DeviceError, PeerError, RunError
from scantly.ranks import rank, world_size
from scantly.training.config import TrainingSection

__all__ = ["ending_together", "launched", "rank_zero_first", "same_weights"]

_LOGGER = logging.getLogger("scantly")
#: How long a process waits for the others within an iteration. One that dies is noticed at once.
_PATIENCE = timedelta(minutes=30)
_PREFIX = "scantly"
_ENDED = f"{_PREFIX}/ended"


@contextmanager
def launched(settings: TrainingSection, accelerator: str) -> Iterator[Fabric]:
    """The processes of a training, which end together; within it only rank 0 speaks of its progress.

    With one device nothing is started. Otherwise the processes are those of torchrun or SLURM, or, where neither has
    started any, Fabric starts the same command once more per further device.

    Args:
        settings: Devices and nodes.
        accelerator: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: if torchrun has started another number of processes.
        DeviceError: if there are not so many devices, or SLURM has other tasks.
        PeerError: if the training ended for a reason that another process tells.
        RunError: if another process ended without a word.
    """
    asked = settings.devices * settings.nodes
    _check_started(settings)
    if asked == 1:
        fabric = Fabric(accelerator=accelerator, devices=1, num_nodes=1)
        fabric.launch()
        yield fabric
        return
    # one group with both: generators and decisions are exchanged on the CPU, gradients where they are
    backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
    strategy = DDPStrategy(process_group_backend=backend, timeout=_PATIENCE)
    for speaker in ("lightning.fabric", *(f"lightning.{part}.utilities.rank_zero" for part in ("fabric", "pytorch"))):
        logging.getLogger(speaker).setLevel(logging.WARNING)  # they greet
    try:
        fabric = Fabric(accelerator=accelerator, devices=settings.devices, num_nodes=settings.nodes, strategy=strategy)
        fabric.launch()
    except (MisconfigurationException, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(
            f"training.devices={settings.devices} and training.nodes={settings.nodes} do not fit what is here "
            f"({reason}); give --devices the devices, or SLURM's tasks, per node, and --nodes the nodes."
        ) from error
    level = _LOGGER.level
    if not fabric.is_global_zero:
        _LOGGER.setLevel(logging.ERROR)
    try:
        with ending_together():
            yield fabric
            fabric.barrier()
    finally:
        _LOGGER.setLevel(level)


def _check_started(settings: TrainingSection) -> None:
    started = os.environ.get("WORLD_SIZE")
    asked = settings.devices * settings.nodes
    if "TORCHELASTIC_RUN_ID" in os.environ and started is not None and int(started) != asked:
        raise ConfigError(
            f"torchrun started {started} processes, but training.devices is {settings.devices} and training.nodes "
            f"{settings.nodes}; give --devices the processes per node (torchrun's --nproc-per-node) and --nodes the "
            "nodes."
        )


def same_weights(module: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0: processors may round a random draw differently."""
    if world_size() > 1:
        for value in module.state_dict().values():
            dist.broadcast(value, src=0)


@contextmanager
def rank_zero_first(what: str) -> Iterator[None]:
    """Rank 0 runs the block, then all others do, together. They wait however long it takes, or until it dies.

    Args:
        what: Name of the block, used once per process.
    """
    if world_size() == 1:
        yield
        return
    key = f"{_PREFIX}/{what}"
    if rank() == 0:
        yield
        _store().set(key, "done")
        return
    while not _store().check([key]):
        if _store().check([_ENDED]):
            raise RunError(f"there is no {what}, since another process of the training has ended.")
        time.sleep(0.2)
    yield


@contextmanager
def ending_together() -> Iterator[None]:
    """Around all that the ranks do together: a fault is told by the first process that has it, and ends them all.

    Raises:
        PeerError: in the processes that end because another one has.
        RunError: if a process ended without a word, for instance killed, in one of the others.
    """
    try:
        yield
    except Exception as error:
        if world_size() == 1:
            raise
        first = _is_first()
        if first is None and rank() == 1:
            raise RunError(
                "the first process of this training has ended; if it does not say why itself it was killed, for "
                "instance for its memory. Continue with --resume: from the last checkpoint, or from the start where "
                "there is none yet."
            ) from error
        if not first:
            raise PeerError(
                f"rank {rank()} ended because another process of the training did; that one says why."
            ) from error
        if _lost(error):
            raise RunError(
                f"another of the {world_size()} processes of this training ended without a word, as rank {rank()} "
                "noticed; it may have been killed, for instance for its memory. Continue with --resume: from the last "
                "checkpoint, or from the start where there is none yet."
            ) from error
        raise


def _is_first() -> bool | None:
    """Whether no process has ended before; ``None``: unknown, since rank 0, which keeps the notes, is gone."""
    try:
        return int(_store().add(_ENDED, 1)) == 1
    except RuntimeError:
        return None


def _lost(error: BaseException) -> bool:
    """Whether an exchange failed because another process is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _store() -> Any:
    """Where the processes leave notes for each other."""
    return dist.distributed_c10d._get_default_store()
