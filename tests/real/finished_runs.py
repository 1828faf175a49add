"""What holds for every finished run on real scans, in 2D and 3D."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

import scantly


def check_a_copy_predicts_the_same(run: scantly.Run, dataset: Path, folder: Path) -> None:
    """The weights alone, in an empty folder, give byte for byte what evaluate predicted, on the scan's own grid."""
    case = run.split.val[0]
    shutil.copy(run.model_path, folder / "model.safetensors")
    source = dataset / "imagesTr" / f"{case}_0000.nii.gz"
    (written,) = scantly.predict(folder / "model.safetensors", [source], folder / "out", uncertainty=True)
    assert written.read_bytes() == (run.predictions("val") / f"{case}.nii.gz").read_bytes()
    prediction, image = nib.load(written), nib.load(source)
    assert np.array_equal(prediction.affine, image.affine)
    assert prediction.shape == image.shape
