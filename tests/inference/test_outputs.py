"""What is written of a prediction: long names, and DICOM segmentations that cannot be made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch

import dicom_series as dicoms
from scantly.data.plan import Plan
from scantly.errors import ImageError, RunError
from scantly.imaging import Geometry, read_label, write_scalar
from scantly.inference.model import load_model, save_model
from scantly.inference.predict import predict
from scantly.methods.base import Task
from scantly.methods.supervised import Supervised

SHAPE = (4, 16, 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network."""
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
    weights = method.predictor.state_dict()
    save_model(path, weights, task=task, plan=plan, method="supervised", configuration=configuration)
    return path


def scan(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    write_scalar(path.with_name("x.nii.gz"), values, Geometry(SHAPE, np.eye(4)))
    return path.with_name("x.nii.gz").rename(path)


@pytest.mark.parametrize("name", ["a" * 227, "é" * 113], ids=["ascii", "two bytes each"])
def test_all_outputs_of_a_scan_with_a_long_name_are_written(model: Path, tmp_path: Path, name: str) -> None:
    path = scan(tmp_path / f"{name}.nii.gz")
    predict(model, [path], tmp_path / "out", uncertainty=True, probabilities=True)
    stems = {item.name.removesuffix(".nii.gz") for item in (tmp_path / "out").iterdir()}
    assert stems == {name, f"{name}_uncertainty", f"{name}_probabilities"}


def test_names_too_long_for_what_was_asked_for_are_told_and_the_other_scans_predicted(
    model: Path, tmp_path: Path
) -> None:
    name = "é" * 120
    scan(tmp_path / "in" / f"{name}.nii.gz")
    scan(tmp_path / "in" / "other.nii.gz")
    assert len(predict(model, [tmp_path / "in"], tmp_path / "out")) == 2
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ImageError) as caught:
        predict(model, [tmp_path / "in"], tmp_path / "out", probabilities=True)
    long = tmp_path / "out" / f"{name}_probabilities.nii.gz"
    assert f"{long} would have a name of 261 bytes, 255 are possible; give the scan '{name}' a shorter name." in str(
        caught.value
    )
    written = {item.name for item in (tmp_path / "out").iterdir() if not item.name.startswith(".")}
    assert written == {"other.nii.gz", "other_probabilities.nii.gz"}


def test_a_segmentation_that_cannot_be_made_does_not_take_the_label_map_with_it(model: Path, tmp_path: Path) -> None:
    def anonymous(dataset: pydicom.Dataset, index: int) -> None:
        del dataset.FrameOfReferenceUID

    for number, edit in ((1, None), (2, anonymous), (3, None)):
        volume = dicoms.stack(number, shape=SHAPE)
        place = tmp_path / "in" / f"case{number}"
        dicoms.write(place, volume, series=f"1.2.{number}", study=f"1.{number}", patient=f"N{number}", edit=edit)
    out = tmp_path / "out"
    out.mkdir()
    (out / "case2.dcm").write_bytes(b"of an earlier prediction")
    with pytest.raises(ImageError) as caught:
        predict(model, [tmp_path / "in"], out, dicom_seg=True, uncertainty=True)
    assert f"{out / 'case2.nii.gz'} is written, but not as DICOM-SEG: " in str(caught.value)
    assert "no Frame Of Reference UID" in str(caught.value)
    written = {item.name for item in out.iterdir() if not item.name.startswith(".")}
    maps = {f"case{number}{end}.nii.gz" for number in (1, 2, 3) for end in ("", "_uncertainty")}
    assert written == maps | {"case1.dcm", "case3.dcm"}
    assert read_label(out / "case2.nii.gz").array.shape == SHAPE


def test_a_missing_model_speaks_of_a_checkpoint_only_where_there_is_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"does not exist; give the run folder of a finished training, or a model") as c:
        load_model(tmp_path / "nothing")
    assert "resume" not in str(c.value)
    (tmp_path / "config.yaml").write_text("recipe: null\n")
    with pytest.raises(RunError, match=r"has not finished; it left no checkpoint, give the same scantly train again"):
        load_model(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(RunError, match=r"the training has not finished; continue it with --resume\."):
        load_model(tmp_path)
