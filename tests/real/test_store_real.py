"""Plan, store and batches on the real ACDC and LA scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from scantly import imaging
from scantly.data.batches import BatchSource
from scantly.data.build import build_store
from scantly.data.dataset import Dataset
from scantly.data.plan import make_plan
from scantly.data.prepare import prepare, restore_label
from scantly.data.splits import resolve_split

pytestmark = pytest.mark.real

LITERATURE = {
    "size": [256, 256],
    "interpolation": "nearest",
    "normalization": [{"scheme": "minmax"}],
    "foreground_fraction": 0,
}
ALL = (slice(None), slice(None), slice(None))


def test_short_axis_heart_is_planned_in_2d_and_left_atrium_in_3d(real_data: Path) -> None:
    acdc, la = Dataset.open(real_data / "acdc"), Dataset.open(real_data / "la")
    heart = make_plan(acdc, resolve_split(acdc, labeled=3))
    atrium = make_plan(la, resolve_split(la, labeled=4))
    assert (heart.spatial_dims, atrium.spatial_dims) == (2, 3)
    assert heart.fingerprint["cases"] == 140
    assert heart.fingerprint["anisotropy"] == pytest.approx(6.4)
    assert heart.fingerprint["max_shape"] == [18, 512, 428]
    assert atrium.fingerprint["min_shape"][0] == atrium.fingerprint["max_shape"][0] == 88
    assert atrium.spacing == (0.625, 0.625, 0.625)


def test_three_labeled_patients_are_68_slices_prepared_as_in_the_literature(real_data: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(real_data / "acdc")
    split = resolve_split(dataset, labeled=3)
    unlabeled = split.unlabeled[:2]
    plan = make_plan(dataset, split, overrides=LITERATURE)
    names = [*split.labeled, *unlabeled]
    store = build_store(dataset, names, plan, root=tmp_path, with_labels=split.labeled)
    source = BatchSource(
        store, split.labeled, unlabeled, plan, labeled_batch_size=12, unlabeled_batch_size=12, seed=1337
    )
    assert len(source.items[0]) == 68
    assert source.iterations_per_epoch == 5
    assert source[0].labeled.shape == (12, 1, 256, 256)
    name = split.labeled[0]
    image, label = dataset.read_image(name).array[0], dataset.read_label(name).array
    scaled = (image - image.min()) / (image.max() - image.min())
    height, width = image.shape[1:]
    for z in (0, len(image) // 2):
        index = (slice(z, z + 1), slice(None), slice(None))
        factors = (256 / height, 256 / width)
        expected = ndimage.zoom(scaled[z], factors, order=0)
        np.testing.assert_allclose(store.read_image(name, index)[0, 0], expected, atol=1e-6)
        np.testing.assert_array_equal(store.read_label(name, index)[0], ndimage.zoom(label[z], factors, order=0))


def test_labels_go_to_the_store_and_back_with_hardly_a_voxel_lost(real_data: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(real_data / "acdc_mini")
    names = sorted(dataset.train)[:3]
    split = resolve_split(dataset)
    plan = make_plan(dataset, split, overrides={"size": [192, 192], "interpolation": "linear"})
    store = build_store(dataset, names, plan, root=tmp_path, with_labels=names)
    for name in names:
        label = dataset.read_label(name)
        back = restore_label(store.read_label(name, ALL), store.record(name), plan)
        np.testing.assert_array_equal(back, label.array)
        assert imaging.geometry_difference(store.record(name).geometry, label.geometry) is None
        present = store.classes_per_slice(name)
        for z, plane in enumerate(label.array):
            assert set(np.flatnonzero(present[z])) == set(np.unique(plane))


def test_left_atrium_patches_come_from_the_scan(real_data: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(real_data / "la_mini")
    split = resolve_split(dataset, labeled=1)
    overrides = {"spacing": None, "patch_size": [32, 64, 64], "foreground_fraction": 1}
    plan = make_plan(dataset, split, overrides=overrides)
    names = [*split.labeled, *split.unlabeled]
    store = build_store(dataset, names, plan, root=tmp_path, with_labels=split.labeled)
    source = BatchSource(
        store, split.labeled, split.unlabeled, plan, labeled_batch_size=2, unlabeled_batch_size=2, seed=0
    )
    assert set(plan.reasons["spacing"].split()) >= {"set", "recipe"}
    for iteration in range(3):
        batch = source[iteration]
        assert batch.labeled.shape == (2, 1, 32, 64, 64)
        assert batch.labels.flatten(1).amax(dim=1).tolist() == [1, 1]
        assert set(batch.unlabeled_cases) <= set(split.unlabeled)


def test_real_scans_keep_few_grey_levels_and_are_stored_small(real_data: Path, tmp_path: Path) -> None:
    """About half of their float32 size; prepared by two processes; every voxel as prepared."""
    dataset = Dataset.open(real_data / "la_mini")
    split = resolve_split(dataset)
    plan = make_plan(dataset, split, dims=3, overrides={"spacing": None, "patch_size": [32, 64, 64]})
    names = sorted(dataset.train)
    store = build_store(dataset, names, plan, root=tmp_path, with_labels=[], workers=2)
    stored = voxels = 0
    for name in names:
        image = store.read_image(name, ALL)
        expected, record = prepare(dataset.read_image(name), plan)
        np.testing.assert_array_equal(image, expected)
        assert store.record(name) == record
        voxels += image.size
        stored += next(tmp_path.rglob(f"images/{name}.b2nd")).stat().st_size
    assert stored < 0.55 * 4 * voxels
