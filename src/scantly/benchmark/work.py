"""One cell, in a process of its own: trained from where it stopped, evaluated, and its outcome told.

The parent writes the job as one line of JSON to standard input and keeps the pipe open; when it closes, because the
parent asked or died, the process stops at the next iteration with a checkpoint. The outcome is one line of JSON on
standard output, so that it is told even where the disk is full.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from scantly.training.config import RunConfig
    from scantly.training.run import Run

__all__ = ["Job", "Outcome", "State", "run_in_process", "run_job"]

State = Literal["done", "failed", "stopped"]
Kind = Literal["", "user", "fault", "lost", "disk"]
_TOLD = "SCANTLY-OUTCOME "
#: A process that was killed (for its memory, by a scheduler) is started again so often.
_ATTEMPTS = 3
#: For a worker of an earlier start to end; a file server gives up the lock of a lost machine after 90 seconds.
_BUSY_SECONDS = 120.0
_LISTEN_SECONDS = 10.0
_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
#: glibc's variables for what ``scantly.cli.allocator`` sets in a process of the command line, and why not to set them.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
_USERS_ALLOCATOR = ("GLIBC_TUNABLES", "LD_PRELOAD", *_KEEP_FREED_MEMORY)


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes:
        name: The cell.
        folder: Its run folder.
        config: Its configuration, plain data.
        split: Cases to evaluate.
        threads: Threads of PyTorch; 0: as PyTorch chooses.
        kind: ``train``, or ``nnunetv2``: nnU-Net itself on the configuration's labeled cases.
        remote: Address under which the run folder is kept, see :mod:`scantly.benchmark.storage`; ``None``: in
            ``folder`` alone. Where there is one, each machine has a folder of its own instead of ``folder``.
        log: File that gets the worker's messages.
    """

    name: str
    folder: str
    config: Mapping[str, Any]
    split: str
    threads: int = 1
    kind: Literal["train", "nnunetv2"] = "train"
    remote: str | None = None
    log: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a cell.

    Attributes:
        name: The cell.
        state: ``done``; ``failed``, with its reason; ``stopped``: to be continued.
        reason: One sentence.
        kind: Of a failure: ``user`` (can be mended), ``fault`` (ours), ``lost`` (the process was killed),
            ``disk`` (full).
        attempts: One entry per start that told its end: ``host``, ``device``, ``began`` (iteration it went on from),
            ``seconds``, ``cpu_seconds`` (nnU-Net's processes included), ``peak_bytes`` (of memory, on a GPU of its
            memory, of nnU-Net that of its largest process); of one that was killed ``host`` and ``lost`` (the signal).
        cost: ``seconds`` (training, all attempts, and evaluation), ``seconds_per_iteration``, ``parameters`` (of all
            networks in training) and ``predicting`` (of the one that predicts), ``None`` where unknown,
            ``model_bytes``.
    """

    name: str
    state: State
    reason: str = ""
    kind: Kind = ""
    attempts: tuple[Mapping[str, Any], ...] = ()
    cost: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"attempts": [dict(attempt) for attempt in self.attempts]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """Inverse of :meth:`to_dict`."""
        return cls(**{**values, "attempts": tuple(values["attempts"])})


def run_in_process(job: Job, *, stop: threading.Event, started: Callable[[int], None] | None = None) -> Outcome:
    """Run a job in a process of its own, again if it is killed or stopped by anybody but the caller.

    Args:
        job: The job.
        stop: Ends it: the process writes a checkpoint at the next iteration.
        started: Is told the process number of every attempt.
    """
    earlier: list[Mapping[str, Any]] = []
    status = 0
    for _ in range(_ATTEMPTS):
        outcome, status = _attempt(job, stop, started)
        if outcome is not None and (outcome.state != "stopped" or stop.is_set()):
            return replace(outcome, attempts=(*earlier, *outcome.attempts))
        earlier += outcome.attempts if outcome else [{"host": platform.node(), "lost": _death(status)}]
        if stop.is_set():
            return Outcome(job.name, "stopped", attempts=tuple(earlier))
    cure = "lower the memory it needs, or see its log" if status == -signal.SIGKILL else "see its log"
    reason = f"its process died {_ATTEMPTS} times ({_death(status)}); {cure}."
    return Outcome(job.name, "failed", reason, "lost", tuple(earlier))


def _death(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _attempt(job: Job, stop: threading.Event, started: Callable[[int], None] | None) -> tuple[Outcome | None, int]:
    log = Path(job.log) if job.log else Path(os.devnull)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as messages:
        process = subprocess.Popen(
            [sys.executable, "-m", "scantly.benchmark.work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=messages,
            env=_environment(job.threads),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then asks by closing the pipe
        )
    assert process.stdin is not None
    assert process.stdout is not None
    if started is not None:
        started(process.pid)
    told: list[Outcome] = []
    reader = threading.Thread(target=_listen, args=(process.stdout, told), daemon=True)
    reader.start()
    try:
        with suppress(BrokenPipeError):  # it died before it read its job
            process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            process.stdin.flush()
        while process.poll() is None and not stop.wait(0.1):
            pass
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()
        reader.join(_LISTEN_SECONDS)  # processes that a killed worker had started may hold the pipe open
    return (told[-1] if told else None), process.returncode


def _environment(threads: int) -> dict[str, str]:
    environment = dict(os.environ)
    if threads:
        environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(threads)
    if not any(name in environment for name in _USERS_ALLOCATOR):
        environment |= _KEEP_FREED_MEMORY
    return environment


def _listen(stream: IO[bytes], told: list[Outcome]) -> None:
    with stream:
        for line in stream:
            if line.startswith(_TOLD.encode()):
                told.append(Outcome.from_dict(json.loads(line[len(_TOLD) :])))


def run_job(job: Job) -> Outcome:
    """Train from the last checkpoint, or from the start, then evaluate; errors become the outcome."""
    from scantly.training.engine import RunInterruptedError

    begun, worked = time.monotonic(), _cpu_seconds()
    attempt: dict[str, Any] = {"host": platform.node()}
    state: State = "failed"
    reason = ""
    kind: Kind = ""
    cost: dict[str, Any] = {}
    try:
        cost = _train_and_evaluate(job, attempt)
        state = "done"
    except RunInterruptedError:
        state = "stopped"
    except Exception as error:  # noqa: BLE001 (a method of another package raises what it likes; its cell has failed)
        traceback.print_exc()
        reason, kind = _reason(error)
    attempt |= {
        "seconds": round(time.monotonic() - begun, 1),
        "cpu_seconds": round(_cpu_seconds() - worked, 1),
        "peak_bytes": _peak_memory(),
    }
    return Outcome(job.name, state, reason, kind, (attempt,), cost)


def _reason(error: BaseException) -> tuple[str, Kind]:
    """The sentence, and what kind of failure it is."""
    from scantly.errors import ScantlyError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and _says_full(cause):
            return str(error), "disk"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ScantlyError):
        return str(error), "user"
    text = " ".join(str(error).split()) or "no message"
    return f"a fault of Scantly: {type(error).__name__}: {text}; its log has the traceback.", "fault"


def _says_full(error: OSError) -> bool:
    # torch's writer tells no number, and nothing but a full disk stops it
    return error.errno in {errno.ENOSPC, errno.EDQUOT} or (error.errno is None and "inline_container" in str(error))


def _train_and_evaluate(job: Job, attempt: dict[str, Any]) -> dict[str, Any]:
    import torch

    from scantly.benchmark.storage import Remote, scratch_folder
    from scantly.settings import parse
    from scantly.training.config import RunConfig
    from scantly.training.run import Run

    if job.threads:
        torch.set_num_threads(job.threads)
    config = parse(RunConfig, job.config, where=job.name)
    run = Run(scratch_folder(job.remote) if job.remote else Path(job.folder))
    run.folder.mkdir(parents=True, exist_ok=True)
    _wait_for_the_lock(run)
    with Remote(job.remote).mirrored(run.folder) if job.remote else nullcontext():
        if job.kind == "nnunetv2":
            from scantly.benchmark.nnunet import train_nnunet
            from scantly.inference.predict import select_device

            device = select_device(config.training.device).type
            cost = train_nnunet(run.folder, config, job.split, device=device)
        else:
            cost = _finish(run, config, job.split, attempt)
    if job.remote:  # else the disks of the nodes would fill
        shutil.rmtree(run.folder, ignore_errors=True)
    return cost


def _finish(run: Run, config: RunConfig, split: str, attempt: dict[str, Any]) -> dict[str, Any]:
    """What is missing of a cell's training and evaluation; then what it cost."""
    from scantly.training.run import Run as RunFolder
    from scantly.training.train import build_method, train_config

    attempt["began"] = config.training.steps if run.finished else _checkpointed(run)
    train_config(config, run.folder, resume=True)
    run, begun = RunFolder.open(run.folder), time.monotonic()
    attempt["device"] = run.environment.get("device_name", "")
    if not (run.folder / "evaluation" / f"{split}.json").is_file():
        run.evaluate(split, device=config.training.device)
    method = build_method(config)
    seconds = run.timing()[0]
    return {
        "seconds": round(seconds * config.training.steps + time.monotonic() - begun, 1),
        "seconds_per_iteration": seconds,
        "parameters": sum(p.numel() for p in method.parameters() if p.requires_grad),
        "predicting": sum(p.numel() for p in method.predictor.parameters()),
        "model_bytes": run.model_path.stat().st_size,
    }


def _checkpointed(run: Run) -> int:
    """Iteration of the last checkpoint; 0 where there is none, or none that can be read, as the training will tell."""
    import torch

    try:
        state = torch.load(run.last_checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
        return 0
    return int(state["iteration"])


def _wait_for_the_lock(run: Any) -> None:
    """The worker of a benchmark that was killed stops within an iteration; until then it holds the folder."""
    from scantly.errors import RunError

    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            with run.locked():
                return
        except RunError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _peak_memory() -> int:
    """Bytes: of the GPU where this process used one, else of this process, or of the largest that it has waited for."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return max(resource.getrusage(who).ru_maxrss for who in _WHO) * unit


def _cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    used = [resource.getrusage(who) for who in _WHO]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _stop_with_the_parent(signals: int) -> None:
    # Not sys.stdin: its lock would be held in processes that are forked meanwhile, which close it.
    while os.read(0, 4096):
        pass
    with suppress(BlockingIOError):
        if signal.SIGTERM in os.read(signals, 4096):  # a scheduler told both: a second signal would end it at once
            time.sleep(_BUSY_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Read the job, do it, tell the outcome."""
    job = Job(**json.loads(sys.stdin.buffer.readline()))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("scantly")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    signals, written = os.pipe()
    for end in (signals, written):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    threading.Thread(target=_stop_with_the_parent, args=(signals,), daemon=True).start()
    outcome = run_job(job)
    try:
        sys.stdout.write(f"\n{_TOLD}{json.dumps(outcome.to_dict())}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the parent is gone; the interpreter flushes again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
