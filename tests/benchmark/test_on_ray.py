"""A grid on a real Ray cluster of several nodes on this machine, of which workers and nodes are lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from grid_helpers import ended, install, jobs_of, kill, opened, parent_of, results, wait_until, waiting

from scantly.benchmark import on_ray
from scantly.benchmark.on_ray import RayPool
from scantly.benchmark.run import run_grid
from scantly.errors import ConfigError, RunError

GATED = ["phantom/gated-2-seed1", "phantom/gated-2-seed2"]


@pytest.fixture(scope="module")
def cluster(packages: Path) -> Iterator[Any]:
    """A head without CPUs for cells, and two nodes of one CPU each, where the method ``gated`` is installed."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (it is in the extras ray and dev)")
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # pytest's own is too long for the names of its sockets
    with pytest.MonkeyPatch.context() as patch:
        install(packages, patch)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        cluster = None
        try:
            cluster = started(Cluster, folder)
            yield cluster
        finally:
            ray.shutdown()
            if cluster is not None:
                cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def started(kind: Any, folder: str) -> Any:
    """The cluster. Ray gives a node 30 seconds to start, which a busy machine may exceed: three tries."""
    small = {"num_gpus": 0, "object_store_memory": 80 * 2**20}
    Path("/tmp/ray").mkdir(exist_ok=True)  # Cluster writes its address there, wherever its own folder is
    for last in (False, False, True):
        cluster = kind()
        try:
            cluster.add_node(num_cpus=0, temp_dir=folder, include_dashboard=False, **small)
            for _ in range(2):
                cluster.add_node(num_cpus=1, **small)
            cluster.wait_for_nodes(timeout=120)
        except Exception:
            with suppress(Exception):
                cluster.shutdown()
            if last:
                raise
        else:
            return cluster
    raise AssertionError


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def test_a_worker_and_a_node_are_lost_in_the_middle(
    cluster: Any, gated_spec, gated, gate: Path, tmp_path: Path, undisturbed
) -> None:
    """Both nodes train a cell when one loses its worker and the other itself; what is left of the cluster goes on."""
    spec = gated_spec(methods=[gated_spec.row])
    grid = opened(spec, tmp_path / "out")

    def sabotage() -> None:
        try:
            trainings = waiting(gate, 2)
            workers = [parent_of(number) for number in trainings]
            nodes = {raylet_of(node): node for node in cluster.worker_nodes}
            raylets = [parent_of(number) for number in workers]
            assert sorted(raylets) == sorted(nodes)
            kill(workers[0], signal.SIGKILL)
            cluster.remove_node(nodes[raylets[1]], allow_graceful=False)
            # their parents are gone: Ray ends them, or they are about to stop by themselves
            wait_until(lambda: all(ended(number) or asked_to_stop(number) for number in trainings))
        finally:
            gate.unlink(missing_ok=True)

    def asked_to_stop(number: int) -> bool:
        """Says its log, which is its standard error."""
        with suppress(FileNotFoundError):
            return "stopping after this iteration" in Path(f"/proc/{number}/fd/2").read_text()
        return True

    with ThreadPoolExecutor(1) as saboteur:
        sabotaged = saboteur.submit(sabotage)
        state = run_grid(grid, str(grid.folder), on="ray", address=cluster.address, quiet=True)
        sabotaged.result()
    assert [cell.name for cell in state.done] == GATED
    for name in GATED:
        log = (grid.folder / "logs" / f"{name}.log").read_text()
        (began,) = re.findall(r"resuming after iteration (\d+) of 20", log)
        assert int(began) in {5, 8}  # killed at once, or stopped after the iteration
        assert results(grid.folder / "cells" / name) == undisturbed[name], name
        outcome = grid.outcome(next(cell for cell in grid.cells if cell.name == name))
        assert outcome is not None
        assert [attempt["began"] for attempt in outcome.attempts] == [int(began)]


def test_a_cell_that_no_node_can_hold(cluster: Any) -> None:
    for options, said in (({"cpus": 64}, "64 CPUs and 0 GPUs"), ({"gpus": 1}, "1 CPUs and 1 GPUs")):
        with pytest.raises(RunError) as refused:
            RayPool(cluster.address, **options)
        (sentence,) = str(refused.value).splitlines()
        assert f"no node of the Ray cluster has {said}" in sentence
        assert "--cpus-per-cell" in sentence


def test_cells_at_a_time(cluster: Any) -> None:
    nodes = len(cluster.worker_nodes)
    pool = RayPool(cluster.address)
    wait_until(lambda: pool.processes == nodes)  # a node that was lost counts until Ray has noticed
    assert RayPool(cluster.address, cpus=0.5).processes == 2 * nodes


def test_closing_the_pool_stops_what_runs(cluster: Any, gated_spec, gated, gate: Path, tmp_path: Path) -> None:
    """As Ctrl-C does."""
    jobs = jobs_of(gated_spec(methods=[gated_spec.row], seeds=[1]), tmp_path / "out")
    pool = RayPool(cluster.address)
    outcomes = pool.run(jobs)
    log = Path(str(jobs[0].log))

    def interrupt() -> None:
        try:
            waiting(gate)
            kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: "stopping after this iteration" in log.read_text())
        finally:
            gate.unlink(missing_ok=True)

    with ThreadPoolExecutor(1) as hand:
        pressed = hand.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(outcomes)
        pressed.result()
    assert pool.running() == []
    assert (Path(jobs[0].folder) / "checkpoints" / "last.ckpt").is_file()
    assert not (Path(jobs[0].folder) / "model.safetensors").exists()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken all the while, so that nobody else can answer there; nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_an_address_where_nobody_answers(closed_port: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (it is in the extras ray and dev)")
    address = form.format(closed_port)
    with pytest.raises(RunError, match=f"no Ray cluster answers at {address} "):
        RayPool(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(RunError, match=f"no Ray cluster answers at {address} "):
        RayPool()


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--on ray needs Ray; install it with: pip install 'scantly\[ray\]'"):
        RayPool()


def test_what_ray_says_of_a_lost_task(gated_spec, tmp_path: Path) -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="Ray is not installed (it is in the extras ray and dev)")
    job = jobs_of(gated_spec(methods=["supervised"], seeds=[1]), tmp_path / "out")[0]

    def told(error: Exception) -> Any:
        def get(_: Any) -> Any:
            raise error

        pool = object.__new__(RayPool)
        pool._ray = SimpleNamespace(get=get, exceptions=exceptions)
        outcome = pool._outcome(None, job)
        assert (outcome.name, outcome.state) == (job.name, "failed")
        assert "\n" not in outcome.reason
        return outcome

    for error in (
        exceptions.WorkerCrashedError(),
        exceptions.OutOfMemoryError("too much\nmemory"),
        exceptions.LocalRayletDiedError(),
        exceptions.TaskUnschedulableError("nowhere"),
    ):
        outcome = told(error)
        assert outcome.kind == "lost"
        assert "its worker was lost 6 times" in outcome.reason
    cause = ModuleNotFoundError("No module named 'scantly'")
    outcome = told(exceptions.RayTaskError("work", "traceback", cause))
    assert outcome.kind == "fault"
    assert "No module named 'scantly'" in outcome.reason


WITHOUT_RAY = """
import sys
import scantly.benchmark.run, scantly.benchmark.work, scantly.benchmark.estimate, scantly.cli.benchmark
from scantly.cli import main
try:
    main(["benchmark", "--help"])
except SystemExit as ended:
    assert not ended.code
assert "ray" not in sys.modules
"""


def test_ray_is_imported_for_ray_alone() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--on" in done.stdout
    assert on_ray.__name__ in sys.modules
