"""Run folders under an address: whole at any moment, and continued from there alone on another machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from grid_helpers import Here, jobs_of, results, wait_until

from scantly.benchmark import run as run_module
from scantly.benchmark import storage
from scantly.benchmark.run import open_grid, run_grid, send_report
from scantly.benchmark.storage import Remote, is_address, scratch_folder
from scantly.benchmark.work import Job, run_job
from scantly.errors import RunError
from scantly.files import read_json, write_text
from scantly.report.benchmark_page import benchmark_report
from scantly.training import engine

CELL = "phantom/supervised-2-seed1"


@pytest.fixture(params=["file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An address on this machine's disk, and one in memory."""
    if request.param == "file":
        yield f"file://{tmp_path}/kept/results"
        return
    yield f"memory://{tmp_path.name}/results"
    with suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)


def kept(address: str) -> dict[str, bytes]:
    """Everything under an address."""
    files, root = fsspec.core.url_to_fs(address)
    return {place[len(root) + 1 :]: files.cat_file(place) for place in files.find(root)} if files.exists(root) else {}


def write(folder: Path, **files: str) -> Path:
    """Files by name, ``__`` for a slash and ``_`` for a point."""
    for name, text in files.items():
        write_text(folder / name.replace("__", "/").replace("_", "."), text)
    return folder


def test_what_is_an_address() -> None:
    assert is_address("s3://bucket/results")
    assert not is_address("/data/results")
    assert scratch_folder("s3://a/b") == scratch_folder("s3://a/b/") != scratch_folder("s3://a/c")


def test_there_and_back(address: str, tmp_path: Path) -> None:
    here = write(tmp_path / "here", config_yaml="c", log__metrics_csv="l", predictions__test__case_nii_gz="p")
    write(here, model_safetensors="m").joinpath(".lock").touch()
    (here / "log" / ".tmp-half").write_text("half")
    Remote(address).send(here)
    assert sorted(kept(address)) == [
        "config.yaml",
        "log/metrics.csv",
        "model.safetensors",
        "predictions/test/case.nii.gz",
    ]
    there = tmp_path / "there"
    Remote(address).fetch(there)
    assert {name: (there / name).read_bytes() for name in kept(address)} == kept(address)
    some = tmp_path / "some"
    Remote(address, without=("log/",)).fetch(some, suffixes=(".csv", ".yaml"))
    assert [path.name for path in some.rglob("*") if path.is_file()] == ["config.yaml"]


def test_nothing_is_there_yet(address: str, tmp_path: Path) -> None:
    Remote(address).fetch(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*"))


def test_only_what_has_changed_is_sent(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = write(tmp_path / "here", config_yaml="c", log__metrics_csv="l", checkpoints__last_ckpt="1")
    remote = Remote(address)
    remote.send(here)
    put = []
    monkeypatch.setattr(Remote, "_put", lambda self, source, place: put.append(place.rpartition("/")[2]))
    remote.send(here)
    assert put == []
    write(here, log__metrics_csv="longer", checkpoints__last_ckpt="22")
    remote.send(here)
    assert put == ["metrics.csv", "last.ckpt"]
    fetched = Remote(address)
    fetched.fetch(tmp_path / "there")
    fetched.send(tmp_path / "there")
    assert put == ["metrics.csv", "last.ckpt"]


def test_a_name_with_the_letters_of_patterns(address: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    for name in ("case[1].nii.gz", "case?.nii.gz", "case*.nii.gz", "case 1.nii.gz"):
        (here / "predictions").mkdir(parents=True, exist_ok=True)
        (here / "predictions" / name).write_text(name)
    Remote(address).send(here)
    Remote(address).send(here)
    assert {Path(name).name: text.decode() for name, text in kept(address).items()} == {
        name: name for name in ("case[1].nii.gz", "case?.nii.gz", "case*.nii.gz", "case 1.nii.gz")
    }


class Watched:
    """Calls back after every change under an address, and before every transfer.

    Args:
        monkeypatch: pytest's.
        before: Called before a file is sent.
        after: Called after anything has changed there.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any], after: Callable[[], Any]) -> None:
        put = Remote._put

        def watched(remote: Remote, source: Path, place: str) -> None:
            before()
            put(remote, source, place)
            after()

        monkeypatch.setattr(Remote, "_put", watched)


def test_what_lies_there_is_never_ahead_of_its_log(address: str, tmp_path: Path, monkeypatch) -> None:
    """A training goes on while its files are sent, as fast as it can."""
    here = tmp_path / "here"
    iteration = 0

    def train() -> None:
        nonlocal iteration
        iteration += 1
        write(here, log__metrics_csv=f"{iteration:03d}", checkpoints__best_ckpt=f"{iteration:03d}")
        for name in ("pseudo_labels/1-round/case.b2nd", "checkpoints/stage-1.ckpt"):
            write_text(here / name, f"{iteration:03d}")
        write(here, checkpoints__last_ckpt=f"{iteration:03d}", config_yaml="c", environment_json="e")

    seen: list[dict[str, str]] = []
    train()
    Watched(monkeypatch, train, lambda: seen.append({name: text.decode() for name, text in kept(address).items()}))
    remote = Remote(address)
    for _ in range(3):
        remote.send(here)
    write(here, model_safetensors="m", evaluation__test_json="{}")
    remote.send(here)
    assert len(seen) > 20
    for state in seen:
        last = state.pop("checkpoints/last.ckpt", None)
        others = {name: text for name, text in state.items() if text.isdecimal()}
        assert all(text >= last for text in others.values()) if last else True
        if last:
            assert set(others) == {
                *("log/metrics.csv", "checkpoints/best.ckpt", "checkpoints/stage-1.ckpt"),
                "pseudo_labels/1-round/case.b2nd",
            }
        if "model.safetensors" in state:
            assert "evaluation/test.json" in state
        assert not any(".tmp-" in name for name in state)
    assert not list(here.glob(".tmp-*"))


@pytest.mark.parametrize("links", [True, False])
def test_the_last_checkpoint_is_held_while_a_round_is_sent(tmp_path: Path, monkeypatch, links: bool) -> None:
    if not links:

        def refuse(*_: Any) -> None:
            raise PermissionError("no links here")

        monkeypatch.setattr(storage.os, "link", refuse)
        (tmp_path / "last.ckpt").write_text("old")
    (tmp_path / "last.ckpt").write_text("old")
    with storage._held(tmp_path / "last.ckpt", tmp_path / ".tmp-held") as held:
        (tmp_path / "new").write_text("new")
        (tmp_path / "new").replace(tmp_path / "last.ckpt")
        assert held is not None
        assert held.read_text() == "old"
    assert not held.exists()
    with storage._held(tmp_path / "gone", tmp_path / ".tmp-held") as held:
        assert held is None


def test_a_file_is_there_under_its_name_only_when_it_is_whole(address: str, tmp_path: Path, monkeypatch) -> None:
    here = write(tmp_path / "here", config_yaml="first")
    remote = Remote(address)
    remote.send(here)
    write(here, config_yaml="second, and longer")
    files = type(remote._files)
    put_file = files.put_file

    def cut(self: Any, source: str, target: str, *args: Any, **options: Any) -> None:
        half = tmp_path / "half"
        half.write_bytes(Path(source).read_bytes()[:3])
        put_file(self, str(half), target, *args, **options)
        raise ConnectionResetError("the line is cut")

    with monkeypatch.context() as patch:
        patch.setattr(files, "put_file", cut)
        with pytest.raises(RunError, match=r"cannot be written \(the line is cut\)"):
            remote.send(here)
    assert kept(address)["config.yaml"] == b"first"
    Remote(address).fetch(tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["config.yaml"]
    remote.send(here)
    assert kept(address) == {"config.yaml": b"second, and longer"}


def test_files_that_come_and_go_while_they_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = write(tmp_path / "here", config_yaml="c", environment_json="e", log__metrics_csv="l")
    Watched(monkeypatch, lambda: (here / "config.yaml").unlink(missing_ok=True), lambda: None)
    Remote(f"file://{tmp_path}/kept").send(here)
    assert sorted(kept(f"file://{tmp_path}/kept")) == ["environment.json", "log/metrics.csv"]


def test_an_address_that_vanishes_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object store tells a missing bucket as a missing file, which must not pass for one that came and went."""
    remote = Remote(f"memory://{tmp_path.name}/results")

    def no_bucket(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(type(remote._files), "put_file", no_bucket)
    with pytest.raises(RunError, match=r"cannot be written \(The specified bucket does not exist\)"):
        remote.send(write(tmp_path / "here", config_yaml="c"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nosuch://bucket/results", "Protocol not known: nosuch"),
        ("s3://bucket/results", "s3fs"),
        ("file:///proc/nowhere/results", "cannot be written"),
        ("file:///dev/null/results", "cannot be "),
    ],
)
def test_an_address_that_cannot_be_used(gated_spec, address: str, said: str) -> None:
    if said == "s3fs" and "s3" in fsspec.available_protocols() and _has_s3fs():
        pytest.skip("s3fs is installed")
    with pytest.raises(RunError) as refused:
        run_grid(open_grid(gated_spec(methods=["supervised"]), address), address, quiet=True)
    (sentence,) = str(refused.value).splitlines()
    assert said in sentence
    assert sentence.startswith(address)
    assert "check the address" in sentence


def _has_s3fs() -> bool:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        return False
    return True


def test_any_error_of_a_file_system_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        """As botocore's, of no common class."""

    remote = Remote(f"memory://{tmp_path.name}/results")

    def refuse(*_: Any, **__: Any) -> None:
        raise NoCredentialsError("unable to locate\ncredentials")

    monkeypatch.setattr(type(remote._files), "info", refuse)
    monkeypatch.setattr(type(remote._files), "pipe_file", refuse)
    for call in (lambda: remote.fetch(tmp_path / "x"), remote.require_writable):
        with pytest.raises(RunError, match=r"\(unable to locate credentials\)"):
            call()


def test_what_was_not_sent_is_not_mixed_with_what_lies_there(address: str, tmp_path: Path) -> None:
    """A worker was killed before it could send; its machine goes on from the address, as any other would."""
    here = write(tmp_path / "here", config_yaml="c", log__metrics_csv="10", checkpoints__last_ckpt="10")
    Remote(address).send(here)
    write(here, log__metrics_csv="20", checkpoints__last_ckpt="20", model_safetensors="m", evaluation__test_json="{}")
    (here / ".lock").touch()
    Remote(address).fetch(here)
    assert {p.relative_to(here).as_posix(): p.read_text() for p in here.rglob("*") if p.is_file()} == {
        ".lock": "",
        "config.yaml": "c",
        "log/metrics.csv": "10",
        "checkpoints/last.ckpt": "10",
    }


def test_sending_goes_on_beside_the_work(address: str, tmp_path: Path) -> None:
    here = tmp_path / "here"
    with Remote(address).mirrored(here, every=0.05):
        write(here, log__metrics_csv="1")
        wait_until(lambda: kept(address).get("log/metrics.csv") == b"1", 20)
        write(here, log__metrics_csv="22")
        wait_until(lambda: kept(address).get("log/metrics.csv") == b"22", 20)
        write(here, model_safetensors="m")
    assert set(kept(address)) == {"log/metrics.csv", "model.safetensors"}


def test_an_address_that_is_lost_for_a_while(tmp_path: Path, monkeypatch, caplog) -> None:
    address = f"memory://{tmp_path.name}/results"
    put = Remote._put
    with Remote(address).mirrored(tmp_path / "work", every=0.05):
        monkeypatch.setattr(Remote, "_put", lambda *_: (_ for _ in ()).throw(OSError("no route")))
        write(tmp_path / "work", config_yaml="c")
        wait_until(lambda: "cannot be written (no route)" in caplog.text, 20)
        monkeypatch.setattr(Remote, "_put", put)
    assert kept(address) == {"config.yaml": b"c"}


def test_an_address_that_is_away_at_the_end_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"memory://{tmp_path.name}/results"
    put, tries = Remote._put, []

    def away_twice(*arguments: Any) -> None:
        tries.append(len(tries))
        if len(tries) < 3:
            raise OSError("no route")
        put(*arguments)

    monkeypatch.setattr(storage, "_PAUSES", (0.01, 0.01))
    monkeypatch.setattr(Remote, "_put", away_twice)
    with Remote(address).mirrored(tmp_path / "work"):
        write(tmp_path / "work", config_yaml="c")
    assert kept(address) == {"config.yaml": b"c"}
    monkeypatch.setattr(Remote, "_put", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    with pytest.raises(RunError, match="no route"), Remote(address).mirrored(tmp_path / "work"):
        write(tmp_path / "work", config_yaml="changed")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Be another machine: one with a cache folder of its own."""

    def move(name: str) -> Path:
        monkeypatch.setenv("SCANTLY_CACHE", str(tmp_path / name))
        return tmp_path / name

    return move


@pytest.fixture
def job(gated_spec, tmp_path: Path) -> Job:
    """A plain cell."""
    return jobs_of(gated_spec(methods=["supervised"], seeds=[1]), tmp_path / "out")[0]


def test_begun_on_one_machine_and_continued_on_another(
    address: str, job: Job, machine, undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = f"{address}/cells/{CELL}"
    away = replace(job, remote=remote)
    step = engine.Engine._step

    def stepping(self: Any, *args: Any) -> Any:
        if self.iteration == 13:
            raise RuntimeError("the machine is lost")
        return step(self, *args)

    first = machine("first")
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_step", stepping)
        outcome = run_job(away)
    assert outcome.state == "failed"
    assert "model.safetensors" not in kept(remote)
    assert any((first / "benchmarks").rglob("last.ckpt"))
    shutil.rmtree(first)

    second = machine("second")
    outcome = run_job(away)
    assert outcome.state == "done", outcome.reason
    assert outcome.attempts[0]["began"] == 10
    there = kept(remote)
    assert {name: there[name] for name in undisturbed[CELL]} == undisturbed[CELL]
    assert not any(path.is_file() for path in (second / "benchmarks").rglob("*"))  # the disks of nodes do not fill
    assert not Path(job.folder).exists()


def test_every_moment_of_sending_can_be_continued_from(
    job: Job, machine, undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lay under the address when the machine was lost, between any two files, gives the same bytes."""
    kept_there = tmp_path / "kept"
    away = replace(job, remote=f"file://{kept_there}")
    step, remotes, moments = engine.Engine._step, [], []
    fetch = Remote.fetch

    def fetching(self: Remote, folder: Path, **options: Any) -> None:
        remotes.append((self, folder))
        fetch(self, folder, **options)

    def stepping(self: Any, *args: Any) -> Any:
        if self.iteration % 3 == 0:
            remote, folder = remotes[-1]
            remote.send(folder)
        return step(self, *args)

    def keep() -> None:
        moments.append(shutil.copytree(kept_there, tmp_path / f"moment-{len(moments)}"))

    machine("first")
    with monkeypatch.context() as patch:
        patch.setattr(engine.Engine, "_step", stepping)
        patch.setattr(Remote, "fetch", fetching)
        Watched(patch, lambda: None, keep)
        assert run_job(away).state == "done"
    begun = []
    chosen = [n for n, moment in enumerate(moments) if (moment / "checkpoints").exists()]
    # while the checkpoints of iterations 5, 10 and 15 are sent, and just before the model
    for number in (chosen[0], chosen[3], chosen[len(chosen) // 2], chosen[-2]):
        machine(f"again-{number}")
        outcome = run_job(replace(job, remote=f"file://{moments[number]}"))
        assert outcome.state == "done", outcome.reason
        begun.append(outcome.attempts[0]["began"])
        assert results(Path(moments[number])) == undisturbed[CELL], number
        log = (Path(moments[number]) / "log" / "metrics.csv").read_text()
        assert [int(line.split(",")[0]) for line in log.splitlines() if "loss/supervised" in line] == list(range(1, 21))
    assert len(set(begun)) > 2
    assert torch.load(kept_there / "checkpoints" / "last.ckpt", weights_only=True)["iteration"] == 20


def test_a_grid_under_an_address(address: str, gated_spec, machine, undisturbed, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run_module, "LocalPool", lambda processes: pools.append(Here()) or pools[-1])
    pools: list[Here] = []
    spec = gated_spec(methods=["supervised"], seeds=[1])
    first = machine("first")
    grid = open_grid(spec, address)
    assert grid.folder.is_relative_to(first)
    state = run_grid(grid, address, threads=1, quiet=True)
    assert [cell.name for cell in state.done] == [CELL]
    there = kept(address)
    assert {"benchmark.json", f"outcomes/{CELL}.json"} < set(there)
    assert {name: there[f"cells/{CELL}/{name}"] for name in undisturbed[CELL]} == undisturbed[CELL]
    assert not any(".tmp-" in name or ".lock" in name for name in there)
    assert (grid.run_folder(grid.cells[0]) / "evaluation" / "test.json").is_file()
    assert not (grid.run_folder(grid.cells[0]) / "model.safetensors").exists()
    if address.startswith("file"):
        page = benchmark_report(grid)
        send_report(grid, address)
        assert kept(address)["report.html"] == page.read_bytes()
        assert "results.csv" in kept(address)

    machine("second")
    grid = open_grid(spec, address)
    assert [cell.name for cell in grid.state().done] == [CELL]
    assert len(run_grid(grid, address, threads=1, quiet=True).done) == 1
    assert pools[-1].begun == []

    machine("third")
    grown = open_grid(gated_spec(methods=["supervised"], seeds=[1, 2]), address)
    assert len(run_grid(grown, address, threads=1, quiet=True).done) == 2
    assert pools[-1].begun == [CELL.replace("seed1", "seed2")]
    with pytest.raises(RunError, match="holds another benchmark"):
        open_grid(gated_spec(methods=["supervised"], seeds=[1], entry={"steps": 7}), address)

    machine("first")  # what this machine remembers is not what lies there now
    assert len(open_grid(gated_spec(methods=["supervised"], seeds=[1, 2]), address).state().done) == 2
    fsspec.core.url_to_fs(address)[0].rm(fsspec.core.url_to_fs(address)[1], recursive=True)
    assert len(open_grid(gated_spec(methods=["supervised"], seeds=[1, 2]), address).state().open) == 2


def test_looking_at_a_grid_that_another_process_works_on(address: str, gated_spec, machine, tmp_path: Path) -> None:
    """Its outcomes may not have been sent yet."""
    machine("first")
    spec = gated_spec(methods=["supervised"], seeds=[1])
    with open_grid(spec, address).claimed():
        outcome = scratch_folder(address) / "outcomes" / f"{CELL}.json"
        write_text(outcome, "not sent yet")
        open_grid(spec, address)
        assert outcome.read_text() == "not sent yet"
        with pytest.raises(RunError, match="another process works"):
            run_grid(open_grid(spec, address), address, quiet=True)
    assert kept(address) == {}


def test_an_address_of_something_else(address: str, gated_spec, machine, tmp_path: Path) -> None:
    machine("first")
    Remote(address).send(write(tmp_path / "thesis", chapter_tex="precious"))
    with pytest.raises(RunError, match=r"is not empty \(it holds 'chapter.tex'\) and holds no benchmark"):
        open_grid(gated_spec(methods=["supervised"]), address)
    assert kept(address) == {"chapter.tex": b"precious"}


def test_the_benchmark_is_known_under_the_address_before_a_cell_begins(
    address: str, gated_spec, machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(job: Job) -> Any:
        assert list(read_json_of(address)["cells"]) == [CELL]
        raise KeyboardInterrupt

    def read_json_of(place: str) -> Any:
        target = machine("first") / "seen.json"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(kept(place)["benchmark.json"])
        return read_json(target)

    monkeypatch.setattr(run_module, "LocalPool", lambda processes: Here(die))
    machine("first")
    spec = gated_spec(methods=["supervised"], seeds=[1])
    with pytest.raises(KeyboardInterrupt):
        run_grid(open_grid(spec, address), address, quiet=True)
    machine("second")
    assert len(open_grid(spec, address).state().open) == 1
