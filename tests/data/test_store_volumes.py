"""The store of volumes: prepared in parallel, whole after any kill, checked on every read, read over a network."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from small_datasets import lps, save, write_dataset

from scantly.data.arrays import DamagedArrayError
from scantly.data.batches import BatchSource
from scantly.data.build import build_store
from scantly.data.dataset import Dataset
from scantly.data.frames import ArrayIndex
from scantly.data.loader import make_loader
from scantly.data.plan import Plan
from scantly.data.store import Store
from scantly.errors import DatasetError, ImageError

ALL = (slice(None), slice(None), slice(None))
NAMES = tuple("abcdefgh")
LABELED = NAMES[:3]
SHAPE = (40, 50, 60)


def plan_of(**values: Any) -> Plan:
    given = {
        "spatial_dims": 3,
        "normalization": [{"scheme": "zscore"}],
        "patch_size": [16, 16, 16],
        "labeled_batch_size": 2,
        "unlabeled_batch_size": 2,
    }
    return Plan.model_validate({**given, **values})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    random = np.random.default_rng(0)
    cases = {
        name: (random.integers(0, 99, (1, *SHAPE)), random.integers(0, 3, SHAPE) if name in LABELED else None)
        for name in NAMES
    }
    return write_dataset(tmp_path_factory.mktemp("cohort") / "d", cases)


def build(dataset: Dataset, root: Path, **options: Any) -> Store:
    return build_store(dataset, NAMES, plan_of(), root=root, with_labels=LABELED, **options)


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("serial")
    build(dataset, root, workers=0)
    return contents(root)


@pytest.mark.parametrize("workers", [2, 3, None])
def test_the_number_of_workers_changes_no_byte(
    dataset: Dataset, undisturbed: dict[str, bytes], tmp_path: Path, workers: int | None
) -> None:
    told: list[tuple[int, int, str]] = []
    build(dataset, tmp_path, workers=workers, progress=lambda *seen: told.append(seen))
    assert contents(tmp_path) == undisturbed
    assert told == [(done, len(NAMES), name) for done, name in enumerate(NAMES, start=1)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_bad_case_is_told_in_one_sentence_and_the_others_are_kept(tmp_path: Path, workers: int) -> None:
    cases = {name: (np.ones((1, 8, 8, 8)), None) for name in NAMES}
    dataset = write_dataset(tmp_path / "d", cases)
    broken = np.ones((8, 8, 8), dtype=np.float32)
    broken[3, 4, 5] = np.inf
    save(dataset.root / "imagesTr" / "c_0000.nii.gz", broken, lps((1, 1, 1)))
    (dataset.root / "imagesTr" / "e_0000.nii.gz").write_bytes(b"nothing")
    lines = r"\n[^\n]*c_0000\.nii\.gz[^\n]*(NaN|infinite)[^\n]*\n[^\n]*e_0000\.nii\.gz[^\n]*$"
    with pytest.raises(ImageError, match=rf"^2 of 8 cases cannot be used[^\n]*{lines}"):
        build_store(dataset, NAMES, plan_of(), root=tmp_path / "cache", with_labels=[], workers=workers)
    assert {f"{name}.json" for name in NAMES if name not in "ce"} == {
        path.name for path in (tmp_path / "cache").rglob("images/*.json")
    }
    assert not list((tmp_path / "cache").rglob("store.json"))


SCRIPT = """
import sys
from pathlib import Path
from scantly.data.dataset import Dataset
from scantly.data.plan import Plan
from scantly.data.build import build_store

dataset, plan, root, labeled = sys.argv[1:]
data = Dataset.open(dataset)
build_store(data, list(data.train), Plan.read(Path(plan)), root=Path(root), with_labels=labeled.split(), workers=2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills processes")
@pytest.mark.parametrize("files", [1, 7])
def test_a_preparation_killed_anywhere_ends_as_an_undisturbed_one(
    dataset: Dataset, undisturbed: dict[str, bytes], tmp_path: Path, files: int
) -> None:
    plan_of().write(tmp_path / "plan.yaml")
    root = tmp_path / "cache"
    root.mkdir()
    command = [sys.executable, "-c", SCRIPT, dataset.root, tmp_path / "plan.yaml", root, " ".join(LABELED)]
    process = subprocess.Popen(command)
    while process.poll() is None and sum(path.name[0] != "." for path in root.rglob("*.*")) < files:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in root.rglob("images/[a-h].json")}
    build(dataset, root, workers=2)  # waits until the orphaned workers have let go of the lock
    assert contents(root) == undisturbed  # and nothing else, such as half-written files
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("region", ["chunk", "trailer"])
def test_a_damaged_chunk_is_found_when_read_and_the_case_made_again(
    dataset: Dataset, undisturbed: dict[str, bytes], tmp_path: Path, kind: str, region: str
) -> None:
    build(dataset, tmp_path)
    path = next(tmp_path.rglob(f"{kind}/b.b2nd"))
    content = path.read_bytes()
    index = ArrayIndex.parse(content[-ArrayIndex.needed(content) :])
    flip(path, int(index.starts[2]) + 40 if region == "chunk" else len(content) - 60)
    store = build(dataset, tmp_path)  # of the same size: nothing to see from outside
    read = store.read_image if kind == "images" else store.read_label
    with pytest.raises(DamagedArrayError, match=rf"^[^\n]*{kind}/b\.b2nd is damaged; [^\n]*the next start"):
        read("b", ALL)
    others = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.b2nd") if p != path}
    np.testing.assert_array_equal(build(dataset, tmp_path).read_image("a", ALL), store.read_image("a", ALL))
    assert contents(tmp_path) == undisturbed
    assert {p: p.stat().st_mtime_ns for p in others} == others
    read("b", ALL)  # the store that was open reads the new file


def test_damage_in_a_loaders_process_is_one_sentence(dataset: Dataset, tmp_path: Path) -> None:
    store = build(dataset, tmp_path)
    for path in tmp_path.rglob("images/*.b2nd"):
        if path.stem not in LABELED:
            flip(path, path.stat().st_size // 3)
    plan = plan_of(patch_size=[64, 64, 64])
    rows = {"labeled_batch_size": 2, "unlabeled_batch_size": 2, "seed": 0}
    source = BatchSource(store, LABELED, [name for name in NAMES if name not in LABELED], plan, **rows)
    for workers in (0, 1):
        with pytest.raises(DamagedArrayError, match=r"^[^\n]*images/[d-h]\.b2nd is damaged; [^\n]*$"):
            next(make_loader(source, 0, 4, workers, pin_memory=False))


def test_damage_in_a_store_that_cannot_be_changed_is_told_all_the_same(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build(dataset, tmp_path)
    flip(next(tmp_path.rglob("images/a.b2nd")), 5000)

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "unlink", forbidden)
    with pytest.raises(DamagedArrayError, match="remove it and prepare the dataset again"):
        store.read_image("a", ALL)


def test_an_error_of_the_disk_is_told(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build(dataset, tmp_path)

    def fails(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("scantly.data.arrays._LocalFile.read", fails)
    with pytest.raises(DatasetError, match=r"cannot read .*images/a\.b2nd \(Input/output error\)"):
        store.read_image("a", ALL)


def test_labels_without_any_foreground_are_refused(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(1, 20, 20, 20))
    nothing, full = np.zeros((20, 20, 20)), np.ones((20, 20, 20))
    dataset = write_dataset(tmp_path / "d", {"a": (image, nothing), "b": (image, nothing), "c": (image, full)})
    with pytest.raises(DatasetError, match=r"labels of a, b hold background alone.*annotate one"):
        build_store(dataset, ["a", "b", "c"], plan_of(), root=tmp_path, with_labels=["a", "b"])
    build_store(dataset, ["a", "b", "c"], plan_of(), root=tmp_path, with_labels=["a", "b", "c"])


def test_an_all_background_label_trains_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = np.random.default_rng(0).normal(size=(1, 20, 20, 20))
    full = np.ones((20, 20, 20))
    dataset = write_dataset(tmp_path / "d", {"a": (image, 0 * full), "b": (image, full), "c": (image, None)})
    plan = plan_of(patch_size=[16, 16, 16], foreground_fraction=1)
    with caplog.at_level(logging.WARNING, logger="scantly"):
        store = build_store(dataset, ["a", "b", "c"], plan, root=tmp_path, with_labels=["a", "b"])
    assert len(caplog.messages) == 1
    assert "all background in a: patches of such cases are drawn anywhere" in caplog.messages[0]
    source = BatchSource(store, ["a"], ["c"], plan, labeled_batch_size=2, unlabeled_batch_size=1, seed=0)
    batches = [source[iteration] for iteration in range(6)]
    assert not any(batch.labels.any() for batch in batches)
    assert len({row.numpy().tobytes() for batch in batches for row in batch.labeled}) == 12


def test_a_volume_of_one_slice_lies_in_the_middle_of_its_patch(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(1, 1, 30, 30))
    dataset = write_dataset(tmp_path / "d", {"a": (image, np.ones((1, 30, 30))), "b": (image, None)})
    plan = plan_of(patch_size=[16, 16, 16])
    store = build_store(dataset, ["a", "b"], plan, root=tmp_path, with_labels=["a"])
    batch = BatchSource(store, ["a"], ["b"], plan, labeled_batch_size=2, unlabeled_batch_size=2, seed=0)[0]
    for rows in (batch.labeled[:, 0], batch.labels, batch.unlabeled[:, 0]):
        assert rows.shape == (2, 16, 16, 16)
        assert [bool(rows[:, z].any()) for z in range(16)] == [z == 7 for z in range(16)]


class Ranges(SimpleHTTPRequestHandler):
    """Serves parts of files, as object stores do, and counts their bytes."""

    sent = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = self.headers.get("Range")
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
            content = content[start:stop]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            with Ranges.lock:
                Ranges.sent += len(content)
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(dataset: Dataset, tmp_path: Path) -> Iterator[tuple[Store, str]]:
    """A store, and the address at which a web server offers it."""
    store = build(dataset, tmp_path)
    base = Path(store.url).parent
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: Ranges(*arguments, directory=str(base)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield store, f"http://127.0.0.1:{server.server_port}/{Path(store.url).name}"
    server.shutdown()
    server.server_close()


def test_patches_over_http_fetch_their_chunks_alone(served: tuple[Store, str]) -> None:
    local, address = served
    remote = Store.open(address)
    remote.read_image("a", (slice(0, 1),) * 3)
    Ranges.sent = 0
    part = (slice(3, 20), slice(4, 30), slice(33, 40))
    np.testing.assert_array_equal(remote.read_image("a", part), local.read_image("a", part))
    size = (Path(local.url).parent / "images" / "a.b2nd").stat().st_size
    assert 0 < Ranges.sent < 0.4 * size  # one of eight chunks, of which the others are cut short by the edge
    np.testing.assert_array_equal(remote.read_image("a", ALL), local.read_image("a", ALL))
    np.testing.assert_array_equal(remote.read_label("b", ALL), local.read_label("b", ALL))
    assert remote.record("c") == local.record("c")


def test_a_remote_store_trains_with_forked_workers(served: tuple[Store, str]) -> None:
    local, address = served
    rows = {"labeled_batch_size": 2, "unlabeled_batch_size": 2, "seed": 0}
    others = [name for name in NAMES if name not in LABELED]
    sources = [BatchSource(store, LABELED, others, plan_of(), **rows) for store in (local, Store.open(address))]
    expected = [sources[0][iteration] for iteration in range(4)]
    for workers in (0, 2):
        found = make_loader(sources[1], 0, 4, workers, pin_memory=False)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.labeled, other.labeled)
            np.testing.assert_array_equal(one.unlabeled, other.unlabeled)


def test_what_is_not_there_and_what_is_damaged_is_told_of_a_remote_store_too(dataset: Dataset, tmp_path: Path) -> None:
    store = build(dataset, tmp_path)
    base = Path(store.url).parent
    memory = fsspec.filesystem("memory")
    for name, content in contents(base).items():
        memory.pipe_file(f"/volumes/{name}", content)
    remote = Store.open(f"memory://volumes/{Path(store.url).name}")
    content = bytearray(memory.cat_file("/volumes/images/a.b2nd"))
    content[9000] ^= 1
    memory.pipe_file("/volumes/images/a.b2nd", bytes(content))
    memory.rm("/volumes/images/b.b2nd")
    with pytest.raises(DamagedArrayError, match=r"images/a\.b2nd is damaged; remove it and prepare"):
        remote.read_image("a", ALL)
    with pytest.raises(DatasetError, match=r"images/b\.b2nd does not exist"):
        remote.read_image("b", ALL)
    memory.rm("/volumes", recursive=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_what_a_reader_keeps_does_not_grow_with_the_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few open files, and no voxel: nothing is mapped into memory."""
    monkeypatch.setattr("scantly.data.arrays._LOCAL_HANDLES", 4)
    kept = {}
    for volumes in (4, 24):
        names = [f"case{number:02d}" for number in range(volumes)]
        random = np.random.default_rng(0)
        cases = {name: (random.normal(size=(1, 40, 40, 40)), None) for name in names}
        dataset = write_dataset(tmp_path / str(volumes), cases)
        store = build_store(dataset, names, plan_of(), root=tmp_path, with_labels=[])
        before = {path.name for path in Path("/proc/self/fd").iterdir()}
        for name in names:
            store.read_image(name, ALL)
        more = len({path.name for path in Path("/proc/self/fd").iterdir()} - before)
        kept[volumes] = (more, Path("/proc/self/maps").read_text().count(".b2nd"))
        del store
    assert kept == {4: (4, 0), 24: (4, 0)}


def test_little_memory_means_no_further_process(
    dataset: Dataset, undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; 40 x 50 x 60 voxels take about 4 MB to prepare."""

    def begun(*_: object, **__: object) -> None:
        raise AssertionError("a process was begun")

    monkeypatch.setattr("scantly.data.parallel.ProcessPoolExecutor", begun)
    monkeypatch.setattr("scantly.data.parallel.available_memory", lambda: 4_000_000)
    build(dataset, tmp_path)
    assert contents(tmp_path) == undisturbed
