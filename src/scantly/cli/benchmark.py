"""``scantly benchmark``."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from scantly.cli.output import say, say_table, warn

if TYPE_CHECKING:
    from scantly.benchmark.cells import Cell
    from scantly.benchmark.grid import Grid, GridState
    from scantly.benchmark.run import On

__all__ = ["benchmark"]


def benchmark(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="YAML: datasets, methods, labeled counts, seeds.")],
    *,
    out: Annotated[str, typer.Option("--out", metavar="DIR|URL", help="Results folder: new, or one to go on with.")],
    on: Annotated[str, typer.Option("--on", metavar="local|ray", help="Processes here, or a Ray cluster.")] = "local",
    processes: Annotated[
        int, typer.Option("--processes", metavar="N", min=1, help="Cells at a time on this machine.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, help="CPU threads per cell. Default: the cores, shared."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="auto|cpu|cuda", help="Default: a GPU where there is one.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", metavar="32|bf16", help="Default: as the recipes say.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="ADDRESS", help="Ray cluster. Default: the one Ray finds, else a new one."),
    ] = None,
    cpus_per_cell: Annotated[
        float, typer.Option("--cpus-per-cell", metavar="N", min=0, help="CPUs of a cell on Ray.")
    ] = 1.0,
    gpus_per_cell: Annotated[
        float, typer.Option("--gpus-per-cell", metavar="N", min=0, help="GPUs of a cell on Ray; 0.5: two share one.")
    ] = 0.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do cells again that failed.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the cells with an estimate of time and disk; do nothing.")
    ] = False,
) -> None:
    """Train and evaluate a grid of methods, labeled counts and seeds; then write a report.

    A cell is done once. However it was stopped, the same command goes on: with the cells that are open, and inside a
    cell from its last checkpoint. A cell that fails is recorded with its reason, and the others go on; the report has
    them, and the exit status is then 2, or 1 where a cell failed for a fault of Scantly.
    """
    from scantly.benchmark.run import cores, open_grid, run_grid

    where = _where(on, address)
    grid = open_grid(spec, out, device=device, precision=precision)
    if dry_run:
        share = threads or max(1, int(cpus_per_cell) if where == "ray" else cores() // processes)
        _say_plan(grid, processes=processes, threads=share, retry_failed=retry_failed)
        return
    with _told_if_stopped(grid):
        state = run_grid(
            grid,
            out,
            on=where,
            processes=processes,
            threads=threads,
            retry_failed=retry_failed,
            address=address,
            cpus=cpus_per_cell,
            gpus=gpus_per_cell,
        )
    _say_state(grid, state, out)


def _where(on: str, address: str | None) -> On:
    from scantly.errors import ConfigError, unknown_name

    if on not in {"local", "ray"}:
        raise ConfigError(unknown_name("place for --on", on, ("local", "ray")))
    if address is not None and on != "ray":
        raise ConfigError(f"--address {address} names a Ray cluster, but the cells run here; add --on ray.")
    return cast("On", on)


@contextmanager
def _told_if_stopped(grid: Grid) -> Iterator[None]:
    """Ctrl-C, or SIGTERM as schedulers send it: cells stop with a checkpoint each, and one sentence says so."""
    from scantly.errors import RunError

    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    here = threading.current_thread() is threading.main_thread()
    if here:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # the latter by Ray, which takes SIGTERM for itself
        outcomes = [grid.outcome(cell) for cell in grid.cells]
        done = sum(outcome is not None and outcome.state == "done" for outcome in outcomes)
        raise RunError(
            f"stopped with {done} of {len(grid.cells)} cells done; the same command goes on, inside a cell from its "
            "last checkpoint if it has one."
        ) from None
    finally:
        if here:
            signal.signal(signal.SIGTERM, before)


def _say_plan(grid: Grid, *, processes: int, threads: int, retry_failed: bool) -> None:
    from scantly.benchmark.estimate import estimates
    from scantly.benchmark.grid import duration
    from scantly.training.progress import ProgressLine

    state, cells = grid.state(retry_failed=retry_failed), grid.cells
    todo = {cell.name for cell in state.open}
    open_cells = [cell for cell in cells if cell.name in todo]
    found = {}
    with ProgressLine("trying steps", len(open_cells)) as line:
        for done, estimate in enumerate(estimates(open_cells, grid.known_seconds(), threads=threads), start=1):
            found[estimate.cell] = estimate
            line.update(done, note=estimate.cell)
    rows: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        rows.setdefault((cell.dataset, cell.row), []).append(cell)
    table = []
    for (dataset, row), members in rows.items():
        left = [found[cell.name] for cell in members if cell.name in found]
        counts = Counter(str(cell.labeled) for cell in members)
        table.append(
            [
                dataset,
                row,
                ", ".join(counts),
                str(len(members)),
                str(len(left)),
                duration(left[0].seconds) if left else "",
                duration(sum(estimate.seconds for estimate in left)) if left else "",
                f"{sum(estimate.disk_bytes for estimate in left) / 1e6:.0f}" if left else "",
                left[0].source if left else "",
            ]
        )
    heads = ["dataset", "method", "labeled", "cells", "open", "each", "together", "disk (MB)", "from"]
    say_table(heads, table, title=f"{len(cells)} cells, {len(open_cells)} of them open", text_columns=3)
    seconds = sum(estimate.seconds for estimate in found.values()) / processes
    disk = sum(estimate.disk_bytes for estimate in found.values())
    on = f"{processes} process{'' if processes == 1 else 'es'}"
    say(f"about {duration(seconds)} on {on} and {disk / 1e9:.1f} GB of disk; preparation, validation, evaluation and")
    say("predictions come to it. Nothing was written.")


def _say_state(grid: Grid, state: GridState, out: str) -> None:
    from scantly.benchmark.run import send_report
    from scantly.errors import RunError
    from scantly.report.benchmark_page import benchmark_report

    say(
        f"{len(state.done)} of {len(grid.cells)} cells are done, {len(state.failed)} failed, {len(state.open)} are open"
    )
    for name, outcome in state.failed.items():
        say(f"  {name}: {outcome.reason}")
    if state.done:
        say(f"report: {benchmark_report(grid)}")
        send_report(grid, out)
    if not state.failed:
        return
    told = f"{len(state.failed)} of {len(grid.cells)} cells failed"
    sentence = f"{told}; when the cause is mended, --retry-failed does them again."
    if any(outcome.kind == "fault" for outcome in state.failed.values()):
        warn(sentence)
        raise typer.Exit(1)
    raise RunError(sentence)
