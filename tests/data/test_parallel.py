"""Worker processes: results and errors of a loop, however many there are and however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from scantly.data import parallel
from scantly.data.parallel import available_memory, in_order, worker_count
from scantly.errors import DatasetError, RunError


def late_square(number: int) -> int:
    time.sleep(0.03 * (3 - number % 4))
    return number**2


def fails_from_two_on(number: int) -> int:
    if number < 2:
        return number
    time.sleep(0.2 if number == 2 else 0)
    raise DatasetError(f"case {number} is bad.")


def write_pid(folder: Path) -> int:
    (folder / str(os.getpid())).touch()
    time.sleep(0.05)
    return os.getpid()


def dies(number: int) -> int:
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def wrong(number: int) -> float:
    return 1 / number


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_results_come_in_order(workers: int) -> None:
    assert list(in_order(late_square, range(7), workers)) == [n**2 for n in range(7)]
    assert list(in_order(late_square, [], workers)) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_the_error_is_that_of_the_first_bad_item(workers: int) -> None:
    results = in_order(fails_from_two_on, range(6), workers)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DatasetError, match=r"^case 2 is bad\.$"):
        next(results)


def test_a_fault_of_ours_stays_one() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(wrong, [1, 0, 2], 2))


def test_a_killed_worker_is_told_in_a_sentence() -> None:
    with pytest.raises(RunError, match=r"^a process that prepares cases was killed[^\n]*start again[^\n]*$"):
        list(in_order(dies, range(4), 2))


def test_closing_ends_the_workers_and_begins_nothing_more(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(50)]
    for folder in folders:
        folder.mkdir()
    with closing(in_order(write_pid, folders, 2)) as results:
        first = next(results)
    begun = sum(any(folder.iterdir()) for folder in folders)
    assert begun < 20
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


SCRIPT = """
import signal, sys, time
from pathlib import Path
from scantly.data.parallel import in_order

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

def work(number):
    import os
    (Path(sys.argv[1]) / str(os.getpid())).touch()
    time.sleep(0.2)
    return number

for result in in_order(work, range(1000), 2):
    pass
"""


def started(tmp_path: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A process with two workers, and the numbers of these."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "pids").mkdir()
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py", tmp_path / "pids"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(6000):
        pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
        if len(pids) == 2:
            return process, pids
        time.sleep(0.05)
    raise AssertionError("the workers did not start")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    process, pids = started(tmp_path)
    process.kill()
    process.wait()
    for _ in range(6000):
        if not any(alive(pid) for pid in pids):
            break
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals of a terminal")
def test_control_c_is_told_by_the_parent_alone(tmp_path: Path) -> None:
    process, pids = started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=300)
    assert errors.count("KeyboardInterrupt") == 1
    assert "Process" not in errors
    assert not any(alive(pid) for pid in pids)


def test_as_many_workers_as_cores_jobs_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "_FORKS", True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(parallel, "available_memory", lambda: 10_000)
    assert worker_count(None, 100) == 8
    assert worker_count(None, 3) == 3
    assert worker_count(None, 0) == 1
    assert worker_count(None, 100, bytes_per_job=2_000) == 3  # six tenths of the memory
    assert worker_count(None, 100, bytes_per_job=50_000) == 1
    assert worker_count(4, 100, bytes_per_job=50_000) == 4  # as asked
    assert worker_count(4, 2) == 2
    assert worker_count(0, 2) == 1
    monkeypatch.setattr(parallel, "available_memory", lambda: None)
    assert worker_count(None, 100, bytes_per_job=2_000) == 8
    monkeypatch.setattr(parallel, "_FORKS", False)
    assert worker_count(None, 100) == 1


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux tells")
def test_free_memory_is_known() -> None:
    free = available_memory()
    assert free is not None
    assert 2**20 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
