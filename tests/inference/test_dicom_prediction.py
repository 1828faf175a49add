"""A DICOM series is predicted like the same scan in NIfTI, and the labels lie where the series does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom import uid

import dicom_series as dicoms
from scantly.data.plan import Plan
from scantly.errors import ConfigError, ImageError
from scantly.imaging import (
    Geometry,
    geometry_difference,
    read_geometry,
    read_image,
    read_label,
    write_scalar,
)
from scantly.imaging.dicom import find_series, read_series
from scantly.inference.model import save_model
from scantly.inference.predict import predict, predict_folder
from scantly.methods.base import Task
from scantly.methods.supervised import Supervised

SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network: what it says depends on the voxels, which is all that is needed here."""
    torch.manual_seed(0)
    task = Task(1, ("background", "a", "b"), 2, (16, 16), "unet", {"widths": [4, 8], "dropout": [0.0, 0.0]})
    plan = Plan(
        spatial_dims=2,
        size=(16, 16),
        normalization=[{"scheme": "zscore"}],
        patch_size=(16, 16),
        labeled_batch_size=2,
        unlabeled_batch_size=2,
    )
    method = Supervised(task, Supervised.Config())
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    configuration = Supervised.Config().model_dump(mode="json")
    save_model(
        path, method.predictor.state_dict(), task=task, plan=plan, method="supervised", configuration=configuration
    )
    return path


@pytest.mark.parametrize("directions", [dicoms.AXIAL, dicoms.OBLIQUE, list(dicoms.axis_orders())[29]], ids=str)
def test_dicom_and_nifti_of_one_scan_get_the_same_labels(
    model: Path, tmp_path: Path, directions: dicoms.Directions
) -> None:
    dicoms.write(tmp_path / "patient", dicoms.stack(shape=SHAPE, directions=directions))
    (series,) = find_series(tmp_path / "patient")
    array, geometry = read_series(series)
    write_scalar(tmp_path / "nifti.nii.gz", array[0], geometry)
    written = predict(model, [tmp_path / "patient", tmp_path / "nifti.nii.gz"], tmp_path / "out", uncertainty=True)
    assert sorted(path.name for path in written) == ["nifti.nii.gz", "patient.nii.gz"]
    for kind in ("", "_uncertainty"):
        one, two = (tmp_path / "out" / f"{name}{kind}.nii.gz" for name in ("patient", "nifti"))
        assert np.array_equal(read_image([one]).array, read_image([two]).array)
        assert geometry_difference(read_geometry(one), geometry) is None
    assert len(np.unique(read_image([tmp_path / "out" / "patient_uncertainty.nii.gz"]).array)) > array.size // 2


def _without_a_slice(folder: Path) -> str:
    (folder / "IM0001").unlink()
    return "lacks 1 slice"


def _one_truncated(folder: Path) -> str:
    (folder / "IM0002").write_bytes((folder / "IM0002").read_bytes()[:300])
    return "IM0002 cannot be read"


def _all_truncated(folder: Path) -> str:
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:300])
    return "IM0000 cannot be read"


def _damaged_voxels(folder: Path) -> str:
    shutil.rmtree(folder)
    dicoms.write(folder, dicoms.stack(shape=(4, 64, 64)), series="2.1", study="2", syntax=uid.JPEGLSLossless)
    path = folder / "IM0003"
    dataset = pydicom.dcmread(path)
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8" + bytes(2000)])
    dataset.save_as(path)
    return "IM0003 cannot be decoded"


@pytest.mark.parametrize("damage", [_without_a_slice, _one_truncated, _all_truncated, _damaged_voxels])
def test_a_bad_series_does_not_keep_the_others_from_being_predicted(
    model: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    for number, name in ((1, "p1"), (2, "p2"), (3, "p3")):
        folder = tmp_path / "scans" / name
        volume = dicoms.stack(number, shape=SHAPE)
        dicoms.write(folder, volume, series=f"{number}.1", study=f"{number}", shuffle=False)
    told = damage(tmp_path / "scans" / "p2")
    with pytest.raises(ImageError, match=r"^1 of 3 scans cannot be predicted") as caught:
        predict(model, [tmp_path / "scans"], tmp_path / "out")
    (line,) = str(caught.value).splitlines()[1:]
    assert told in line and str(tmp_path / "scans" / "p2") in line
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == ["p1.nii.gz", "p3.nii.gz"]
    shutil.rmtree(tmp_path / "scans" / "p2")
    assert predict_folder(model, [tmp_path / "scans"], tmp_path / "out").present == 2


def test_one_sound_patient_beside_a_broken_one(model: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / "scans" / f"p{number}"
        dicoms.write(folder, dicoms.stack(number, shape=SHAPE), series=f"{number}.1", study=f"{number}", shuffle=False)
    _all_truncated(tmp_path / "scans" / "p2")
    with pytest.raises(ImageError, match=r"^1 of 2 scans cannot be predicted"):
        predict(model, [tmp_path / "scans"], tmp_path / "out")
    assert (tmp_path / "out" / "p1.nii.gz").is_file()
    _all_truncated(tmp_path / "scans" / "p1")
    with pytest.raises(ImageError, match=r"^2 of 2 scans cannot be predicted; mend"):
        predict(model, [tmp_path / "scans"], tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("out", [".", "predictions"])
def test_predictions_are_not_written_among_the_dicom_files(model: Path, tmp_path: Path, out: str) -> None:
    dicoms.write(tmp_path / "scans" / "p1", dicoms.stack(shape=SHAPE))
    before = sorted((tmp_path / "scans").rglob("*"))
    with pytest.raises(ImageError, match=r"lies in .*scans, whose scans are all taken.* choose another --out"):
        predict(model, [tmp_path / "scans"], tmp_path / "scans" / out)
    assert sorted((tmp_path / "scans").rglob("*")) == before
    predict(model, [tmp_path / "scans" / "p1"], tmp_path / "scans")


def test_a_series_is_chosen_by_its_uid_and_a_segmentation_refers_to_it(model: Path, tmp_path: Path) -> None:
    for name, seed in (("1.2.1", 1), ("1.2.2", 2)):
        folder = tmp_path / "patient" / name
        dicoms.write(folder, dicoms.stack(seed, shape=SHAPE), series=name, study="1.2")
    with pytest.raises(ImageError, match=r"--series UID.*1\.2\.1.*1\.2\.2"):
        predict(model, [tmp_path / "patient"], tmp_path / "out")
    (written,) = predict(model, [tmp_path / "patient"], tmp_path / "out", series="1.2.2", dicom_seg=True)
    segmentation = pydicom.dcmread(tmp_path / "out" / f"{written.name.removesuffix('.nii.gz')}.dcm")
    assert [str(item.SeriesInstanceUID) for item in segmentation.ReferencedSeriesSequence] == ["1.2.2"]
    frames = segmentation.pixel_array.reshape(-1, *SHAPE[1:])
    assert frames.sum() == np.count_nonzero(read_label(written).array)


def test_a_segmentation_of_a_file_that_is_no_series_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    write_scalar(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.float32), Geometry(SHAPE, np.eye(4)))
    with pytest.raises(ConfigError, match=r"a\.nii\.gz is none"):
        predict(model, [tmp_path / "a.nii.gz"], tmp_path / "out", dicom_seg=True)
    assert not (tmp_path / "out").exists()
