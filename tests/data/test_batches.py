"""Batches: what each iteration draws, whatever the workers, ranks and history; labels hidden; patches exact.

The voxels of the test cohort hold their own address, so every row tells where it was cut.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_datasets import write_dataset

from scantly.data.batches import BatchSource, RawBatch
from scantly.data.build import build_store
from scantly.data.loader import make_loader
from scantly.data.plan import Plan
from scantly.data.pseudo_labels import PseudoLabels
from scantly.data.store import Store
from scantly.errors import ConfigError, DatasetError

NAMES = ("a", "b", "c", "d", "e", "f")
LABELED, UNLABELED = NAMES[:3], NAMES[3:]
DEPTH, HEIGHT, WIDTH = 5, 20, 24
SIZE = DEPTH * HEIGHT * WIDTH


def plan_of(dims: int, **values: Any) -> Plan:
    given = {
        "spatial_dims": dims,
        "normalization": [{"scheme": "none"}],
        "patch_size": [HEIGHT - 4, WIDTH - 8] if dims == 2 else [3, 16, 16],
        "labeled_batch_size": 1,
        "unlabeled_batch_size": 1,
        "foreground_fraction": 0,
    }
    return Plan.model_construct(**{**Plan.model_validate(given).__dict__, **values})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Voxel value = 1 + address; label = address modulo 3 (in case c: class 1 on one slice only)."""
    root = tmp_path_factory.mktemp("cohort")
    cases: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for number, name in enumerate(NAMES):
        address = np.arange(SIZE).reshape(DEPTH, HEIGHT, WIDTH) + number * SIZE
        label = address % 3
        if name == "c":
            label = np.zeros_like(address)
            label[2, 4:6, 3:5] = 1
        cases[name] = (1.0 + address[None], label if name != "f" else None)
    dataset = write_dataset(root / "d", cases)
    for name in UNLABELED[:2]:
        (root / "d" / "labelsTr" / f"{name}.nii.gz").write_bytes(b"poison: a hidden label was opened")
    built = build_store(dataset, NAMES, plan_of(2), root=root, with_labels=LABELED)
    for leftover in (root / "d").rglob("*.nii.gz"):
        leftover.unlink()  # batches read the store alone
    return built


def source_of(store: Store, dims: int = 2, rows: tuple[int, int] = (4, 3), **options: Any) -> BatchSource:
    settings = {k: options.pop(k) for k in list(options) if k in Plan.model_fields}
    given = {"seed": 7, "labeled": LABELED, "unlabeled": UNLABELED, **options}
    labeled, unlabeled = given.pop("labeled"), given.pop("unlabeled")
    plan = plan_of(dims, **settings)
    return BatchSource(
        store, labeled, unlabeled, plan, labeled_batch_size=rows[0], unlabeled_batch_size=rows[1], **given
    )


def places(rows: torch.Tensor) -> list[tuple[str, int, int, int]]:
    """Case and corner (z, y, x) of each row, read from its first voxel, after checking all the others."""
    found = []
    for row in rows[:, 0].long().numpy() - 1:
        block = row if row.ndim == 3 else row[None]
        start = int(block[0, 0, 0])
        offsets = np.indices(block.shape)
        expected = start + (offsets[0] * HEIGHT + offsets[1]) * WIDTH + offsets[2]
        np.testing.assert_array_equal(block, expected)
        case, rest = divmod(start, SIZE)
        z, rest = divmod(rest, HEIGHT * WIDTH)
        found.append((NAMES[case], z, *divmod(rest, WIDTH)))
    return found


def same(a: RawBatch, b: RawBatch) -> bool:
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("labeled", "labels", "unlabeled"))
    return tensors and (a.labeled_cases, a.unlabeled_cases) == (b.labeled_cases, b.unlabeled_cases)


@pytest.mark.parametrize("dims", [2, 3])
def test_rows_are_patches_with_their_own_labels(store: Store, dims: int) -> None:
    source = source_of(store, dims)
    patch = source.plan.patch_size
    corners = set()
    for iteration in range(20):
        batch = source[iteration]
        assert batch.labeled.shape == (4, 1, *patch)
        assert batch.labels.shape == (4, *patch)
        assert batch.unlabeled.shape == (3, 1, *patch)
        assert (batch.labeled.dtype, batch.labels.dtype) == (torch.float32, torch.uint8)
        assert batch.pseudo_labels is None
        drawn = places(batch.labeled)
        assert tuple(case for case, *_ in drawn) == batch.labeled_cases
        assert tuple(case for case, *_ in places(batch.unlabeled)) == batch.unlabeled_cases
        assert set(batch.labeled_cases) <= set(LABELED)
        assert set(batch.unlabeled_cases) <= set(UNLABELED)
        for row, (case, *corner) in enumerate(drawn):
            corners.add(tuple(corner))
            if case != "c":
                np.testing.assert_array_equal(batch.labels[row], (batch.labeled[row, 0].long() - 1) % 3)
    # every position in which the patch lies inside comes up, the last one too
    if dims == 2:
        assert {z for z, *_ in corners} == set(range(DEPTH))
    else:
        assert {z for z, *_ in corners} == {0, 1, 2}
    assert {x for *_, x in corners} == set(range(WIDTH - 16 + 1))


def test_labels_of_case_c_are_where_they_were_drawn(store: Store) -> None:
    source = source_of(store, patch_size=(HEIGHT, WIDTH))
    for iteration in range(10):
        batch = source[iteration]
        for row, (case, z, *_) in enumerate(places(batch.labeled)):
            if case == "c":
                expected = np.zeros((HEIGHT, WIDTH))
                expected[4:6, 3:5] = z == 2
                np.testing.assert_array_equal(batch.labels[row], expected)


@settings(max_examples=25)
@given(rows=st.integers(1, 15), seed=st.integers(0, 2**40))
def test_each_labeled_slice_comes_at_most_once_per_epoch(store: Store, rows: int, seed: int) -> None:
    source = source_of(store, rows=(rows, 0), seed=seed)
    length = len(LABELED) * DEPTH // rows
    assert source.iterations_per_epoch == length
    epochs = []
    for epoch in range(2):
        drawn = []
        for step in range(length):
            batch = source[epoch * length + step]
            assert len(batch.labeled) == rows
            drawn += [place[:2] for place in places(batch.labeled)]
        assert len(set(drawn)) == len(drawn) == length * rows  # the incomplete last group is dropped
        epochs.append(drawn)
    if rows < 8:
        assert epochs[0] != epochs[1]


def test_fewer_items_than_rows_repeat_with_other_patches(store: Store) -> None:
    source = source_of(store, 3, rows=(4, 0), labeled=("a", "b"))
    assert source.iterations_per_epoch == 0
    batches = [source[iteration] for iteration in range(6)]
    assert all(Counter(batch.labeled_cases) == {"a": 2, "b": 2} for batch in batches)
    assert len({place for batch in batches for place in places(batch.labeled)}) > 12


def test_the_unlabeled_stream_is_an_endless_chain_of_shuffles(store: Store) -> None:
    source = source_of(store, rows=(1, 4))
    items = len(UNLABELED) * DEPTH
    drawn = [place[:2] for i in range(15) for place in places(source[i].unlabeled)]
    assert len(drawn) == 4 * items
    passes = [drawn[start : start + items] for start in range(0, len(drawn), items)]
    assert all(len(set(one)) == items for one in passes)
    assert len({tuple(one) for one in passes}) == 4


def test_a_batch_depends_on_seed_and_iteration_alone(store: Store) -> None:
    source = source_of(store)
    forward = [source[iteration] for iteration in range(12)]
    anew = source_of(store)
    assert all(same(anew[iteration], forward[iteration]) for iteration in reversed(range(12)))
    assert all(same(pickle.loads(pickle.dumps(source))[i], forward[i]) for i in (11, 3))  # noqa: S301
    other = source_of(store, seed=8)
    assert not any(same(other[iteration], forward[iteration]) for iteration in range(12))
    assert len({batch.labeled_cases for batch in forward}) > 6


def test_the_labeled_rows_do_not_depend_on_the_number_of_unlabeled_ones(store: Store) -> None:
    few, many = source_of(store, rows=(4, 0)), source_of(store, rows=(4, 9))
    for iteration in range(6):
        assert torch.equal(few[iteration].labeled, many[iteration].labeled)
    assert few[0].unlabeled.shape == (0, 1, *few.plan.patch_size)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_one_shuffle_without_overlap(store: Store, world: int) -> None:
    one = source_of(store, rows=(2 * world, 2 * world))
    ranks = [source_of(store, rows=(2, 2), rank=rank, world_size=world) for rank in range(world)]
    for iteration in range(8):
        for name in ("labeled", "unlabeled"):
            drawn = [p[:2] for rank in ranks for p in places(getattr(rank[iteration], name))]
            assert drawn == [p[:2] for p in places(getattr(one[iteration], name))]


def test_ranks_place_their_patches_independently(store: Store) -> None:
    ranks = [source_of(store, 3, rows=(3, 0), rank=rank, world_size=2) for rank in range(2)]
    corners = [[p[1:] for i in range(4) for p in places(rank[i].labeled)] for rank in ranks]
    assert corners[0] != corners[1]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("fraction", "forced"), [(0.25, 1), (0.5, 2), (1.0, 4)])
def test_foreground_rows_hold_foreground(store: Store, dims: int, fraction: float, forced: int) -> None:
    # case c has four foreground voxels on one slice of five
    patch = (16, 16) if dims == 2 else (1, 16, 16)
    options = {"labeled": ("c",), "foreground_fraction": fraction, "patch_size": patch}
    source = source_of(store, dims, rows=(4, 0), **options)
    free = set()
    for iteration in range(40):
        batch = source[iteration]
        held = batch.labels.flatten(1).amax(dim=1) > 0
        assert held[4 - forced :].all()
        free |= set(held[: 4 - forced].tolist())
        assert all(z == 2 for _, z, *_ in places(batch.labeled)[4 - forced :])
    assert free == (set() if forced == 4 else {False, True})


def test_every_class_is_met_equally_often_around_foreground(tmp_path: Path) -> None:
    label = np.ones((4, 32, 32), dtype=np.uint8)
    label[0, 0, 0] = 2
    dataset = write_dataset(tmp_path / "d", {"a": (np.zeros((1, *label.shape)), label)})
    plan = plan_of(3, patch_size=(1, 1, 1), foreground_fraction=1.0)
    one = build_store(dataset, ["a"], plan, root=tmp_path, with_labels=["a"])
    source = BatchSource(one, ["a"], [], plan, labeled_batch_size=50, unlabeled_batch_size=0, seed=0)
    share = np.mean([source[i].labels.numpy() == 2 for i in range(10)])
    assert 0.4 < share < 0.6


def test_slices_with_enough_classes_are_drawn_in_2d(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    label = np.zeros((8, 24, 24), dtype=np.uint8)
    label[1, 3, 3], label[1, 20, 20] = 1, 2  # complete, but too wide for one patch of 16
    for depth in (2, 4, 6, 7):
        label[depth, 3, depth], label[depth, 5, 5] = 1, 2
    label[3] = 1
    label[5, 7, 7] = 1
    other = np.zeros_like(label)
    other[2, 5, 5] = 2
    cases = {name: (np.zeros((1, *x.shape)), x) for name, x in (("a", label), ("b", other), ("c", 0 * label))}
    dataset = write_dataset(tmp_path / "d", cases)
    whole = plan_of(2, patch_size=(24, 24))
    one = build_store(dataset, list(cases), whole, root=tmp_path, with_labels=["a", "b", "c"])
    caplog.clear()

    def source_with(classes: int, plan: Plan = whole, names: tuple[str, ...] = ("a", "b", "c")) -> BatchSource:
        rows = {"labeled_batch_size": 20, "unlabeled_batch_size": 0, "labeled_classes": classes}
        return BatchSource(one, names, [], plan, seed=1, **rows)

    with caplog.at_level("INFO", "scantly"):
        source = source_with(3)  # five slices are enough, for any number of rows
        assert [source.items[0].at(item) for item in range(5)] == [("a", z) for z in (1, 2, 4, 6, 7)]
        assert len(source.items[0]) == 5
        assert all(set(np.unique(row)) == {0, 1, 2} for i in range(4) for row in source[i].labels)
        source = source_with(3, plan_of(2, patch_size=(16, 16)))
        counts = Counter(len(np.unique(row)) for i in range(8) for row in source[i].labels)
        assert counts == {3: 128, 2: 32}
        assert not caplog.text
        # only one slice of b and c has any foreground: one class less is asked for, until all are drawn
        assert len(source_with(3, names=("b", "c")).items[0]) == 16
        assert "fewer than 5 labeled slices hold 3 classes: those with 1 are drawn, which is all" in caplog.text
        # with two classes asked for, slice 3 of a, all of class 1, does not count
        source = source_with(2)
        assert [source.items[0].at(item) for item in range(7)] == [*[("a", z) for z in (1, 2, 4, 5, 6, 7)], ("b", 2)]


def test_patches_with_enough_classes_are_drawn_in_3d(tmp_path: Path) -> None:
    label = np.zeros((16, 40, 40), dtype=np.uint8)
    label[10:12, 20:22, 20:22], label[12, 24, 24] = 1, 2
    label[0, :, :] = 1
    half = np.ones_like(label)
    cases = {name: (np.zeros((1, *label.shape)), x) for name, x in (("a", label), ("b", half))}
    dataset = write_dataset(tmp_path / "d", cases)
    plan = plan_of(3, patch_size=(8, 16, 16))
    one = build_store(dataset, ["a", "b"], plan, root=tmp_path, with_labels=["a", "b"])
    rows = {"labeled_batch_size": 2, "unlabeled_batch_size": 0, "seed": 1}
    source = BatchSource(one, ["a"], [], plan, labeled_classes=3, **rows)  # one case of one is enough: patches differ
    for iteration in range(20):
        assert all(set(np.unique(row)) == {0, 1, 2} for row in source[iteration].labels)
    both = BatchSource(one, ["a", "b"], [], plan, labeled_classes=3, **rows)  # one of two is not
    assert both.classes[0] == 1
    assert {name for i in range(5) for name in both[i].labeled_cases} == {"a", "b"}


@pytest.mark.parametrize("dims", [2, 3])
def test_extra_rows_are_a_stream_of_their_own(store: Store, dims: int) -> None:
    alone = source_of(store, dims)
    both = source_of(store, dims, extra_batch_size=3, extra_classes=2)
    seen = set()
    for iteration in range(6):
        plain, batch = alone[iteration], both[iteration]
        assert torch.equal(plain.labeled, batch.labeled)
        assert torch.equal(plain.unlabeled, batch.unlabeled)
        assert plain.extra is None
        assert batch.extra is not None
        assert batch.extra_labels is not None
        assert batch.extra.shape == (3, *batch.labeled.shape[1:])
        assert batch.extra_labels.shape == (3, *batch.labels.shape[1:])
        assert all(len(np.unique(row)) >= 2 for row in batch.extra_labels)
        seen |= {row.numpy().tobytes() for row in batch.extra}
    assert len(seen) > 3


@pytest.mark.parametrize("dims", [2, 3])
def test_unlabeled_rows_with_classes_follow_their_pseudo_labels(store: Store, tmp_path: Path, dims: int) -> None:
    pseudo = PseudoLabels(tmp_path / "pseudo")
    names = [name for name in store.cases if not store.has_label(name)]
    for name in names:
        label = np.zeros(store.shape(name), dtype=np.uint8)
        if name == names[0]:
            label[:, 4:8, 4:8], label[:, 9, 9] = 1, 2
        pseudo.write(name, label)
    with pytest.raises(ConfigError, match="pseudo-labels"):
        source_of(store, dims, unlabeled_classes=3)
    assert source_of(store, dims, rows=(1, 0), unlabeled_classes=3)[0].unlabeled.shape[0] == 0  # none are asked for
    rows = {"rows": (1, 1), "pseudo_labels": pseudo, "unlabeled_classes": 3, "unlabeled": names[:1]}
    source = source_of(store, dims, patch_size=(3, 12, 12)[3 - dims :], **rows)
    for iteration in range(8):
        batch = source[iteration]
        assert batch.unlabeled_cases == (names[0],)
        assert batch.pseudo_labels is not None
        assert set(np.unique(batch.pseudo_labels)) == {0, 1, 2}


@pytest.mark.parametrize(("dims", "patch"), [(2, (32, 27)), (3, (8, 16, 27)), (3, (9, 32, 32))])
def test_small_cases_are_surrounded_by_zeros(store: Store, dims: int, patch: tuple[int, ...]) -> None:
    batch = source_of(store, dims, patch_size=patch)[3]
    full = patch if dims == 3 else (1, *patch)
    shape = (DEPTH if dims == 3 else 1, HEIGHT, WIDTH)
    inner = []
    for side, n in zip(full, shape, strict=True):
        before = max(side - n, 0) // 2
        inner.append(slice(before, before + min(side, n)))
    for image, label in ((batch.labeled, batch.labels), (batch.unlabeled, None)):
        assert image.shape[2:] == patch
        volume = image[:, 0].reshape(len(image), *full)
        inside = volume[(slice(None), *inner)]
        assert (inside > 0).all()
        assert inside.count_nonzero() == volume.count_nonzero()
        assert len(places(inside[:, None])) == len(image)
        if label is not None:
            labels = label.reshape(len(label), *full)
            assert labels.count_nonzero() == labels[(slice(None), *inner)].count_nonzero() > 0


def test_cases_of_different_size_share_a_batch(tmp_path: Path) -> None:
    cases = {name: (np.ones((1, *shape)), np.ones(shape)) for name, shape in (("a", (3, 40, 10)), ("b", (30, 8, 90)))}
    dataset = write_dataset(tmp_path / "d", cases)
    plan = plan_of(3, patch_size=(16, 16, 16))
    one = build_store(dataset, ["a", "b"], plan, root=tmp_path, with_labels=["a", "b"])
    source = BatchSource(one, ["a", "b"], [], plan, labeled_batch_size=2, unlabeled_batch_size=0, seed=0)
    sums = dict(zip(source[0].labeled_cases, source[0].labeled.sum(dim=(1, 2, 3, 4)).tolist(), strict=True))
    assert sums == {"a": 3 * 16 * 10, "b": 16 * 8 * 16}


def test_pseudo_labels_lie_on_the_unlabeled_patches(store: Store, tmp_path: Path) -> None:
    pseudo = PseudoLabels.open(tmp_path / "pseudo")
    for number, name in enumerate(UNLABELED, start=3):
        address = np.arange(SIZE).reshape(DEPTH, HEIGHT, WIDTH) + number * SIZE
        pseudo.write(name, address % 5)
    for dims in (2, 3):
        source = source_of(store, dims, pseudo_labels=pseudo)
        for batch in (source[4], pickle.loads(pickle.dumps(source))[4]):  # noqa: S301
            assert batch.pseudo_labels is not None
            assert batch.pseudo_labels.dtype == torch.uint8
            expected = (batch.unlabeled[:, 0].long() - 1) % 5
            assert torch.equal(batch.pseudo_labels.long(), expected)
    pseudo.write("d", np.full((DEPTH, HEIGHT, WIDTH), 9))
    assert (pseudo.read("d", (slice(0, 2), slice(None), slice(3, 4))) == 9).all()
    with pytest.raises(DatasetError, match=r"z\.b2nd does not exist"):
        pseudo.read("z", (slice(None), slice(None), slice(None)))


def test_voxels_without_a_pseudo_label_are_read_back_and_are_no_class(store: Store, tmp_path: Path) -> None:
    pseudo, label = PseudoLabels.open(tmp_path / "pseudo"), np.zeros((DEPTH, HEIGHT, WIDTH), dtype=np.int16)
    label[0], label[1, 0] = -1, 2
    label[2, 0], label[2, 1] = -1, 3
    pseudo.write("d", label)
    assert (pseudo.read("d", (slice(None),) * 3) == label).all()
    presence = PseudoLabels.open(tmp_path / "pseudo").presence("d")
    assert [present.tolist() for present in presence.classes_per_slice[:4]] == [[], [0, 2], [0, 3], [0]]
    assert set(presence.foreground) == {2, 3}
    assert presence.count == 3
    for name in UNLABELED[1:]:
        pseudo.write(name, np.zeros((DEPTH, HEIGHT, WIDTH), dtype=np.uint8))
    drawn = [source_of(store, pseudo_labels=pseudo)[iteration].pseudo_labels for iteration in range(12)]
    found = {int(value) for rows in drawn if rows is not None for value in rows.unique()}
    assert {-1, 0} < found <= {-1, 0, 2, 3}


def test_pseudo_labels_do_not_change_what_is_drawn(store: Store, tmp_path: Path) -> None:
    pseudo = PseudoLabels.open(tmp_path)
    for name in UNLABELED:
        pseudo.write(name, np.zeros((DEPTH, HEIGHT, WIDTH), dtype=np.uint8))
    assert same(source_of(store)[5], source_of(store, pseudo_labels=pseudo)[5])


def copied(batches: Iterator[RawBatch]) -> list[RawBatch]:
    return [
        RawBatch(b.labeled.clone(), b.labels.clone(), b.unlabeled.clone(), b.labeled_cases, b.unlabeled_cases)
        for b in batches
    ]


def test_loader_gives_the_same_batches_with_any_number_of_workers(store: Store) -> None:
    source = source_of(store, 3)
    expected = [source[iteration] for iteration in range(5, 12)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for workers in (0, 2):
        found = copied(iter(make_loader(source, 5, 12, workers, pin_memory=False)))
        assert len(found) == 7
        assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert list(make_loader(source, 4, 4, 0, pin_memory=False)) == []


def test_pinning_keeps_everything_and_pins_every_tensor(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pseudo = PseudoLabels.open(tmp_path)
    for name in UNLABELED:
        pseudo.write(name, np.zeros((DEPTH, HEIGHT, WIDTH), dtype=np.uint8))
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.data_ptr()) or tensor.clone())
    batch = source_of(store, pseudo_labels=pseudo)[0]
    assert same(batch.pin_memory(), batch)
    assert batch.pseudo_labels is not None
    tensors = (batch.labeled, batch.labels, batch.unlabeled, batch.pseudo_labels)
    assert pinned == [tensor.data_ptr() for tensor in tensors]


def test_an_error_in_a_worker_is_told(store: Store, tmp_path: Path) -> None:
    source = source_of(store, pseudo_labels=PseudoLabels.open(tmp_path))
    for workers in (0, 1):
        with pytest.raises(DatasetError, match=r"^[^\n]*b2nd does not exist[^\n]*$"):  # one sentence, no traceback
            next(iter(make_loader(source, 0, 4, workers, pin_memory=False)))


def test_a_labeled_case_without_label_is_refused(store: Store) -> None:
    with pytest.raises(DatasetError, match="labeled case 'd' has no label"):
        source_of(store, labeled=("a", "d"))
    with pytest.raises(DatasetError, match="no unlabeled case to draw 3 rows from"):
        source_of(store, unlabeled=())
    assert source_of(store, rows=(2, 0), unlabeled=())[0].unlabeled_cases == ()


@pytest.mark.parametrize("numbers", [{"rows": (0, 1)}, {"rows": (1, -1)}, {"seed": -1}, {"rank": 2, "world_size": 2}])
def test_numbers_out_of_range_are_refused(store: Store, numbers: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="batches of"):
        source_of(store, **numbers)


def test_a_long_resume_costs_no_replay(store: Store) -> None:
    source = source_of(store)
    assert same(source[10**9], source_of(store)[10**9])
    assert len({p[:2] for p in places(source[10**9].labeled)}) == 4
