"""Cells on a Ray cluster: a task each; one whose worker or node is lost goes on elsewhere from its last checkpoint."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import redirect_stdout
from typing import Any

from scantly.benchmark.work import Job, Outcome, run_in_process
from scantly.errors import ConfigError, RunError

__all__ = ["RayPool"]

#: A task whose worker or node is lost is started again so often.
_RETRIES = 5
_ANSWER_SECONDS = 5.0


class RayPool:
    """Tasks of a Ray cluster.

    Run folders must be where every node sees them: on a shared disk, or under an address
    (:mod:`scantly.benchmark.storage`).

    Args:
        address: Of the cluster, as ``ray.init`` takes it; ``None``: the one that Ray finds (``RAY_ADDRESS``, or one
            that runs on this machine), else a new one on this machine.
        cpus: CPUs of a cell.
        gpus: GPUs of a cell; a fraction lets cells share one.

    Raises:
        ConfigError: if Ray is not installed.
        RunError: if the address does not answer.
    """

    def __init__(self, address: str | None = None, *, cpus: float = 1.0, gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError("--on ray needs Ray; install it with: pip install 'scantly[ray]'.") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that is started here reports to nobody
        self._ray: Any = ray
        self._cpus, self._gpus = cpus, gpus
        self._running: list[str] = []
        given = address or os.environ.get("RAY_ADDRESS")
        _require_answer(given)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except Exception as error:  # some of Ray's are of no class of their own
            reason = " ".join(str(error).split())
            raise RunError(f"no Ray cluster can be used at {given or 'the default address'} ({reason}).") from error
        self._require_resources()

    def _require_resources(self) -> None:
        """A cell that no node can hold would wait for ever."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= self._cpus and n.get("GPU", 0) >= self._gpus for n in nodes):
            largest: dict[str, float] = max(nodes, key=lambda n: (n.get("GPU", 0), n.get("CPU", 0)), default={})
            raise RunError(
                f"no node of the Ray cluster has {self._cpus:g} CPUs and {self._gpus:g} GPUs for a cell; the largest "
                f"has {largest.get('CPU', 0):g} and {largest.get('GPU', 0):g}. Lower --cpus-per-cell or "
                "--gpus-per-cell."
            )

    @property
    def processes(self) -> int:
        """Cells at a time, by what the cluster has now."""
        total = self._ray.cluster_resources()
        by_cpu = int(total.get("CPU", 0) // self._cpus) if self._cpus else 1_000_000
        by_gpu = int(total.get("GPU", 0) // self._gpus) if self._gpus else 1_000_000
        return max(1, min(by_cpu, by_gpu))

    def run(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Outcomes as they come, in no order."""
        ray = self._ray
        task = ray.remote(_work).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=_RETRIES, retry_exceptions=False
        )
        waiting = {task.remote(job): job for job in jobs}
        try:
            with redirect_stdout(sys.stderr):  # Ray tells of lost workers there, whatever it was asked
                while waiting:
                    self._running = [job.name for job in waiting.values()]
                    (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
                    job = waiting.pop(ready)
                    yield self._outcome(ready, job)
        finally:
            self._running = []
            for reference in waiting:
                ray.cancel(reference, force=False)
            if waiting:
                ray.wait(list(waiting), num_returns=len(waiting), timeout=60)

    def _outcome(self, reference: Any, job: Job) -> Outcome:
        errors = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except errors.RayTaskError as error:
            said = " ".join(str(error.cause or error).split())
            return Outcome(job.name, "failed", f"its worker failed: {said}.", "fault")
        except errors.RayError as error:  # crashed, node lost, out of memory, ...
            said = " ".join(str(error).split())
            return Outcome(job.name, "failed", f"its worker was lost {_RETRIES + 1} times ({said}).", "lost")
        return outcome

    def running(self) -> list[str]:
        """Names of the cells that are being worked on or wait for a worker."""
        return list(self._running)


def _require_answer(address: str | None) -> None:
    """Ray itself tries a dead address for minutes.

    Raises:
        RunError: if nothing listens there.
    """
    host, _, port = (address or "").rpartition("://")[2].split("?")[0].rpartition(":")
    if not host or not port.isdecimal():  # "auto", "local", or what Ray will refuse at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"no Ray cluster answers at {address} ({error}); check the address, and that 'ray start --head' runs there."
        ) from error


def _work(job: Job) -> Outcome:
    """On a node: the cell in a process of its own, which ends when this worker does."""
    stop = threading.Event()
    try:
        return run_in_process(job, stop=stop)
    except KeyboardInterrupt:  # cancelled
        stop.set()
        raise
