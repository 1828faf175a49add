"""Batches made ahead of time by worker processes."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from scantly.data.batches import BatchSource, RawBatch
from scantly.data.parallel import worker_count
from scantly.errors import ScantlyError

__all__ = ["make_loader"]

_MOST_WORKERS = 4


def make_loader(
    source: BatchSource, start: int, stop: int, workers: int | None, pin_memory: bool
) -> Iterator[RawBatch]:
    """The batches of iterations ``start`` to ``stop - 1`` in order, made by worker processes ahead of time.

    They do not depend on the number of workers, and torch's global generator is left alone.

    Args:
        source: What to draw.
        start: First iteration.
        stop: Iteration after the last one.
        workers: Processes; 0 makes each batch in this process when it is asked for. ``None``: 0 for the CPU, whose
            steps take a hundred times as long as a batch; for a GPU (``pin_memory``) one per core but one, up to 4.
        pin_memory: Whether batches lie in page-locked memory, from which they reach a GPU faster.

    Raises:
        ScantlyError: what a worker met, as one sentence.
    """
    # forked workers start in milliseconds, others import torch first (seconds); they touch numpy only, so
    # threads and CUDA contexts of this process, which do not survive a fork, are not missed
    if workers is None:
        workers = min(_MOST_WORKERS, max(worker_count(None, _MOST_WORKERS + 1) - 1, 0)) if pin_memory else 0
    forks = "fork" in multiprocessing.get_all_start_methods()
    loader: DataLoader[RawBatch | ScantlyError] = DataLoader(
        _Answers(source),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        multiprocessing_context=("fork" if forks else "spawn") if workers else None,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator(),
    )
    for answer in loader:
        if isinstance(answer, ScantlyError):
            raise answer
        yield answer


@dataclass
class _Answers(Dataset[RawBatch | ScantlyError]):
    """Batches, or the error: torch would hand an error from a worker on with the worker's traceback as text."""

    source: BatchSource

    def __getitem__(self, iteration: int) -> RawBatch | ScantlyError:
        try:
            return self.source[iteration]
        except ScantlyError as error:
            return error.with_traceback(None)


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked worker inherits the training's handler
    torch.set_num_threads(1)
