"""Real process groups of two processes on this machine, for what several ranks must compute together."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

__all__ = ["RANKS", "run_on_two_ranks"]

RANKS = 2


def run_on_two_ranks(function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """Call a module's function in two new processes that form a gloo group, each with one torch thread.

    Args:
        function: ``function(*args)``; it asks :mod:`scantly.ranks` which rank it is.
        args: What can be pickled.
        timeout: Seconds until both are ended, by the group or from here.

    Returns:
        What each rank returned, tensors and plain data.

    Raises:
        AssertionError: with a rank's traceback, or if one was too slow.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_child, args=(Path(folder), rank, timeout, function, args)) for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        errors = Path(folder) / "errors"
        while any(process.is_alive() for process in processes) and time.monotonic() < end and not errors.exists():
            time.sleep(0.02)
        for process in processes:  # a rank that failed leaves the other one waiting
            process.join(1 if errors.exists() else 0)
            if process.is_alive():
                process.kill()
            process.join()
        assert not errors.exists(), errors.read_text()
        codes = [process.exitcode for process in processes]
        assert codes == [0] * RANKS, f"no answer within {timeout} s, or ended: exit codes {codes}"
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _child(folder: Path, rank: int, timeout: float, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=RANKS,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        torch.save(result, folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - told by the parent
        part = folder / f"errors{rank}"
        part.write_text(f"rank {rank}:\n{traceback.format_exc()}")
        with suppress(FileExistsError):  # complete as soon as it is there; of two failures the first is told
            os.link(part, folder / "errors")
        os._exit(1)
