"""The plan: what it chooses from which numbers, what can be set, what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from small_datasets import save, split, write_dataset

from scantly.data.dataset import Dataset
from scantly.data.plan import Plan, make_plan
from scantly.data.topology import training_bytes
from scantly.errors import ConfigError, DatasetError

MINIMAL: dict[str, Any] = {
    "spatial_dims": 2,
    "normalization": [{"scheme": "zscore"}],
    "patch_size": [32, 32],
    "labeled_batch_size": 2,
    "unlabeled_batch_size": 2,
}


def blank(*shape: int) -> tuple[np.ndarray, None]:
    return np.zeros((1, *shape)), None


def dataset_of(root: Path, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Dataset:
    return write_dataset(root, {"a": blank(*shape), "b": blank(*shape)}, spacing=spacing)


@pytest.mark.parametrize(
    ("shape", "spacing", "dims", "number"),
    [
        ((9, 24, 32), (10.0, 1.5, 1.5), 2, "6.7 times"),  # short-axis cine
        ((40, 24, 32), (0.6, 0.6, 0.6), 3, "40 slices"),  # left atrium
        ((40, 24, 32), (5.0, 0.8, 0.8), 3, "40 slices"),  # thick slices, but many
        ((20, 24, 32), (3.0, 1.0, 1.0), 3, "3.0 times"),  # exactly at the threshold
        ((12, 24, 32), (1.0, 1.0, 1.0), 2, "12 slices"),  # too few to halve four times
    ],
)
def test_dimensions_follow_anisotropy_and_slices(
    tmp_path: Path,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    dims: int,
    number: str,
) -> None:
    plan = make_plan(dataset_of(tmp_path, shape, spacing), split(["a"], ["b"]))
    assert plan.spatial_dims == dims
    assert number in plan.reasons["spatial_dims"]
    assert len(plan.patch_size) == dims


def test_every_field_has_a_reason_of_its_own(tmp_path: Path) -> None:
    plan = make_plan(dataset_of(tmp_path, (20, 24, 32), (1, 1, 1)), split(["a"], ["b"]))
    assert set(plan.reasons) == set(Plan.model_fields) - {"reasons", "fingerprint"}
    assert all(len(reason) > 10 for reason in plan.reasons.values())


def test_target_spacing_is_the_median_of_the_training_cases_only(tmp_path: Path) -> None:
    spacings = {"a": (1, 1, 1), "b": (2, 1, 1), "c": (4, 3, 1), "v": (9, 9, 9)}
    dataset = write_dataset(tmp_path, {name: blank(20, 8, 8) for name in spacings}, spacing=spacings)
    plan = make_plan(dataset, split(["a"], ["b", "c"], val=["v"]))
    assert plan.spacing == (2, 1, 1)
    assert plan.fingerprint["cases"] == 3
    # extents 20, 40, 80 mm along z over the median of 2 mm: 10, 20, 40 voxels; z is halved once less than the
    # finer axes, so its side becomes a multiple of 8
    assert plan.patch_size[0] == 24


def test_flat_pictures_are_planned_in_2d_and_3d_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path, {"a": blank(1, 8, 8)})
    text = (tmp_path / "dataset.json").read_text().replace(".nii.gz", ".png")
    (tmp_path / "dataset.json").write_text(text)
    (tmp_path / "imagesTr" / "a_0000.nii.gz").unlink()
    Picture.fromarray(np.zeros((40, 56), dtype=np.uint8)).save(tmp_path / "imagesTr" / "a_0000.png")
    dataset = Dataset.open(tmp_path)
    plan = make_plan(dataset, split([], ["a"]))
    assert (plan.spatial_dims, plan.spacing, plan.patch_size) == (2, None, (48, 64))
    assert "spacing" in plan.reasons["spacing"]
    with pytest.raises(ConfigError, match="2D image"):
        make_plan(dataset, split([], ["a"]), dims=3)


def test_sagittal_scans_keep_their_own_slice_axis(tmp_path: Path) -> None:
    # file axis z (array axis 0, 5 mm) runs from right to left: the LPS slice axis would be a sharp one
    affine = np.array([[0, 0, 5, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    dataset = write_dataset(tmp_path, {"a": blank(6, 16, 32)}, affine=affine)
    plan = make_plan(dataset, split([], ["a"]))
    assert plan.orientation == "stored"
    assert plan.spacing == (5, 1, 1)
    assert plan.fingerprint["median_shape"] == [6, 16, 32]


def test_shapes_are_counted_in_the_canonical_orientation(tmp_path: Path) -> None:
    affine = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])  # files in (P, S, R) order
    dataset = write_dataset(tmp_path, {"a": blank(20, 24, 32)}, affine=affine)
    plan = make_plan(dataset, split([], ["a"]))
    # array axes are (x, z, y) of the body: to (z, y, x)
    assert plan.fingerprint["median_shape"] == [24, 32, 20]


def ct_dataset(root: Path) -> tuple[Dataset, np.ndarray]:
    random = np.random.default_rng(0)
    cases, foreground = {}, []
    for name in ("a", "b", "c"):
        image = random.normal(40, 200, (1, 20, 12, 12)).astype(np.float32)
        label = (random.random((20, 12, 12)) < 0.2).astype(np.uint8)
        cases[name] = (image, label)
        if name != "c":
            foreground.append(image[0][label > 0])
    return write_dataset(root, cases, channels=["CT"]), np.concatenate(foreground)


def test_ct_is_scaled_by_the_foreground_of_labeled_cases_only(tmp_path: Path) -> None:
    dataset, foreground = ct_dataset(tmp_path)
    (tmp_path / "labelsTr" / "c.nii.gz").write_bytes(b"hidden labels are not opened")
    entry = make_plan(dataset, split(["a", "b"], ["c"])).normalization[0]
    lower, upper = np.percentile(foreground, [0.5, 99.5])
    clipped = foreground.astype(np.float64).clip(lower, upper)
    assert entry.scheme == "ct"
    assert entry.lower == pytest.approx(lower, abs=1e-4)
    assert entry.upper == pytest.approx(upper, abs=1e-4)
    assert entry.mean == pytest.approx(clipped.mean(), abs=1e-4)
    assert entry.std == pytest.approx(clipped.std(), abs=1e-4)


def test_ct_numbers_that_are_given_stay(tmp_path: Path) -> None:
    dataset, _ = ct_dataset(tmp_path)
    asked = {"normalization": [{"scheme": "ct", "lower": -125, "upper": 275}]}
    entry = make_plan(dataset, split(["a", "b"], ["c"]), overrides=asked).normalization[0]
    assert (entry.lower, entry.upper) == (-125, 275)
    assert entry.std is not None


def test_ct_without_any_foreground_says_what_to_do(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, {"a": blank(20, 8, 8)}, channels=["CT"])
    with pytest.raises(DatasetError, match=r"no labeled case has a foreground voxel; label"):
        make_plan(dataset, split([], ["a"]))


def test_only_ct_as_a_word_is_ct(tmp_path: Path) -> None:
    image = np.zeros((2, 20, 8, 8))
    dataset = write_dataset(tmp_path, {"a": (image, None)}, channels=["ectopic T1", "OCTA"])
    assert [n.scheme for n in make_plan(dataset, split([], ["a"])).normalization] == ["zscore", "zscore"]


def test_overrides_win_and_the_reason_says_so(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (9, 24, 32), (10, 1.5, 1.5))
    asked = {
        "size": [128, 160],
        "interpolation": "nearest",
        "foreground_fraction": 0,
        "labeled_batch_size": 3,
    }
    plan = make_plan(dataset, split(["a"], ["b"]), overrides=asked)
    assert (plan.size, plan.patch_size, plan.spacing) == ((128, 160), (128, 160), None)
    assert (plan.interpolation, plan.foreground_fraction, plan.labeled_batch_size) == ("nearest", 0, 3)
    for name in asked:
        assert plan.reasons[name] == "set by the recipe or the user"
    assert "size" in plan.reasons["spacing"]
    assert "set by" not in plan.reasons["unlabeled_batch_size"]


def test_one_normalization_serves_all_channels_and_another_number_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path, {"a": (np.zeros((3, 20, 8, 8)), None)}, channels=["T1", "T2", "PD"])
    plan = make_plan(dataset, split([], ["a"]), overrides={"normalization": [{"scheme": "minmax"}]})
    assert [entry.scheme for entry in plan.normalization] == ["minmax"] * 3
    with pytest.raises(ConfigError, match=r"2 entries, but .* has 3 channels \(T1, T2, PD\)"):
        make_plan(dataset, split([], ["a"]), overrides={"normalization": [{"scheme": "none"}] * 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": [100, 96]}, "side 100 is not divisible by 16.*use 96 or 112"),
        ({"patch_size": [32, 32, 32]}, "2D plan needs two sides"),
        ({"patch_size": [0, 32]}, "positive"),
        ({"size": [128]}, "2D plan needs two sides"),
        ({"size": [64, 64], "spacing": [1, 1, 1]}, "give one of them"),
        ({"spacing": [1, 0, 1]}, "positive"),
        ({"crop_fraction": 0}, "greater than 0"),
        ({"crop_fraction": 1.5}, "less than or equal to 1"),
        ({"labeled_batch_size": 0}, "greater than or equal to 1"),
        ({"interpolation": "lanczos"}, "nearest"),
        ({"patchsize": [32, 32]}, "did you mean 'plan.patch_size'"),
        ({"normalization": "zscore"}, "one entry per channel"),
        ({"spatial_dims": 4}, "spatial_dims"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_cure(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    dataset = dataset_of(tmp_path, (9, 24, 32), (10, 1.5, 1.5))
    with pytest.raises(ConfigError, match=message):
        make_plan(dataset, split(["a"], ["b"]), overrides=values)


def test_option_and_setting_that_disagree_are_refused(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (20, 24, 32), (1, 1, 1))
    with pytest.raises(ConfigError, match=r"spatial_dims 3 .* 2 dimensions"):
        make_plan(dataset, split(["a"]), dims=2, overrides={"spatial_dims": 3})
    assert make_plan(dataset, split(["a"]), dims=2).reasons["spatial_dims"] == "set by the recipe or the user"


def test_patch_and_batch_fit_the_memory(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (64, 80, 96), (1, 1, 1))
    voxels = []
    for memory in (0.5, 1, 2, 8, 64):
        plan = make_plan(dataset, split(["a"], ["b"]), memory_gb=memory)
        rows = plan.labeled_batch_size + plan.unlabeled_batch_size
        voxels.append(rows * math.prod(plan.patch_size))
        assert voxels[-1] * training_bytes("vnet", 3) <= memory * 1e9 / 2
        assert all(side % 16 == 0 for side in plan.patch_size)
    assert voxels == sorted(voxels)
    assert plan.patch_size == (64, 80, 96)  # never larger than the images


def test_crop_fraction_shrinks_the_patch(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (9, 96, 128), (10, 1.5, 1.5))
    assert make_plan(dataset, split(["a"]), overrides={"crop_fraction": 0.5}).patch_size == (48, 64)


def test_plan_file_is_read_back_equal_and_can_be_edited(tmp_path: Path) -> None:
    plan = make_plan(dataset_of(tmp_path, (9, 24, 32), (10, 1.5, 1.5)), split(["a"], ["b"]))
    path = tmp_path / "plan.yaml"
    plan.write(path)
    assert Plan.read(path) == plan
    path.write_text(path.read_text().replace("interpolation: linear", "interpolation: cubic"))
    assert Plan.read(path).interpolation == "cubic"
    path.write_text(path.read_text().replace("interpolation:", "interpolatoin:"))
    with pytest.raises(ConfigError, match=r"plan\.yaml\.interpolatoin'; did you mean .*interpolation'"):
        Plan.read(path)


def test_incomplete_ct_is_refused() -> None:
    with pytest.raises(ValueError, match="channel 0 is ct; give it lower"):
        Plan.model_validate({**MINIMAL, "normalization": [{"scheme": "ct", "lower": 0}]})


def test_only_what_shapes_arrays_counts_as_preparation() -> None:
    plan = Plan.model_validate(MINIMAL)
    other = Plan.model_validate({**MINIMAL, "patch_size": [64, 64], "labeled_batch_size": 7})
    assert plan.preparation() == other.preparation()
    for change in ({"size": [32, 32]}, {"crop_fraction": 0.5}, {"normalization": [{"scheme": "none"}]}):
        assert Plan.model_validate({**MINIMAL, **change}).preparation() != plan.preparation()


def test_a_split_without_training_cases_is_refused(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (9, 24, 32), (1, 1, 1))
    with pytest.raises(DatasetError, match="no training case"):
        make_plan(dataset, split([], [], val=["a"]))


def test_label_on_another_grid_is_named(tmp_path: Path) -> None:
    dataset, _ = ct_dataset(tmp_path)
    save(tmp_path / "labelsTr" / "a.nii.gz", np.zeros((20, 12, 11), dtype=np.uint8), np.diag([-1, -1, 1, 1.0]))
    with pytest.raises(DatasetError, match=r"a\.nii\.gz.*shape"):
        make_plan(dataset, split(["a", "b"], ["c"]))


def test_ten_millimeter_slices_are_planned_flat_and_the_reasons_say_why(tmp_path: Path) -> None:
    few = make_plan(dataset_of(tmp_path / "few", (9, 24, 32), (10, 1.4, 1.4)), split(["a"]))
    assert few.spatial_dims == 2
    assert "7.1 times longer than wide (above 3) and there are 9 slices" in few.reasons["spatial_dims"]

    many = make_plan(dataset_of(tmp_path / "many", (42, 64, 80), (10, 1.4, 1.4)), split(["a"]))
    assert many.spatial_dims == 3
    assert "42 slices" in many.reasons["spatial_dims"]
    assert many.patch_size == (44, 64, 80)  # the nearest multiples of 4 (16 halved twice less) and 16
    assert "multiples of 4 x 16 x 16" in many.reasons["patch_size"]
    assert many.kernel_sizes == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert many.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2))
    reason = many.reasons["kernel_sizes"]
    assert "7.1 times longer than wide (2 or more)" in reason
    assert "on 2 of 5 levels" in reason
    assert "dynunet" in reason
    assert "44 x 64 x 80 becomes 11 x 4 x 5" in many.reasons["strides"]


def test_isotropic_volumes_have_kernels_of_three(tmp_path: Path) -> None:
    plan = make_plan(dataset_of(tmp_path, (80, 112, 112), (0.6, 0.6, 0.6)), split(["a"]), memory_gb=12)
    assert plan.patch_size == (80, 112, 112)
    assert plan.kernel_sizes == ((3, 3, 3),) * 5
    assert plan.strides == ((1, 1, 1), *[(2, 2, 2)] * 4)
    assert "1.0 times longer than wide (flat kernels: 2 or more), so" in plan.reasons["kernel_sizes"]
    assert "network.name auto is vnet" in plan.reasons["kernel_sizes"]
    resized = make_plan(dataset_of(tmp_path / "b", (32, 32, 32), (9, 1, 1)), split(["a"]), overrides={"size": [32] * 3})
    assert "resized to one grid" in resized.reasons["kernel_sizes"]


def test_a_named_network_gets_a_patch_that_it_can_halve_four_times(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (42, 64, 80), (10, 1.4, 1.4))
    assert make_plan(dataset, split(["a"]), network="vnet").patch_size == (48, 64, 80)
    assert make_plan(dataset, split(["a"]), network="dynunet").patch_size == (44, 64, 80)


def test_memory_is_that_of_the_network(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (160, 160, 160), (1, 1, 1))
    sizes = {
        name: math.prod(make_plan(dataset, split(["a"]), network=name, memory_gb=8).patch_size)
        for name in ("auto", "vnet", "unet", "dynunet")
    }
    assert sizes["auto"] == sizes["vnet"] > sizes["unet"] > sizes["dynunet"]


@pytest.mark.parametrize("patch", [[32, 64, 64], [80, 112, 112], [96, 96, 96]])
def test_patches_of_the_literature_are_taken(tmp_path: Path, patch: list[int]) -> None:
    dataset = dataset_of(tmp_path, (48, 64, 64), (1, 1, 1))
    plan = make_plan(dataset, split(["a"]), overrides={"patch_size": patch})
    assert list(plan.patch_size) == patch
    assert plan.reasons["patch_size"] == "set by the recipe or the user"
    assert plan.strides is not None


def test_a_patch_that_does_not_fit_flat_kernels_is_refused_with_the_cure(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (40, 64, 64), (5, 0.8, 0.8))
    assert make_plan(dataset, split(["a"]), overrides={"patch_size": [20, 64, 64]}).patch_size == (20, 64, 64)
    with pytest.raises(
        ConfigError, match=r"patch_size' .*side 22 is not divisible by 4, .* halve z 2 times; use 20 or 24"
    ):
        make_plan(dataset, split(["a"]), overrides={"patch_size": [22, 64, 64]})
    with pytest.raises(ConfigError, match=r"side 100 is not divisible by 16, .* use 96 or 112"):
        make_plan(dataset, split(["a"]), overrides={"patch_size": [20, 100, 64]})


def test_topology_that_is_given_stays_and_is_checked(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, (40, 64, 64), (5, 0.8, 0.8))
    given = {"kernel_sizes": [[1, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 4, 4]], "patch_size": [7, 20, 20]}
    plan = make_plan(dataset, split(["a"]), overrides=given)
    assert plan.strides == ((1, 1, 1), (1, 4, 4))
    assert plan.reasons["strides"] == "set by the recipe or the user"
    with pytest.raises(ConfigError, match=r"level \[1, 1\] is not one positive number per axis; give 3"):
        make_plan(dataset, split(["a"]), overrides=given | {"strides": [[1, 1], [2, 2]]})
    unset = make_plan(dataset, split(["a"]), overrides={"kernel_sizes": None, "strides": None})
    assert unset.kernel_sizes == make_plan(dataset, split(["a"])).kernel_sizes


def test_a_plan_from_before_topologies_is_read() -> None:
    plan = Plan.model_validate(MINIMAL)
    assert plan.kernel_sizes is None
    assert plan.strides is None


def test_a_single_slice_among_volumes_is_named(tmp_path: Path) -> None:
    cases = {"a": blank(20, 24, 32), "b": blank(1, 24, 32), "c": blank(20, 24, 32)}
    dataset = write_dataset(tmp_path, cases, spacing=(1, 1, 1))
    with pytest.raises(DatasetError, match=r"case b is a single slice \(1 x 24 x 32 voxels\) .* --dims 2"):
        make_plan(dataset, split(["a"], ["b", "c"]))
    assert make_plan(dataset, split(["a"], ["b", "c"]), dims=2).spatial_dims == 2
    assert make_plan(dataset, split(["a"], ["c"], val=["b"])).spatial_dims == 3
