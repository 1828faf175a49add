"""Batches of volumes: the literature's padding, few cases, and patches around foreground."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_datasets import write_dataset

from scantly.data.batches import BatchSource
from scantly.data.build import build_store
from scantly.data.plan import Plan
from scantly.data.store import Store

SHAPES = {"a": (20, 30, 24), "b": (20, 24, 40), "c": (17, 18, 19), "d": (5, 60, 21)}


def address(shape: tuple[int, ...]) -> np.ndarray:
    """Every voxel holds 1 + its number; zeros are padding."""
    return 1.0 + np.arange(np.prod(shape)).reshape(shape)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    root = tmp_path_factory.mktemp("volumes")
    cases = {}
    for name, shape in SHAPES.items():
        label = (address(shape) % 3).astype(np.uint8)
        cases[name] = (address(shape)[None], label)
    dataset = write_dataset(root / "d", cases)
    return build_store(dataset, list(SHAPES), plan_of(), root=root, with_labels=list(SHAPES))


def plan_of(**values: Any) -> Plan:
    given = {
        "spatial_dims": 3,
        "normalization": [{"scheme": "none"}],
        "patch_size": [16, 16, 16],
        "labeled_batch_size": 1,
        "unlabeled_batch_size": 1,
        "foreground_fraction": 0,
    }
    return Plan.model_construct(**{**Plan.model_validate(given).__dict__, **values})


def source_of(store: Store, cases: tuple[str, ...], rows: tuple[int, int] = (2, 2), **values: Any) -> BatchSource:
    seed = values.pop("seed", 0)
    return BatchSource(
        store, cases, cases, plan_of(**values), labeled_batch_size=rows[0], unlabeled_batch_size=rows[1], seed=seed
    )


def padded_as_published(volume: np.ndarray, patch: tuple[int, ...], margin: int) -> np.ndarray:
    """The padding of LA's public random crop, where ``margin`` is 3, written down anew."""
    if all(n > side for n, side in zip(volume.shape, patch, strict=True)):
        return volume
    pads = [max((side - n) // 2 + margin, 0) for n, side in zip(volume.shape, patch, strict=True)]
    return np.pad(volume, [(pad, pad) for pad in pads])


@settings(max_examples=60)
@given(
    case=st.sampled_from(sorted(SHAPES)),
    patch=st.tuples(*[st.integers(4, 40)] * 3),
    margin=st.integers(1, 5),
    fraction=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 999),
)
@example(case="d", patch=(5, 4, 4), margin=5, fraction=0.0, seed=0)
def test_patches_lie_in_the_volume_padded_as_published(
    store: Store, case: str, patch: tuple[int, int, int], margin: int, fraction: float, seed: int
) -> None:
    options = {"patch_size": patch, "pad_margin": margin, "foreground_fraction": fraction, "seed": seed}
    batch = source_of(store, (case,), **options)[0]
    padded = padded_as_published(address(SHAPES[case]), patch, margin)
    windows = np.lib.stride_tricks.sliding_window_view(padded, patch)
    for image in (*batch.labeled[:, 0].numpy(), *batch.unlabeled[:, 0].numpy()):
        assert image.shape == patch
        inside = np.argwhere(image)
        assert len(inside)
        place = inside[0]  # one voxel of the case tells where the patch was cut
        corner = np.argwhere(padded == image[tuple(place)])[0] - place
        np.testing.assert_array_equal(image, windows[tuple(corner)])
    labels = np.where(batch.labeled[:, 0] > 0, batch.labeled[:, 0] % 3, 0)
    np.testing.assert_array_equal(batch.labels, labels)


def test_a_margin_as_large_as_the_patch_leaves_no_patch_in_the_padding_alone(store: Store) -> None:
    """By hand, case d of 5 x 60 x 21 and patches of 5 x 4 x 4 with a margin of 5.

    Published, z is padded by 5 at both ends, so that a patch might begin at -5 or 5 and hold nothing of the case;
    y and x are long enough for no padding: (4 - 60) // 2 + 5 and (4 - 21) // 2 + 5 are negative.
    """
    source = source_of(store, ("d",), rows=(8, 8), patch_size=(5, 4, 4), pad_margin=5)
    corners = set()
    for iteration in range(60):
        batch = source[iteration]
        for image in (*batch.labeled[:, 0].numpy(), *batch.unlabeled[:, 0].numpy()):
            place = np.argwhere(image)[0]
            voxel = np.array(np.unravel_index(int(image[tuple(place)]) - 1, SHAPES["d"]))
            corners.add(tuple((voxel - place).tolist()))
    assert {corner[0] for corner in corners} == set(range(-4, 5))
    assert min(corner[1:] for corner in corners) >= (0, 0)
    assert max(corner[1] for corner in corners) <= 56
    assert max(corner[2] for corner in corners) <= 17


@pytest.mark.parametrize("margin", [0, 3])
def test_every_corner_of_the_padded_volume_comes_up(store: Store, margin: int) -> None:
    """By hand, case c of 17 x 18 x 19 and patches of 17 x 16 x 16: the first side is not larger than the patch.

    Its padding is 3 at both ends of z, (16 - 18) // 2 + 3 = 2 of y and (16 - 19) // 2 + 3 = 1 of x.
    """
    source = source_of(store, ("c",), rows=(8, 8), patch_size=(17, 16, 16), pad_margin=margin)
    corners = set()
    for iteration in range(60):
        batch = source[iteration]
        for image in (*batch.labeled[:, 0].numpy(), *batch.unlabeled[:, 0].numpy()):
            place = np.argwhere(image)[0]
            voxel = np.array(np.unravel_index(int(image[tuple(place)]) - 1, SHAPES["c"]))
            corners.add(tuple((voxel - place).tolist()))
    ranges = {0: ((0, 0), (0, 2), (0, 3)), 3: ((-3, 3), (-2, 4), (-1, 4))}[margin]
    for axis, (low, high) in enumerate(ranges):
        assert {corner[axis] for corner in corners} == set(range(low, high + 1))


def test_a_margin_does_nothing_to_cases_larger_than_the_patch(store: Store) -> None:
    """Nor does it draw other patches from them."""
    for iteration in range(4):
        one, other = (source_of(store, ("a", "b"), pad_margin=margin)[iteration] for margin in (0, 3))
        assert np.array_equal(one.labeled, other.labeled)
        assert np.array_equal(one.unlabeled, other.unlabeled)
        assert (one.labeled > 0).all()


def test_the_margin_is_in_plane_in_2d(store: Store) -> None:
    plan = {"spatial_dims": 2, "patch_size": (32, 32), "pad_margin": 3}
    source = source_of(store, ("a",), rows=(8, 0), **plan)
    shape = SHAPES["a"]
    columns = set()
    for iteration in range(40):
        for image in source[iteration].labeled[:, 0].numpy():
            place = np.argwhere(image)[0]
            z, _, x = np.unravel_index(int(image[tuple(place)]) - 1, shape)
            columns.add(int(x) - int(place[1]))
            assert set(np.unravel_index(image[image > 0].astype(int) - 1, shape)[0].tolist()) == {int(z)}
    assert columns == set(range(-7, 24 + 7 - 32 + 1))  # (32 - 24) // 2 + 3 = 7


@pytest.mark.parametrize("labeled", [1, 2, 3])
def test_few_cases_fill_batches_with_other_patches(store: Store, labeled: int) -> None:
    """Of both streams; every case about equally often."""
    cases = tuple(SHAPES)[:labeled]
    source = source_of(store, cases, rows=(4, 5), patch_size=(4, 5, 6))
    for stream, rows in (("labeled", 4), ("unlabeled", 5)):
        drawn: Counter[str] = Counter()
        for iteration in range(12):
            batch = source[iteration]
            images = getattr(batch, stream).numpy()
            names = getattr(batch, f"{stream}_cases")
            drawn.update(names)
            assert len(images) == rows
            assert len({image.tobytes() for image in images}) == rows
            assert max(Counter(names).values()) - min(Counter(names).values()) <= 2
        assert max(drawn.values()) - min(drawn.values()) <= 1
        assert set(drawn) == set(cases)


def test_foreground_rows_hold_the_structure_wherever_it_lies(tmp_path: Path) -> None:
    label = np.zeros((48, 48, 48), dtype=np.uint8)
    label[0, 47, 20] = 1
    label[30:34, 1, 46] = 2
    dataset = write_dataset(tmp_path / "d", {"a": (address(label.shape)[None], label)})
    one = build_store(dataset, ["a"], plan_of(), root=tmp_path, with_labels=["a"])
    seen: Counter[int] = Counter()
    for iteration in range(30):
        batch = source_of(one, ("a",), rows=(4, 0), foreground_fraction=0.5)[iteration]
        for row in batch.labels[2:]:
            found = np.unique(row)[1:].tolist()
            assert len(found) == 1
            seen.update(found)
    assert 15 <= seen[1] <= 45  # of 60: both classes equally often
