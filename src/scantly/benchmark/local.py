"""Cells on this machine: so many processes at a time, each with its share of the threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from scantly.benchmark.work import Job, Outcome, run_in_process

__all__ = ["LocalPool", "Pool"]

_LOGGER = logging.getLogger("scantly")


class Pool(Protocol):
    """Where cells are worked on."""

    @property
    def processes(self) -> int:
        """Cells at a time."""

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Outcomes as they come; closing the iterator stops what is running, with a checkpoint each."""

    def running(self) -> list[str]:
        """Names of the cells being worked on."""


class LocalPool:
    """Processes of this machine.

    Args:
        processes: Cells at a time.
    """

    def __init__(self, processes: int = 1) -> None:
        self._processes = processes
        self._running: dict[str, int] = {}

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Outcomes as they come, in no order."""
        stop = threading.Event()
        with ThreadPoolExecutor(self.processes) as threads:
            waiting = iter(jobs)
            active: set[Future[Outcome]] = set()
            try:
                while True:
                    for job in waiting:  # no more than can run, so that stopping has nothing to take back
                        active.add(threads.submit(self._one, job, stop))
                        if len(active) == self.processes:
                            break
                    if not active:
                        return
                    done, active = wait(active, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
            finally:
                stop.set()
                if active:
                    _LOGGER.info("stopping: %s, with a checkpoint each", ", ".join(self.running()))

    @property
    def processes(self) -> int:
        """Cells at a time."""
        return self._processes

    def _one(self, job: Job, stop: threading.Event) -> Outcome:
        try:
            return run_in_process(job, stop=stop, started=lambda number: self._running.update({job.name: number}))
        finally:
            self._running.pop(job.name, None)

    def running(self) -> list[str]:
        """Names of the cells being worked on."""
        return list(self._running)

    def processes_of(self) -> dict[str, int]:
        """Cell -> number of its process."""
        return dict(self._running)
