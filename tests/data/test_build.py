"""The store: prepared once, read in parts, remade when it must be, whole after a kill, labels hidden."""

from __future__ import annotations

import logging
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from filelock import FileLock
from small_datasets import lps, save, write_dataset

from scantly.data.arrays import ArrayFolder, Recent, write_array
from scantly.data.build import build_store
from scantly.data.dataset import Dataset
from scantly.data.plan import Plan
from scantly.data.prepare import prepare, prepare_label, restore_label
from scantly.data.store import Store
from scantly.errors import ConfigError, DatasetError, ImageError, ScantlyError

ALL = (slice(None), slice(None), slice(None))
NAMES = ("a", "b", "c")


def plan_of(dims: int = 2, channels: int = 2, **values: Any) -> Plan:
    given = {
        "spatial_dims": dims,
        "normalization": [{"scheme": "zscore"}] * channels,
        "patch_size": [16] * dims,
        "labeled_batch_size": 1,
        "unlabeled_batch_size": 1,
    }
    return Plan.model_validate({**given, **values})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    random = np.random.default_rng(0)
    cases = {}
    for number, name in enumerate(NAMES):
        shape = (4 + number, 20, 24)
        cases[name] = (random.normal(size=(2, *shape)), random.integers(0, 3, shape))
    return write_dataset(tmp_path / "dataset", cases, spacing=(5, 1, 1), channels=("T1", "T2"))


@pytest.fixture
def build(dataset: Dataset, tmp_path: Path) -> Callable[..., Store]:
    def make(labeled: tuple[str, ...] = ("a",), plan: Plan | None = None, **options: Any) -> Store:
        options = {"root": tmp_path / "cache", "with_labels": labeled, **options}
        return build_store(dataset, NAMES, plan or plan_of(), **options)

    return make


def written(root: Path) -> dict[str, int]:
    """Time of writing of every file of the cache but the lock."""
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("dims", [2, 3])
def test_store_gives_what_preparation_gives(dataset: Dataset, build: Callable[..., Store], dims: int) -> None:
    plan = plan_of(dims, size=[32, 48] if dims == 2 else [70, 40, 48])
    store = build(labeled=NAMES, plan=plan)
    assert (store.cases, store.channels) == (NAMES, ("T1", "T2"))
    assert (store.classes, store.num_classes) == (("background", "A", "B"), 3)
    for name in NAMES:
        image, record = prepare(dataset.read_image(name), plan)
        label = prepare_label(dataset.read_label(name), plan)
        assert store.shape(name) == label.shape
        found = store.read_image(name, ALL)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, image)
        np.testing.assert_array_equal(store.read_label(name, ALL), label)
        part = (slice(1, 3), slice(5, 31), slice(0, 7))
        np.testing.assert_array_equal(store.read_image(name, part), image[(slice(None), *part)])
        np.testing.assert_array_equal(store.read_label(name, part), label[part])
        assert store.record(name) == record
        back = restore_label(store.read_label(name, ALL), store.record(name), plan)
        np.testing.assert_array_equal(back, dataset.read_label(name).array)


def test_classes_and_foreground_of_a_label_by_hand(tmp_path: Path) -> None:
    label = np.zeros((3, 64, 64), dtype=np.uint8)
    label[1, :40, :40] = 1
    label[2, 5, 6] = 2
    dataset = write_dataset(tmp_path / "d", {"a": (np.zeros((1, *label.shape)), label)})
    store = build_store(dataset, ["a"], plan_of(channels=1), root=tmp_path, with_labels=["a"])
    expected = [[True, False, False], [True, True, False], [True, False, True]]
    np.testing.assert_array_equal(store.classes_per_slice("a"), expected)
    voxels = store.foreground("a")
    assert list(voxels) == [1, 2]
    np.testing.assert_array_equal(voxels[2], [[2, 5, 6]])
    assert voxels[1].shape == (1000, 3)
    assert len(np.unique(voxels[1], axis=0)) == 1000
    assert (label[tuple(voxels[1].T)] == 1).all()


def test_labels_of_other_cases_are_neither_opened_nor_written(
    dataset: Dataset, build: Callable[..., Store], tmp_path: Path
) -> None:
    (dataset.root / "labelsTr" / "b.nii.gz").write_bytes(b"poison")
    store = build(labeled=("a", "c"))
    assert [store.has_label(name) for name in NAMES] == [True, False, True]
    for read in (lambda: store.read_label("b", ALL), lambda: store.foreground("b")):
        with pytest.raises(DatasetError, match="label of case 'b' is not in the store"):
            read()
    assert sorted(p.stem for p in (tmp_path / "cache").rglob("labels/*.b2nd")) == ["a", "c"]


def test_other_labeled_cases_share_images_and_leave_the_first_store_alone(
    build: Callable[..., Store], tmp_path: Path
) -> None:
    first = build(labeled=("a",))
    before = written(tmp_path / "cache")
    second = build(labeled=("b",))
    assert (first.has_label("a"), first.has_label("b")) == (True, False)
    assert (second.has_label("a"), second.has_label("b")) == (False, True)
    after = written(tmp_path / "cache")
    assert before.items() <= after.items()
    assert not [path for path in after.keys() - before.keys() if "/images/" in path]
    first.read_label("a", ALL)


def test_what_is_whole_and_current_is_not_made_again(build: Callable[..., Store], tmp_path: Path) -> None:
    build()
    before = written(tmp_path / "cache")
    assert build(plan=plan_of(patch_size=[32, 32], labeled_batch_size=9)).url == build().url
    assert written(tmp_path / "cache") == before


@pytest.mark.parametrize("change", [{"size": [16, 16]}, {"interpolation": "cubic"}, {"crop_fraction": 0.5}])
def test_another_preparation_is_another_store(build: Callable[..., Store], change: dict[str, Any]) -> None:
    first, other = build(), build(plan=plan_of(**change))
    assert first.url != other.url
    assert first.shape("a") == (4, 20, 24)


def test_a_changed_source_is_prepared_again_and_no_other(
    dataset: Dataset, build: Callable[..., Store], tmp_path: Path
) -> None:
    build(labeled=("a", "b"))
    before = written(tmp_path / "cache")
    new = np.random.default_rng(9).normal(size=(5, 20, 24)).astype(np.float32)
    save(dataset.root / "imagesTr" / "b_0001.nii.gz", new, lps((5, 1, 1)))
    store = build(labeled=("a", "b"))
    after = written(tmp_path / "cache")
    assert {Path(p).stem for p in after if after[p] != before[p]} == {"b"}
    np.testing.assert_allclose(store.read_image("b", ALL)[1], (new - new.mean()) / new.std(), atol=1e-5)


def test_a_changed_label_is_prepared_again(dataset: Dataset, build: Callable[..., Store]) -> None:
    build()
    label = np.full((4, 20, 24), 2, dtype=np.uint8)
    save(dataset.root / "labelsTr" / "a.nii.gz", label, lps((5, 1, 1)))
    store = build()
    np.testing.assert_array_equal(store.read_label("a", ALL), label)
    assert list(store.foreground("a")) == [2]


def test_a_killed_preparation_leaves_no_store_and_goes_on(build: Callable[..., Store], tmp_path: Path) -> None:
    def die(done: int, total: int, name: str) -> None:
        assert (total, name) == (3, NAMES[done - 1])
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(progress=die)
    assert not list((tmp_path / "cache").rglob("store.json"))
    before = written(tmp_path / "cache")
    store = build()
    after = written(tmp_path / "cache")
    assert before.items() <= after.items()
    assert store.read_image("c", ALL).shape == (2, 6, 20, 24)


def test_a_kill_between_array_and_sidecar_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(channels=1, normalization=[{"scheme": "none"}])
    dataset = write_dataset(tmp_path / "d", {"a": (np.full((1, 2, 16, 16), 1.0), None)})
    options: dict[str, Any] = {"root": tmp_path / "cache", "with_labels": []}
    build_store(dataset, ["a"], plan, **options)
    source = dataset.root / "imagesTr" / "a_0000.nii.gz"
    first, times = source.read_bytes(), (source.stat().st_atime_ns, source.stat().st_mtime_ns)

    def killed(path: Path, values: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    save(source, np.full((2, 16, 16), 3, dtype=np.float32), lps((1, 1, 1)))  # as many bytes when prepared
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("scantly.data.build._write_sidecar", killed)
        build_store(dataset, ["a"], plan, **options)
    source.write_bytes(first)  # the earlier file comes back, to the byte and to the nanosecond
    os.utime(source, ns=times)
    assert (build_store(dataset, ["a"], plan, **options).read_image("a", ALL) == 1).all()


@pytest.mark.parametrize("kind", ["images", "labels"])
@pytest.mark.parametrize("damage", ["no sidecar", "half a sidecar", "truncated", "missing"])
def test_a_case_that_is_not_whole_is_made_again(
    dataset: Dataset, build: Callable[..., Store], tmp_path: Path, kind: str, damage: str
) -> None:
    build()
    array = next((tmp_path / "cache").rglob(f"{kind}/a.b2nd"))
    sidecar = array.with_suffix(".json")
    if damage == "no sidecar":
        sidecar.unlink()
        array.write_bytes(b"half written")
    elif damage == "half a sidecar":
        sidecar.write_text(sidecar.read_text()[:20])
        array.write_bytes(b"half written")
    elif damage == "truncated":
        array.write_bytes(array.read_bytes()[:-7])
    else:
        array.unlink()
    store = build()
    np.testing.assert_array_equal(store.read_label("a", ALL), dataset.read_label("a").array)
    np.testing.assert_array_equal(store.read_image("a", ALL), prepare(dataset.read_image("a"), plan_of())[0])


def test_a_damaged_array_is_named_when_read(build: Callable[..., Store], tmp_path: Path) -> None:
    store = build()
    path = next((tmp_path / "cache").rglob("images/a.b2nd"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DatasetError, match=r"images/a\.b2nd is damaged; remove it.*a training with --resume"):
        store.read_image("a", ALL)
    path.unlink()
    with pytest.raises(DatasetError, match=r"images/a\.b2nd does not exist"):
        store.read_image("a", ALL)


def test_preparation_is_the_same_to_the_byte(dataset: Dataset, tmp_path: Path) -> None:
    contents = []
    for root in (tmp_path / "one", tmp_path / "two"):
        build_store(dataset, NAMES, plan_of(), root=root, with_labels=["a"])
        contents.append({p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) > 8


def test_default_cache_is_the_environments(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCANTLY_CACHE", str(tmp_path / "elsewhere"))
    store = build_store(dataset, ["a"], plan_of(), with_labels=[])
    assert Path(store.url).is_relative_to(tmp_path / "elsewhere")
    assert Store.open(store.url).cases == ("a",)


def test_a_second_process_waits_and_says_so(
    build: Callable[..., Store], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(build().url).parent
    caplog.set_level(logging.INFO, logger="scantly")
    held = FileLock(folder / ".lock")
    held.acquire()
    waiting = threading.Thread(target=build)
    waiting.start()
    while not caplog.messages:
        waiting.join(0.01)
    assert waiting.is_alive()
    assert str(folder) in caplog.text
    held.release()
    waiting.join()
    FileLock(folder / ".lock").acquire(timeout=0).lock.release()  # and lets go itself


def test_a_store_is_pickled_by_its_address_and_opens_files_anew(build: Callable[..., Store]) -> None:
    store = build()
    expected = store.read_image("a", ALL)
    text = pickle.dumps(store)
    assert len(text) < 2000
    np.testing.assert_array_equal(pickle.loads(text).read_image("a", ALL), expected)  # noqa: S301


def test_handles_are_few_and_not_shared_with_a_forked_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    recent: Recent[int, int] = Recent(2)
    for key in (1, 2, 1, 3, 1, 2):  # 2 was used longest ago when 3 came
        recent.get(key, lambda key=key: made.append(key) or key)
    assert made == [1, 2, 3, 2]
    assert len(recent) == 2
    monkeypatch.setattr(os, "getpid", lambda: -1)
    recent.get(1, lambda: made.append(10) or 10)
    assert made[-1] == 10


def test_open_files_do_not_grow_with_the_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scantly.data.arrays._LOCAL_HANDLES", 4)
    for number in range(40):
        write_array(tmp_path / f"{number}.b2nd", np.full((2, 8, 8), number), (1, 8, 8))
    folder = ArrayFolder(tmp_path)
    folder.read("0.b2nd", ALL)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(40):
        assert folder.read(f"{number}.b2nd", ALL)[0, 0, 0] == number
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 4


@pytest.mark.parametrize(("dims", "first", "middle"), [(2, 0, 20), (3, 0, 128)])
def test_a_read_touches_only_its_chunks(tmp_path: Path, dims: int, first: int, middle: int) -> None:
    shape = (1, 40, 64, 64) if dims == 2 else (1, 256, 32, 32)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    dataset = write_dataset(tmp_path / "d", {"a": (image, None)})
    none = [{"scheme": "none"}]
    store = build_store(dataset, ["a"], plan_of(dims, 1, normalization=none), root=tmp_path, with_labels=[])
    path = next(tmp_path.rglob("images/a.b2nd"))
    content = bytearray(path.read_bytes())
    # noise hardly shrinks, so the middle fifth of the file holds the middle slices
    content[int(len(content) * 0.4) : int(len(content) * 0.6)] = b"\xff" * len(
        content[int(len(content) * 0.4) : int(len(content) * 0.6)]
    )
    path.write_bytes(content)
    part = (slice(first, first + 1), slice(3, 9), slice(20, 32))
    np.testing.assert_array_equal(store.read_image("a", part), image[(slice(None), *part)])
    with pytest.raises(DatasetError, match="damaged"):
        store.read_image("a", (slice(middle, middle + 1), slice(None), slice(None)))


def test_a_copy_in_an_object_store_is_read_through_fsspec(build: Callable[..., Store]) -> None:
    local = build(labeled=("a", "b"))
    base = Path(local.url).parent
    memory = fsspec.filesystem("memory")
    for path in base.rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/prepared/{path.relative_to(base)}", path.read_bytes())
    remote = Store.open(f"memory://prepared/{Path(local.url).name}")
    part = (slice(1, 2), slice(2, 19), slice(None))
    for store in (remote, pickle.loads(pickle.dumps(remote)), Store.open(f"file://{local.url}")):  # noqa: S301
        np.testing.assert_array_equal(store.read_image("c", part), local.read_image("c", part))
        np.testing.assert_array_equal(store.read_label("b", part), local.read_label("b", part))
        assert store.record("a") == local.record("a")
        assert store.foreground("a").keys() == local.foreground("a").keys()
    memory.rm("/prepared", recursive=True)


def test_a_relative_path_is_the_same_store(
    build: Callable[..., Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = build()
    monkeypatch.chdir(tmp_path)
    relative = Store.open(Path(store.url).relative_to(tmp_path))
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(relative.read_label("a", ALL), store.read_label("a", ALL))


def test_no_store_is_said_to_be_none(tmp_path: Path, build: Callable[..., Store]) -> None:
    with pytest.raises(DatasetError, match=r"store\.json does not exist"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text("[1, ")
    with pytest.raises(DatasetError, match=r"store\.json is damaged"):
        Store.open(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 0}')
    with pytest.raises(DatasetError, match="another version"):
        Store.open(tmp_path)
    with pytest.raises(DatasetError, match="case 'z' is not in the store"):
        build().shape("z")


def test_bad_cases_are_named_with_the_cure(dataset: Dataset, build: Callable[..., Store], tmp_path: Path) -> None:
    labels, images = dataset.root / "labelsTr", dataset.root / "imagesTr"
    build()
    before = written(tmp_path / "cache")
    save(labels / "b.nii.gz", np.full((5, 20, 24), 7, dtype=np.uint8), lps((5, 1, 1)))
    with pytest.raises(DatasetError, match=r"b\.nii\.gz .*not in dataset\.json.*: 7"):
        build(labeled=("b",))
    save(labels / "b.nii.gz", np.zeros((5, 20, 23), dtype=np.uint8), lps((5, 1, 1)))
    with pytest.raises(DatasetError, match=r"labelsTr/b\.nii\.gz .*b_0000\.nii\.gz.*shape"):
        build(labeled=("b",))
    save(labels / "b.nii.gz", np.zeros((5, 20, 24), dtype=np.uint8), lps((5, 1, 2)))
    with pytest.raises(DatasetError, match=r"b\.nii\.gz.*spacing"):
        build(labeled=("b",))
    broken = np.zeros((5, 20, 24), dtype=np.float32)
    broken[1, 2, 3] = np.nan
    save(images / "b_0000.nii.gz", broken, lps((5, 1, 1)))
    with pytest.raises(ImageError, match=r"b_0000\.nii\.gz"):
        build()
    with pytest.raises(ConfigError, match=r"normalizes 1 channels, but .* has 2"):
        build(plan=plan_of(channels=1))
    after = written(tmp_path / "cache")
    assert {path: after[path] for path in before if Path(path).stem != "b"}.items() <= before.items()


def test_a_labeled_case_without_label_file_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", {"a": (np.zeros((1, 2, 8, 8)), None)})
    with pytest.raises(DatasetError, match="a has no label file"):
        build_store(dataset, ["a"], plan_of(channels=1), root=tmp_path, with_labels=["a"])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_faults_of_all_cases_are_told_together_and_the_rest_is_prepared(
    dataset: Dataset, build: Callable[..., Store], tmp_path: Path, workers: int
) -> None:
    """A link to nothing, voxels that are not finite with a label of their own fault, and a validation label."""
    images, labels = dataset.root / "imagesTr", dataset.root / "labelsTr"
    gone = images / "a_0001.nii.gz"
    gone.unlink()
    gone.symlink_to(tmp_path / "nowhere.nii.gz")
    (labels / "a.nii.gz").write_bytes(b"no label")
    (labels / "b.nii.gz").write_bytes(b"no label")
    with pytest.raises(ScantlyError) as caught:
        build(check_labels=["b"], workers=workers)
    head, *lines = str(caught.value).splitlines()
    assert head == "2 of 3 cases cannot be used; mend them or take them out, and start again:"
    paths = [gone, labels / "a.nii.gz", labels / "b.nii.gz"]
    assert [line.split()[0] for line in lines] == [str(path) for path in paths]
    assert {Path(path).stem for path in written(tmp_path / "cache")} == {"b", "c"}


def test_labels_that_are_checked_are_not_prepared(build: Callable[..., Store], tmp_path: Path) -> None:
    store = build(check_labels=["b"])
    assert not store.has_label("b")
    assert {path.stem for path in (tmp_path / "cache").rglob("labels/*")} == {"a"}


def test_a_case_that_does_not_fit_into_memory_is_named(
    build: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("scantly.data.build.prepare", short)
    with pytest.raises(ImageError, match=r"a_0000\.nii(\.gz)? needs more memory"):
        build(workers=1)
