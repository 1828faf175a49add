"""One function over many cases in several processes, with the results and errors of a plain loop."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, TypeVar

from scantly.errors import RunError

__all__ = ["available_memory", "in_order", "total_memory", "worker_count"]

#: Share of the free memory that all workers together may fill.
_MEMORY_SHARE = 0.6
#: Forking is safe on Linux; system libraries of macOS do not bear it.
_FORKS = sys.platform.startswith("linux")

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_count(wanted: int | None, jobs: int, bytes_per_job: int = 0) -> int:
    """Number of processes for a number of jobs, at least 1.

    Args:
        wanted: As the caller asks; ``None``: one per core that this process may use, as many as fit into memory.
            Without ``fork`` (Windows, macOS) ``None`` is 1: new processes there import the user's script again.
        jobs: How many there are to do; more processes would be idle.
        bytes_per_job: Memory that one job needs at most.
    """
    if wanted is not None:
        return max(1, min(wanted, jobs))
    if not _FORKS:
        return 1
    free = available_memory()
    fitting = jobs if free is None or bytes_per_job <= 0 else int(free * _MEMORY_SHARE / bytes_per_job)
    return max(1, min(len(os.sched_getaffinity(0)), jobs, fitting))


def available_memory() -> int | None:
    """Bytes that can be used without swapping: what the kernel calls available, or what a container's limit leaves.

    ``None`` where the system does not say.
    """
    lines = _read(Path("/proc/meminfo")).splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for folder, limit in _container_limits():
        used = _read(folder / "memory.current").strip()
        if used.isdecimal():
            counts = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            found.append(max(0, limit - int(used) + int(counts.get("inactive_file", 0))))
    return min(found, default=None)


def total_memory() -> int | None:
    """All memory that this process could ever have, in bytes: the machine's, or a container's limit if that is less."""
    lines = _read(Path("/proc/meminfo")).splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    if not found and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min([*found, *(limit for _, limit in _container_limits())], default=None)


def _container_limits() -> list[tuple[Path, int]]:
    """Limits of this process's control group (version 2) and of those above it, which hold for it as well."""
    own = next((line[3:] for line in _read(Path("/proc/self/cgroup")).splitlines() if line.startswith("0::")), "/")
    root = Path("/sys/fs/cgroup")
    group = root / own.lstrip("/")
    folders = [folder for folder in (group, *group.parents) if folder.is_relative_to(root)]
    texts = [(folder, _read(folder / "memory.max").strip()) for folder in folders]
    return [(folder, int(text)) for folder, text in texts if text.isdecimal()]


def _read(path: Path) -> str:
    """Text of a file of the kernel; empty where there is no such thing."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""


def in_order(function: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Generator[Result, None, None]:
    """``map(function, items)``, computed ahead by worker processes.

    Results come in the order of the items, and of several errors the first item's is raised, as in a loop. Close
    the generator to end early: items under way are finished, no further ones begun. Workers end with this
    process, however it ends.

    Args:
        function: Module-level; must not use torch. Its results are sent through a pipe.
        items: What to call it with.
        workers: Processes; 1: here, without any.

    Raises:
        RunError: if a worker is killed.
        Exception: what ``function`` raised.
    """
    if workers <= 1 or len(items) <= 1:
        yield from map(function, items)
        return
    # forked workers start at once and do not import the user's script again; they touch numpy alone, so threads
    # and CUDA contexts of this process, which do not survive a fork, are not missed
    context = multiprocessing.get_context("fork" if _FORKS else "spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(min(workers, len(items)), context, _start, (function, items, stop))
    try:
        with _held_back(signal.SIGINT):
            futures = [pool.submit(_call, number) for number in range(len(items))]
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise RunError(
            "a process that prepares cases was killed, most often for too little memory; close other programs "
            "and start again: what is prepared is kept."
        ) from None
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """Ctrl-C reaches all processes; one that was just forked must not meet it before it ignores it."""
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class _Task:
    """What a worker does."""

    function: Callable[[Any], Any]
    items: Sequence[Any]
    stop: Event


_task: list[_Task] = []


def _start(function: Callable[[Any], Any], items: Sequence[Any], stop: Event) -> None:
    """Begin a worker. The items are inherited once; afterwards their numbers are sent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.name == "posix":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    logging.disable()  # another thread may have held a handler's lock when this process was forked
    _task[:] = [_Task(function, items, stop)]
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _call(number: int) -> Any:
    task = _task[0]
    return None if task.stop.is_set() else task.function(task.items[number])


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, which would hold its locks and memory."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
