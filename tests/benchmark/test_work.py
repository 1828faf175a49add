"""One cell in a process of its own: what comes of faults, kills and full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from grid_helpers import STEPS, ended, jobs_of, kill, results, times, wait_until, waiting

from scantly.benchmark import work
from scantly.benchmark.work import Job, Outcome, run_in_process, run_job
from scantly.training.run import Run

GATED = "phantom/gated-2-seed1"
MINUTE = 60.0


@pytest.fixture
def job(gated_spec, gated, tmp_path: Path) -> Job:
    """The cell whose method waits at the gate."""
    return next(job for job in jobs_of(gated_spec(), tmp_path / "out") if job.name == GATED)


def with_fault(job: Job, fault: str) -> Job:
    return replace(job, config={**job.config, "method": {**job.config["method"], "fault": fault}})


def iteration_of(folder: str | Path) -> int:
    """Of the last checkpoint."""
    return int(torch.load(Path(folder) / "checkpoints" / "last.ckpt", weights_only=True)["iteration"])


class InBackground(threading.Thread):
    """A job in a process of its own, while the test does something to it."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.job, self.stop = job, threading.Event()
        self.numbers: list[int] = []
        self.outcome: Outcome | None = None
        self.start()

    def run(self) -> None:
        self.outcome = run_in_process(self.job, stop=self.stop, started=self.numbers.append)

    def ended(self) -> Outcome:
        """Its outcome, when it has one."""
        self.join(3 * MINUTE)
        assert self.outcome is not None
        return self.outcome


def test_a_cell_that_is_left_alone(job: Job, undisturbed) -> None:
    outcome = run_job(job)
    assert (outcome.name, outcome.state, outcome.reason, outcome.kind) == (GATED, "done", "", "")
    assert results(Path(job.folder)) == undisturbed[GATED]
    (attempt,) = outcome.attempts
    assert attempt["began"] == 0
    assert attempt["seconds"] > 0
    assert attempt["cpu_seconds"] > 0
    assert attempt["peak_bytes"] > 10**8
    assert attempt["host"]
    assert attempt["device"]
    cost = outcome.cost
    assert cost["seconds"] > cost["seconds_per_iteration"] * STEPS * 0.9
    assert cost["parameters"] == cost["predicting"] > 1000
    assert cost["model_bytes"] == (Path(job.folder) / "model.safetensors").stat().st_size
    assert Outcome.from_dict(json.loads(json.dumps(outcome.to_dict()))) == replace(outcome, cost=dict(cost))

    before = times(Path(job.folder))
    again = run_job(job)
    assert again.state == "done"
    assert again.attempts[0]["began"] == STEPS
    assert again.cost["parameters"] == cost["parameters"]
    assert times(Path(job.folder)) == before


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("error", "fault", "AttributeError: the method is broken; its log has the traceback."),
        ("loss", "user", "loss/supervised is "),
        ("full", "disk", os.strerror(errno.ENOSPC)),
    ],
)
def test_a_failure_is_told_with_its_reason(job: Job, fault: str, kind: str, said: str) -> None:
    outcome = run_job(with_fault(job, fault))
    assert (outcome.state, outcome.kind) == ("failed", kind)
    assert said in outcome.reason
    assert "\n" not in outcome.reason
    assert iteration_of(job.folder) == 5
    assert not Run(Path(job.folder)).finished


def test_a_fault_of_the_user_is_told_as_the_command_line_tells_it(job: Job, tmp_path: Path) -> None:
    data = {**job.config["data"], "dataset": str(tmp_path / "gone")}
    outcome = run_job(replace(job, config={**job.config, "data": data}))
    assert (outcome.state, outcome.kind) == ("failed", "user")
    assert str(tmp_path / "gone") in outcome.reason


@pytest.mark.parametrize("torch_tells_it", [True, False])
def test_a_disk_that_fills_while_a_checkpoint_is_written(
    job: Job, undisturbed, monkeypatch: pytest.MonkeyPatch, torch_tells_it: bool
) -> None:
    save = torch.save

    def full(state: Any, path: Any) -> None:
        if state["iteration"] == 10 and "method" in state:
            if torch_tells_it:  # word by word what it says on a full disk: no number of an error
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, path)

    with monkeypatch.context() as patch:
        patch.setattr("scantly.training.checkpoint.torch.save", full)
        outcome = run_job(job)
    assert (outcome.state, outcome.kind) == ("failed", "disk")
    assert "cannot write" in outcome.reason
    assert iteration_of(job.folder) == 5
    assert run_job(job).state == "done"
    assert results(Path(job.folder)) == undisturbed[GATED]


def test_the_run_folder_of_another_configuration_is_refused(job: Job) -> None:
    assert run_job(job).state == "done"
    before = times(Path(job.folder))
    outcome = run_job(replace(job, config={**job.config, "training": {**job.config["training"], "lr": 0.5}}))
    assert (outcome.state, outcome.kind) == ("failed", "user")
    assert "training.lr: 0.01 -> 0.5" in outcome.reason
    assert times(Path(job.folder)) == before


def test_an_evaluation_that_was_not_reached_is_made_up_for(job: Job, undisturbed, monkeypatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "evaluate", killed)
        run_job(job)
    assert Run(Path(job.folder)).finished
    model = times(Path(job.folder))["model.safetensors"]
    assert run_job(job).state == "done"
    assert times(Path(job.folder))["model.safetensors"] == model
    assert results(Path(job.folder)) == undisturbed[GATED]


def test_a_dying_worker_is_waited_for(job: Job, undisturbed, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(job.folder)
    folder.mkdir(parents=True)
    lock = filelock.FileLock(folder / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(1.0, lock.release).start()
    assert run_job(job).state == "done"
    assert results(folder) == undisturbed[GATED]
    monkeypatch.setattr(work, "_BUSY_SECONDS", 0.1)
    with filelock.FileLock(folder / ".lock"):
        outcome = run_job(job)
    assert (outcome.state, outcome.kind) == ("failed", "user")
    assert "another process is training" in outcome.reason


def test_a_worker_that_is_killed_is_started_again_and_goes_on(job: Job, gate: Path, undisturbed) -> None:
    worker = InBackground(job)
    (number,) = waiting(gate)
    assert worker.numbers == [number]
    kill(number, signal.SIGKILL)
    gate.unlink()
    outcome = worker.ended()
    assert outcome.state == "done"
    assert len(worker.numbers) == 2
    lost, last = outcome.attempts
    assert lost["lost"] == "SIGKILL"
    assert last["began"] == 5
    assert "resuming after iteration 5 of 20" in Path(str(job.log)).read_text()
    assert results(Path(job.folder)) == undisturbed[GATED]


def test_a_worker_that_is_stopped_writes_a_checkpoint(job: Job, gate: Path, undisturbed) -> None:
    """Also where a scheduler sends SIGTERM to parent and worker: the worker hears of it twice."""
    worker = InBackground(job)
    (number,) = waiting(gate)
    kill(number, signal.SIGTERM)
    log = Path(str(job.log))
    wait_until(lambda: "stopping after this iteration" in log.read_text())
    worker.stop.set()
    time.sleep(0.5)  # the parent looks ten times a second
    gate.unlink()
    outcome = worker.ended()
    assert (outcome.state, outcome.reason) == ("stopped", "")
    assert worker.numbers == [number]
    assert ended(number)
    assert iteration_of(job.folder) == 8
    resumed = run_job(job)
    assert resumed.attempts[0]["began"] == 8
    assert results(Path(job.folder)) == undisturbed[GATED]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch):
    """Have workers end as told, one after the other; ``None`` for an outcome: it was killed."""

    def plan(*ends: tuple[Outcome | None, int]) -> list[int]:
        left, begun = list(ends), []

        def attempt(*_: Any) -> tuple[Outcome | None, int]:
            begun.append(len(begun))
            return left.pop(0)

        monkeypatch.setattr(work, "_attempt", attempt)
        return begun

    return plan


def test_a_worker_that_dies_again_and_again_is_given_up(job: Job, attempts) -> None:
    begun = attempts((None, -9), (None, 1), (None, -9))
    outcome = run_in_process(job, stop=threading.Event())
    assert len(begun) == 3
    assert (outcome.state, outcome.kind) == ("failed", "lost")
    assert outcome.reason.startswith("its process died 3 times (SIGKILL); lower the memory")
    assert [attempt["lost"] for attempt in outcome.attempts] == ["SIGKILL", "exit status 1", "SIGKILL"]


def test_a_worker_that_somebody_else_stopped_is_started_again(job: Job, attempts) -> None:
    stopped = Outcome(GATED, "stopped", attempts=({"began": 5},))
    begun = attempts((stopped, 0), (Outcome(GATED, "done", attempts=({"began": 8},)), 0))
    outcome = run_in_process(job, stop=threading.Event())
    assert len(begun) == 2
    assert outcome.state == "done"
    assert [attempt["began"] for attempt in outcome.attempts] == [5, 8]


@pytest.mark.parametrize("end", [(None, -15), (Outcome(GATED, "stopped"), 0)])
def test_a_worker_that_the_caller_stopped_is_not_started_again(job: Job, attempts, end) -> None:
    begun = attempts(end)
    stop = threading.Event()
    stop.set()
    assert run_in_process(job, stop=stop).state == "stopped"
    assert len(begun) == 1


def test_threads_and_memory_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    environment = work._environment(3)
    assert (environment["OMP_NUM_THREADS"], environment["MKL_NUM_THREADS"]) == ("3", "3")
    assert environment["MALLOC_TRIM_THRESHOLD_"] == environment["MALLOC_MMAP_THRESHOLD_"] == str(2**30)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "7")
    environment = work._environment(0)
    assert environment["OMP_NUM_THREADS"] == "5"
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "7"
    assert "MALLOC_MMAP_THRESHOLD_" not in environment


def test_what_a_worker_tells_and_what_a_method_prints() -> None:
    reading, writing = os.pipe()
    told: list[Outcome] = []
    with os.fdopen(writing, "wb") as stream:
        line = json.dumps(Outcome(GATED, "done", cost={"seconds": 1.0}).to_dict())
        stream.write(f"a method's own words\nunfinished\n{work._TOLD}{line}\nmore\n".encode())
    work._listen(os.fdopen(reading, "rb"), told)
    assert told == [Outcome(GATED, "done", cost={"seconds": 1.0})]
