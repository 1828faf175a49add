"""A small dataset of NIfTI files, and what a user sees of one command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

AFFINE = np.diag([-1.5, -1.5, 8.0, 1.0])
SMALL = (
    *("--size", "32", "32", "--steps", "4", "--device", "cpu", "--set"),
    *("network.arguments.widths=[4,8]", "network.arguments.dropout=[0,0]"),
    *("plan.labeled_batch_size=2", "plan.unlabeled_batch_size=2", "training.checkpoint_every=2"),
)


@dataclass(frozen=True)
class Outcome:
    """What a user sees of one command."""

    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line on standard error, without the program's name."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("scantly: ")


Command = Callable[..., Outcome]


def write_case(root: Path, part: str, name: str, seed: int, *, channels: int = 1, labeled: bool = True) -> None:
    """Two bright discs in noise, three slices of 32 x 32."""
    rng = np.random.default_rng(seed)
    x, y = np.mgrid[:32, :32]
    center = rng.integers(12, 20, 2)
    distance = np.hypot(x - center[0], y - center[1])
    label = np.repeat(((distance < 9).astype(np.uint8) + (distance < 5))[..., None], 3, axis=2)
    for channel in range(channels):
        image = (100 * label + rng.normal(0, 10, label.shape) + 50).astype(np.float32)
        nib.save(nib.Nifti1Image(image, AFFINE), root / f"images{part}" / f"{name}_{channel:04d}.nii.gz")
    if labeled:
        nib.save(nib.Nifti1Image(label, AFFINE), root / f"labels{part}" / f"{name}.nii.gz")


def write_dataset(root: Path, *, channels: int = 1) -> Path:
    """Six training cases, four of them labeled, and two test cases."""
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (root / folder).mkdir(parents=True)
    for number in range(8):
        part = "Ts" if number >= 6 else "Tr"
        write_case(root, part, f"case{number}", number, channels=channels, labeled=number not in {4, 5})
    description = {
        "channel_names": {str(channel): f"MR{channel}" for channel in range(channels)},
        "labels": {"background": 0, "wall": 1, "pool": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that nothing was touched."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
