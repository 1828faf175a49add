"""Run a benchmark file: what ``scantly benchmark`` and ``scantly.benchmark`` do."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from scantly.benchmark.cells import resolve_cells
from scantly.benchmark.grid import SPEC_FILE, Grid, GridState
from scantly.benchmark.local import LocalPool, Pool
from scantly.benchmark.spec import read_spec
from scantly.benchmark.storage import Remote, is_address, scratch_folder
from scantly.errors import RunError

__all__ = ["On", "cores", "open_grid", "run_grid", "send_report"]

On = Literal["local", "ray"]
#: Small files of a run, enough for tables and report.
_RESULTS = (".json", ".yaml", ".csv")


def open_grid(spec: str | Path, out: str, *, device: str | None = None, precision: str | None = None) -> Grid:
    """The grid of a benchmark file in its results folder; nothing is written where that is on this machine.

    Args:
        spec: The benchmark file.
        out: Results folder, or an address of fsspec: then what is there of outcomes and results is fetched into the
            cache folder.
        device: ``auto``, ``cpu`` or ``cuda``, for every cell.
        precision: ``32`` or ``bf16``, for every cell.

    Raises:
        ConfigError: naming every fault of the benchmark file.
        RunError: if the results folder holds something else.
    """
    read = read_spec(Path(spec))
    cells = resolve_cells(read, flags={"device": device, "precision": precision})
    folder = Path(out)
    if is_address(out):
        folder = scratch_folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout), FileLock(folder / ".lock", timeout=0):  # who holds it keeps the folder up to date
            there = Remote(out).fetch(folder, suffixes=_RESULTS)
            if there and SPEC_FILE not in there:
                raise RunError(
                    f"{out} is not empty (it holds {there[0]!r}) and holds no benchmark; choose another --out."
                )
    grid = Grid(folder, read, cells)
    grid.check()
    return grid


def run_grid(
    grid: Grid,
    out: str,
    *,
    on: On = "local",
    processes: int = 1,
    threads: int | None = None,
    retry_failed: bool = False,
    address: str | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    quiet: bool = False,
) -> GridState:
    """Do what is open of a benchmark.

    Args:
        grid: From :func:`open_grid`.
        out: The same results folder or address.
        on: ``local``: processes of this machine; ``ray``: tasks of a Ray cluster.
        processes: Cells at a time on this machine.
        threads: PyTorch threads per cell; ``None``: the cores shared between the processes, on Ray a cell's CPUs.
        retry_failed: Whether failed cells are done again.
        address: Of the Ray cluster.
        cpus: CPUs of a cell on Ray.
        gpus: GPUs of a cell on Ray.
        quiet: Show no progress.

    Returns:
        The state afterwards.

    Raises:
        RunError: if the disk is full, or no cluster answers.
    """
    pool: Pool
    if on == "ray":
        from scantly.benchmark.on_ray import RayPool

        pool = RayPool(address, cpus=cpus, gpus=gpus)
        share = threads or max(1, int(cpus))
    else:
        pool = LocalPool(processes)
        share = threads or max(1, cores() // processes)
    if not is_address(out):
        return grid.work(pool, threads=share, retry_failed=retry_failed, quiet=quiet)
    kept = Remote(out, without=("cells/",))
    with grid.claimed():
        with kept.mirrored(grid.folder), grid.claimed():  # again: fetching has put back what lay there
            kept.send(grid.folder)  # at once, so that whatever follows is known to be this benchmark's
            grid.work(pool, threads=share, retry_failed=retry_failed, remote=out, quiet=quiet)
        Remote(out).fetch(grid.folder, suffixes=_RESULTS)
    return grid.state()


def send_report(grid: Grid, out: str) -> None:
    """Where the results are kept under an address, copy what was written beside them, such as the report, there too.

    Args:
        grid: The grid.
        out: Results folder or address, as it was opened with.

    Raises:
        RunError: if the address cannot be written.
    """
    if is_address(out):
        Remote(out, without=("cells/",)).send(grid.folder)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
