"""Two processes train one run: the same on both, exact after kills, and none is left hanging."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from scantly.errors import ConfigError, DatasetError, PeerError, ScantlyError
from scantly.settings import merge
from scantly.training import engine
from scantly.training import train as train_module
from scantly.training.checkpoint import load_checkpoint
from scantly.training.resolve import resolve
from scantly.training.run import Run
from scantly.training.train import train_config

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["scantly.training.train"])

#: Two processes, as torchrun would start them.
TWO: dict[str, Any] = {"training": {"devices": 2, "seed": 3}}


def _rank(rank: int, port: int, config: Any, out: Path, at: dict[tuple[int, int], str], notes: Path) -> None:
    """One process of two; ``at`` says what happens to which rank before which iteration, -1: the preparation."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    step = engine.Engine._step

    def stepping(self: Any, *args: Any) -> Any:
        event = at.get((rank, self.iteration))
        if event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif event == "fault":
            raise DatasetError("the file is damaged; copy it again.")
        elif event == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif event == "diverge":
            with torch.no_grad():
                next(self.method.parameters()).fill_(float("nan"))
        return step(self, *args)

    def preparing(*args: Any, **settings: Any) -> Any:
        if at.get((rank, -1)) == "fault":
            raise DatasetError("the scan is damaged; copy it again.")
        return prepare(*args, **settings)

    prepare, train_module.prepare_store = train_module.prepare_store, preparing
    engine.Engine._step = stepping  # type: ignore[method-assign]
    try:
        train_config(config, out, resume=True, quiet=True)
    except ScantlyError as error:
        (notes / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        sys.exit(2)


def train_on_two(
    config: Any, out: Path, at: dict[tuple[int, int], str] | None = None
) -> tuple[list[int | None], list[str]]:
    """Exit status and sentence of both ranks."""
    notes = out.parent / "notes"
    notes.mkdir(exist_ok=True)
    for old in notes.iterdir():
        old.unlink()
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=_rank, args=(rank, port, config, out, at or {}, notes)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process hangs"
    sentences = [(notes / f"{rank}.txt").read_text() if (notes / f"{rank}.txt").is_file() else "" for rank in range(2)]
    return [process.exitcode for process in processes], sentences


def configuration(cohort: Path, tiny: dict[str, Any], tmp_path: Path, name: str, **sections: Any) -> Any:
    return resolve(
        cohort,
        flags={"method": name, "labeled": 2, "store": str(tmp_path / "store")},
        sets=merge(merge(tiny, TWO), sections),
    )


def assert_same(out: Path, other: Path) -> None:
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    ours, theirs = (load_checkpoint(folder / "checkpoints/last.ckpt") for folder in (out, other))
    assert ours["method"].keys() == theirs["method"].keys()
    for name, value in theirs["method"].items():
        assert torch.equal(ours["method"][name], value), name
    for name, value in theirs["generators"].items():
        assert torch.equal(ours["generators"][name], value), name
    logs = [Run.open(folder).log() for folder in (out, other)]
    timeless = [log[~log["name"].str.startswith("time/")].reset_index(drop=True) for log in logs]
    pd.testing.assert_frame_equal(*timeless)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("supervised", {}),
        ("mean_teacher", {}),
        ("pseudo_label", {"form": "rounds", "rounds": 2}),
        ("arco", {"dense_channels": 8, "anchors": 16, "negatives_per_anchor": 8, "negatives": "rank"}),
    ],
)
def test_killed_stopped_and_resumed_on_two_ranks_is_bit_identical(cohort, tiny, tmp_path, method, settings):
    config = configuration(cohort, tiny, tmp_path, method, method=settings, data={"workers": 0})
    undisturbed = tmp_path / "undisturbed"
    assert train_on_two(config, undisturbed) == ([0, 0], ["", ""])
    assert load_checkpoint(undisturbed / "checkpoints/last.ckpt")["generators"]["method"].shape[0] == 2
    out = tmp_path / "killed"
    for event in ({(0, 1): "kill"}, {(1, 5): "kill"}, {(0, 7): "stop"}, {(1, 8): "stop"}, {(0, 10): "kill"}):
        statuses, _ = train_on_two(config, out, event)
        assert 0 not in statuses
        assert not Run.open(out).finished
    assert load_checkpoint(out / "checkpoints/last.ckpt")["iteration"] == 9
    assert train_on_two(config, out) == ([0, 0], ["", ""])
    assert_same(out, undisturbed)


def test_a_killed_rank_ends_the_other_with_a_reason(cohort, tiny, tmp_path):
    config = configuration(cohort, tiny, tmp_path, "supervised")
    statuses, sentences = train_on_two(config, tmp_path / "run", {(1, 5): "kill"})
    assert statuses == [2, -signal.SIGKILL]
    assert "another of the 2 processes of this training ended without a word" in sentences[0]
    assert "--resume" in sentences[0]
    statuses, sentences = train_on_two(config, tmp_path / "run", {(0, 8): "kill"})
    assert statuses == [-signal.SIGKILL, 2]  # and with it whoever keeps the notes
    assert "the first process of this training has ended; if it does not say why itself it was killed" in sentences[1]


def test_a_fault_of_one_rank_is_told_by_that_one_alone(cohort, tiny, tmp_path):
    config = configuration(cohort, tiny, tmp_path, "supervised")
    statuses, sentences = train_on_two(config, tmp_path / "run", {(1, 4): "fault"})
    assert statuses == [2, 2]
    assert sentences[1] == "DatasetError: the file is damaged; copy it again."
    assert sentences[0].startswith(PeerError.__name__)


def test_a_fault_of_the_preparation_is_told_by_the_first_rank_and_the_other_does_not_wait(cohort, tiny, tmp_path):
    config = configuration(cohort, tiny, tmp_path, "supervised")
    statuses, sentences = train_on_two(config, tmp_path / "run", {(0, -1): "fault"})
    assert statuses == [2, 2]
    assert sentences[0] == "DatasetError: the scan is damaged; copy it again."
    assert sentences[1].startswith((PeerError.__name__, "RunError: the first process of this training has ended; if"))


def test_a_fault_of_both_is_told_once(cohort, tiny, tmp_path):
    config = configuration(cohort, tiny, tmp_path, "supervised")
    out = tmp_path / "run"
    statuses, sentences = train_on_two(config, out, {(0, 4): "diverge", (1, 4): "diverge"})
    assert statuses == [2, 2]
    told = [sentence for sentence in sentences if "iteration 5; lower training.lr" in sentence]
    assert len(told) == 1
    assert load_checkpoint(out / "checkpoints/last.ckpt")["iteration"] == 3


def test_both_stop_after_the_same_iteration_when_one_is_asked_to(cohort, tiny, tmp_path):
    config = configuration(cohort, tiny, tmp_path, "mean_teacher")
    out = tmp_path / "run"
    statuses, sentences = train_on_two(config, out, {(1, 6): "stop"})
    assert statuses == [2, 2]
    told = [sentence for sentence in sentences if sentence.startswith("RunInterruptedError")]
    assert told == [
        "RunInterruptedError: stopped after iteration 7 of 12; a checkpoint was written, continue with --resume."
    ]
    assert load_checkpoint(out / "checkpoints/last.ckpt")["iteration"] == 7


def test_ranks_draw_their_own_rows_and_share_validation(cohort, tiny, tmp_path):
    """With validation cases shared, the log has what one process finds with the same weights."""
    sets = merge(tiny, {"plan": {"labeled_batch_size": 1, "unlabeled_batch_size": 1}})
    config = configuration(cohort, sets, tmp_path, "mean_teacher", evaluation={"selection": "last"})
    out = tmp_path / "run"
    assert train_on_two(config, out)[0] == [0, 0]
    run = Run.open(out)
    assert run.environment["world_size"] == 2
    log = run.log()
    last = log[(log["name"] == "val/dice") & (log["iteration"] == 12)]["value"].item()
    assert run.evaluate("val", device="cpu").summary("val")["overall"]["dice"]["mean"] == pytest.approx(last, abs=1e-6)


def test_another_number_of_processes_is_refused(cohort, tiny, tmp_path, monkeypatch):
    config = configuration(cohort, tiny, tmp_path, "supervised")
    out = tmp_path / "run"
    assert train_on_two(config, out, {(0, 7): "stop"})[0] == [2, 2]
    single = config.model_copy(update={"training": config.training.model_copy(update={"devices": 1})})
    with pytest.raises(ScantlyError, match=r"training\.devices: 2 -> 1"):
        train_config(single, out, resume=True, quiet=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"torchrun started 2 processes, but training\.devices is 1"):
        train_config(single, tmp_path / "other", quiet=True)
    assert not (tmp_path / "other").exists()


def test_a_compiled_training_on_several_devices_is_refused(cohort, tiny):
    with pytest.raises(ConfigError, match="compile is for one device"):
        resolve(cohort, flags={"method": "supervised", "labeled": 2, "devices": 2}, sets=["training.compile=true"])


WORDS = (
    *("--labeled", "2", "--device", "cpu", "--devices", "2", "--size", "32", "32", "--steps", "6", "--set"),
    *("network.arguments.widths=[4,8]", "network.arguments.dropout=[0,0]", "training.checkpoint_every=2"),
    *("plan.labeled_batch_size=2", "plan.unlabeled_batch_size=2"),
)


def by_torchrun(*words: str | Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*start, "-m", "scantly", *map(str, words)]


def command(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)


def test_torchrun_and_the_command_alone_train_the_same(cohort, tmp_path):
    """``--devices 2`` under torchrun, and without it, where the command starts the second process itself."""
    words = ("train", cohort, "--method", "mean_teacher", *WORDS, "--store", tmp_path / "store")
    one = command(by_torchrun(*words[:-4], *words[-4:], "--out", tmp_path / "one"))
    assert one.returncode == 0, one.stderr
    assert one.stdout.count("trained mean_teacher, 6 iterations") == 1
    assert "distributed" not in one.stderr
    other = command([sys.executable, "-m", "scantly", *map(str, words), "--out", str(tmp_path / "other")])
    assert other.returncode == 0, other.stderr
    assert other.stdout.count("trained mean_teacher, 6 iterations") == 1
    assert_same(tmp_path / "one", tmp_path / "other")


def test_bad_input_under_torchrun_is_told_once(cohort, tmp_path):
    outcome = command(by_torchrun("train", cohort, "--method", "mean_techer", *WORDS, "--out", tmp_path / "run"))
    assert outcome.returncode != 0
    assert outcome.stderr.count("unknown method 'mean_techer'") == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_for_torchrun_writes_a_checkpoint(cohort, tmp_path):
    words = by_torchrun(
        *("train", cohort, "--method", "supervised", *WORDS, "--out", tmp_path / "run", "--steps", "100000"),
    )
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        log = tmp_path / "run" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 300
        while not log.is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count("a checkpoint was written, continue with --resume") == 1
    assert load_checkpoint(log)["iteration"] % 2 in (0, 1)
