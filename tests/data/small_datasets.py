"""Dataset folders of a few tiny NIfTI volumes, for the tests of this folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from scantly.data.dataset import Dataset
from scantly.data.splits import Split


def save(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (D, H, W) as NIfTI, whose index order is (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)), affine).to_filename(path)


def lps(spacing: Sequence[float]) -> np.ndarray:
    """Affine of LPS axes for (z, y, x) spacing in mm."""
    z, y, x = spacing
    return np.diag([-x, -y, z, 1.0])


def write_dataset(
    root: Path,
    cases: Mapping[str, tuple[np.ndarray, np.ndarray | None]],
    *,
    spacing: Sequence[float] | Mapping[str, Sequence[float]] = (1.0, 1.0, 1.0),
    affine: np.ndarray | None = None,
    channels: Sequence[str] = ("MR",),
    classes: Sequence[str] = ("background", "A", "B"),
) -> Dataset:
    """Cases are (image (C, D, H, W), label (D, H, W) or None)."""
    for name, (image, label) in cases.items():
        own = spacing[name] if isinstance(spacing, Mapping) else spacing
        matrix = lps(own) if affine is None else affine
        for channel, array in enumerate(image):
            save(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", array.astype(np.float32), matrix)
        if label is not None:
            save(root / "labelsTr" / f"{name}.nii.gz", label.astype(np.uint8), matrix)
    description: dict[str, Any] = {
        "name": "small",
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": {name: value for value, name in enumerate(classes)},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return Dataset.open(root)


def split(labeled: Sequence[str], unlabeled: Sequence[str] = (), val: Sequence[str] = ()) -> Split:
    """A split given by hand; every case is its own subject."""
    names = [*labeled, *unlabeled, *val]
    return Split(
        labeled=tuple(labeled),
        unlabeled=tuple(unlabeled),
        val=tuple(val),
        test=(),
        unit="case",
        groups={name: name for name in names},
        origin="by hand",
    )
