"""The grid: every cell once, whatever happens meanwhile, and no folder of anybody else touched."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pytest
from grid_helpers import Here, kill, opened, results, times, wait_until, waiting, write_spec

from scantly.benchmark import grid as grid_module
from scantly.benchmark.grid import Grid, duration
from scantly.benchmark.local import LocalPool
from scantly.benchmark.work import Job, Outcome, run_job
from scantly.errors import ConfigError, RunError
from scantly.files import read_json, write_json

CELLS = [f"phantom/{row}-2-seed{seed}" for seed in (1, 2) for row in ("supervised", "gated")]


def pretend(job: Job) -> Outcome:
    """A cell that is done at once."""
    folder = Path(job.folder)
    write_json(folder / "evaluation" / f"{job.split}.json", {})
    write_json(folder / "config.yaml", {})
    return Outcome(job.name, "done", attempts=({"seconds": 2.0},), cost={"seconds": 3.0})


def failing(*names: str, kind: Any = "user", work: Callable[[Job], Outcome] = pretend) -> Callable[[Job], Outcome]:
    """Work in which some cells fail."""

    def do(job: Job) -> Outcome:
        if job.name not in names:
            return work(job)
        return Outcome(job.name, "failed", "it is broken.", kind, attempts=({"seconds": 1.0},))

    return do


@pytest.fixture
def spec(gated_spec, gated) -> Path:
    """Two rows, two seeds."""
    return gated_spec()


@pytest.fixture
def grid(spec: Path, tmp_path: Path) -> Grid:
    return opened(spec, tmp_path / "out")


def names(cells: Any) -> list[str]:
    return [cell.name for cell in cells]


def test_a_cell_is_done_once_and_never_again(grid: Grid, spec: Path) -> None:
    pool = Here(pretend)
    state = grid.work(pool, threads=1, quiet=True)
    assert pool.begun == names(state.done) == CELLS
    assert (state.failed, state.open) == ({}, ())
    written = read_json(grid.folder / "benchmark.json")
    assert list(written["cells"]) == CELLS
    before = times(grid.folder)
    del before["benchmark.json"]
    again = Here(pretend)
    opened(spec, grid.folder).work(again, threads=1, retry_failed=True, quiet=True)
    assert again.begun == []
    assert {name: time for name, time in times(grid.folder).items() if name != "benchmark.json"} == before


def test_what_a_worker_is_told(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.chdir(tmp_path)  # workers elsewhere have another working folder
    here = Grid(Path("out"), grid.spec, grid.cells)
    here.work(Here(lambda job: jobs.append(job) or pretend(job)), threads=3, quiet=True)
    job = jobs[1]
    assert job.name == CELLS[1]
    assert job.folder == str(tmp_path / "out" / "cells" / CELLS[1])
    assert job.log == str(tmp_path / "out" / "logs" / f"{CELLS[1]}.log")
    assert (job.split, job.threads, job.remote) == ("test", 3, None)
    assert job.config["method"]["name"] == "gated"
    assert job.config["training"]["seed"] == 1


def test_a_failing_cell_is_recorded_and_the_others_go_on(grid: Grid, spec: Path, caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="scantly"):
        state = grid.work(Here(failing(CELLS[1])), threads=1, quiet=True)
    assert names(state.done) == [CELLS[0], *CELLS[2:]]
    assert {name: outcome.reason for name, outcome in state.failed.items()} == {CELLS[1]: "it is broken."}
    assert f"{CELLS[1]} failed: it is broken." in caplog.text
    recorded = read_json(grid.folder / "outcomes" / f"{CELLS[1]}.json")
    assert (recorded["state"], recorded["kind"], recorded["reason"]) == ("failed", "user", "it is broken.")

    pool = Here(pretend)
    state = opened(spec, grid.folder).work(pool, threads=1, quiet=True)
    assert pool.begun == []
    assert list(state.failed) == [CELLS[1]]
    state = opened(spec, grid.folder).work(pool, threads=1, retry_failed=True, quiet=True)
    assert pool.begun == [CELLS[1]]
    assert len(state.done) == 4
    recorded = read_json(grid.folder / "outcomes" / f"{CELLS[1]}.json")
    assert [attempt["seconds"] for attempt in recorded["attempts"]] == [1.0, 2.0]


def test_a_method_that_raises_fails_alone(phantom: Path, gated, tmp_path: Path, undisturbed) -> None:
    rows = [{"name": "gated", "settings": {"fault": "error"}}, "supervised"]
    grid = opened(write_spec(tmp_path / "spec.yaml", phantom, methods=rows), tmp_path / "out")
    state = grid.work(Here(), threads=1, quiet=True)
    assert names(state.done) == ["phantom/supervised-2-seed1"]
    assert state.failed["phantom/gated-2-seed1"].reason.startswith("a fault of Scantly: AttributeError: the method is")
    assert results(grid.run_folder(state.done[0])) == undisturbed["phantom/supervised-2-seed1"]


def test_a_full_disk_stops_the_grid_and_loses_nothing(grid: Grid, spec: Path) -> None:
    pool = Here(failing(CELLS[2], kind="disk"))
    with pytest.raises(RunError, match=r"the disk is full: it is broken\. When there is space, the same command goes"):
        grid.work(pool, threads=1, quiet=True)
    assert pool.begun == CELLS[:3]
    assert names(grid.state().done) == CELLS[:2]
    assert names(grid.state().open) == CELLS[2:]  # not recorded as failed
    pool = Here(pretend)
    assert len(opened(spec, grid.folder).work(pool, threads=1, quiet=True).done) == 4
    assert pool.begun == CELLS[2:]


def test_too_little_space_is_told_before_a_cell_begins(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10 * 2**30]
    usage = shutil.disk_usage(grid.folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))

    def filling(job: Job) -> Outcome:
        free[0] = 50 * 2**20
        return pretend(job)

    pool = Here(filling)
    with pytest.raises(RunError, match=r"out has 50 MB left on its disk; free 200 MB or more"):
        grid.work(pool, threads=1, quiet=True)
    assert pool.begun == CELLS[:1]
    assert names(grid.state().done) == CELLS[:1]
    with pytest.raises(RunError, match="50 MB left"):
        grid.work(pool, threads=1, quiet=True)
    assert pool.begun == CELLS[:1]


def test_nothing_is_asked_of_the_disk_when_nothing_is_left(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    grid.work(Here(pretend), threads=1, quiet=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: pytest.fail("asked"))
    assert len(grid.work(Here(pretend), threads=1, quiet=True).done) == 4


def test_a_benchmark_may_grow(grid: Grid, gated_spec) -> None:
    grid.work(Here(pretend), threads=1, quiet=True)
    pool = Here(pretend)
    grown = gated_spec(seeds=[3, 1, 2], upper_bound=True, title="more")
    state = opened(grown, grid.folder).work(pool, threads=1, quiet=True)
    assert len(state.done) == 9
    assert sorted(pool.begun) == sorted(
        [*(name.replace("seed1", "seed3") for name in CELLS[:2])]
        + [f"phantom/supervised-all-seed{seed}" for seed in (1, 2, 3)]
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"entry": {"settings": {"training": {"lr": 0.5}}}}, "cell phantom/gated-2-seed1 has another configuration"),
        ({"entry": {"split": "val", "settings": {"evaluation": {"selection": "last"}}}}, "another configuration"),
        ({"methods": ["supervised"]}, "cell phantom/gated-2-seed1 is not in this one (1 more)"),
        ({"seeds": [1]}, "seed2 is not in this one (1 more)"),
    ],
)
def test_a_changed_benchmark_is_refused_untouched(grid: Grid, gated_spec, changes: dict[str, Any], said: str) -> None:
    grid.work(Here(failing(CELLS[1])), threads=1, quiet=True)
    before = times(grid.folder)
    with pytest.raises(RunError) as refused:
        opened(gated_spec(**changes), grid.folder)
    assert said in str(refused.value)
    assert times(grid.folder) == before


def test_what_does_not_change_a_result_may_differ(grid: Grid, gated_spec) -> None:
    grid.work(Here(pretend), threads=1, quiet=True)
    changed = gated_spec(entry={"settings": {"data": {"workers": 1}, "training": {"log_every": 7}}})
    assert len(opened(changed, grid.folder).state().done) == 4


def test_a_cell_that_was_not_begun_may_change(grid: Grid, gated_spec) -> None:
    with grid.claimed():
        pass
    assert len(opened(gated_spec(entry={"steps": 10}, seeds=[7]), grid.folder).state().open) == 2


def test_a_failed_cell_may_change_when_its_files_are_removed(grid: Grid, gated_spec, gate_path: Path) -> None:
    grid.work(Here(failing(CELLS[1], CELLS[3])), threads=1, quiet=True)
    for name in (CELLS[1], CELLS[3]):
        (grid.folder / "outcomes" / f"{name}.json").unlink()
        shutil.rmtree(grid.folder / "cells" / name, ignore_errors=True)
    mended = {"name": "gated", "settings": {"gate": str(gate_path)}, "training": {"lr": 0.001}}
    pool = Here(pretend)
    state = opened(gated_spec(methods=["supervised", mended]), grid.folder).work(pool, threads=1, quiet=True)
    assert pool.begun == [CELLS[1], CELLS[3]]
    assert len(state.done) == 4


def test_a_cell_whose_results_were_removed_is_done_again(grid: Grid) -> None:
    grid.work(Here(pretend), threads=1, quiet=True)
    shutil.rmtree(grid.folder / "cells" / CELLS[2])
    pool = Here(pretend)
    assert len(grid.work(pool, threads=1, quiet=True).done) == 4
    assert pool.begun == [CELLS[2]]


def test_a_folder_of_something_else_is_refused_untouched(spec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("precious")
    before = times(folder)
    with pytest.raises(RunError, match=r"thesis is not empty \(it holds 'chapter.tex'\) and holds no benchmark"):
        opened(spec, folder)
    assert times(folder) == before
    (folder / "benchmark.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"benchmark.json was not written by a benchmark"):
        opened(spec, folder)
    (folder / "benchmark.json").write_text("{")
    with pytest.raises(ConfigError, match=r"benchmark.json is not valid JSON"):
        opened(spec, folder)


def test_a_start_that_was_killed_at_once_leaves_a_folder_that_can_be_used(spec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".tmp-x8r-benchmark.json").touch()
    assert len(opened(spec, folder).state().open) == 4


def test_a_damaged_outcome_is_told(grid: Grid) -> None:
    grid.work(Here(pretend), threads=1, quiet=True)
    path = grid.folder / "outcomes" / f"{CELLS[0]}.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=f"{path} was not written by a benchmark"):
        grid.state()


def test_a_second_process_is_refused(grid: Grid, spec: Path) -> None:
    grid.folder.mkdir()
    with filelock.FileLock(grid.folder / ".lock"):
        before = times(grid.folder)
        with pytest.raises(RunError, match="another process works on the benchmark in"):
            grid.work(Here(), threads=1, quiet=True)
        assert times(grid.folder) == before
    with grid.claimed(), grid.claimed():  # nested in one process
        assert opened(spec, grid.folder).state().open
    with grid.claimed():
        pass


def test_a_folder_that_another_process_took_meanwhile(grid: Grid, gated_spec, monkeypatch) -> None:
    """It was free when this process looked, and has been another's benchmark and free again since."""
    other = opened(gated_spec(entry={"steps": 10}), grid.folder)
    other.work(Here(pretend), threads=1, quiet=True)
    before = times(grid.folder)
    check, seen = Grid.check, []

    def first_look_is_late(self: Grid) -> None:
        seen.append(self)
        if len(seen) > 1:
            check(self)

    monkeypatch.setattr(Grid, "check", first_look_is_late)
    with pytest.raises(RunError, match="holds another benchmark"), grid.claimed():
        pass
    assert times(grid.folder) == before


def test_a_pool_runs_no_more_than_it_may_and_stops_when_closed(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    active: list[str] = []
    most, stopped, go_on = [0], [], threading.Event()
    guard = threading.Lock()

    def cell(job: Job, *, stop: threading.Event, started: Callable[[int], None]) -> Outcome:
        started(1)
        with guard:
            active.append(job.name)
            most[0] = max(most[0], len(active))
        if job.name == CELLS[0]:
            go_on.wait(30)
        elif stop.wait(30):
            stopped.append(job.name)
        with guard:
            active.remove(job.name)
        return Outcome(job.name, "stopped" if stop.is_set() else "done")

    monkeypatch.setattr("scantly.benchmark.local.run_in_process", cell)
    pool = LocalPool(2)
    outcomes = pool.run([grid._job(cell, 1, None) for cell in grid.cells])
    threading.Timer(0.2, go_on.set).start()
    assert next(outcomes).name == CELLS[0]
    assert pool.running() == [CELLS[1]]
    outcomes.close()
    assert most == [2]
    assert stopped == [CELLS[1]]  # and the third was never begun
    assert pool.running() == []


def test_time_left_by_cells_of_the_same_row(grid: Grid) -> None:
    clock = grid_module._Clock({name: ("phantom", name.split("/")[1].split("-")[0]) for name in CELLS}, {})
    assert clock.left(CELLS, 1) is None
    clock.note(Outcome(CELLS[0], "done", cost={"seconds": 10.0}))
    assert clock.left(CELLS[1:], 1) == 30  # of the others nothing better is known
    clock.note(Outcome(CELLS[1], "done", cost={"seconds": 2.0}, attempts=({"seconds": 3.0}, {"lost": "SIGKILL"})))
    clock.note(Outcome(CELLS[3], "failed"))
    assert clock.left([CELLS[2], CELLS[3]], 2) == (10 + 3) / 2
    grid.work(Here(pretend), threads=1, quiet=True)
    assert grid.known_seconds() == {("phantom", "supervised"): 3.0, ("phantom", "gated"): 3.0}


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3599.7, "1 h 0 min"), (90_000, "25 h 0 min")]
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_stopped_by_ctrl_c_then_killed_and_the_same_in_the_end(
    spec: Path, gate: Path, tmp_path: Path, undisturbed
) -> None:
    """By processes and the command line: the second cell waits at the gate, two are not begun."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "scantly", "benchmark", str(spec), "--out", str(out), "--threads", "1"]
    log = out / "logs" / f"{CELLS[1]}.log"

    @contextmanager
    def start() -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    with start() as process:
        waiting(gate)
        kill(process.pid, signal.SIGINT)
        wait_until(lambda: "stopping after this iteration" in log.read_text())
        gate.unlink()
        printed, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert printed == ""
    assert "Traceback" not in said
    assert said.splitlines()[-1] == (
        "scantly: stopped with 1 of 4 cells done; the same command goes on, inside a cell from its last checkpoint if "
        "it has one."
    )
    assert names(opened(spec, out).state().done) == CELLS[:1]
    before = times(out / "cells" / CELLS[0])

    gate.touch()
    with start() as process:
        waiting(gate)
        kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=300)
    gate.unlink()  # the orphan goes on to the end of its iteration
    state = opened(spec, out).work(Here(run_job), threads=1, quiet=True)
    assert names(state.done) == CELLS
    assert log.read_text().count("resuming after iteration 8 of 20") == 1
    assert times(out / "cells" / CELLS[0]) == before
    for name in CELLS:
        assert results(out / "cells" / name) == undisturbed[name], name
    began = read_json(out / "outcomes" / f"{CELLS[1]}.json")["attempts"][-1]["began"]
    assert began == 9  # after the iteration in which its parent died


def test_a_cell_is_the_same_in_every_benchmark(grid: Grid, phantom: Path, tmp_path: Path) -> None:
    alone = opened(write_spec(tmp_path / "alone.yaml", phantom), tmp_path / "elsewhere")
    assert alone._digests() == {CELLS[0]: grid._digests()[CELLS[0]]}
