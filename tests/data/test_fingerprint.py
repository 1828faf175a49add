"""The fingerprint's foreground intensities: by hand, and whatever the number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_datasets import split, write_dataset

from scantly.data.fingerprint import Fingerprint, collect
from scantly.errors import ImageError

NAMES = ("a", "b", "c")


def found(root: Path, workers: int, monkeypatch: pytest.MonkeyPatch, samples: int = 1_000_000) -> Fingerprint:
    random = np.random.default_rng(0)
    cases = {name: (random.normal(size=(2, 12, 20, 20)), random.integers(0, 2, (12, 20, 20))) for name in NAMES}
    dataset = write_dataset(root, cases, channels=("CT", "other"))
    with monkeypatch.context() as patch:
        patch.setattr("scantly.data.fingerprint.worker_count", lambda *_: workers)
        patch.setattr("scantly.data.fingerprint._SAMPLES", samples)
        return collect(dataset, split(NAMES), foreground_channels=[0, 1])


@pytest.mark.parametrize("samples", [1_000_000, 900])
def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    alone, together = (found(tmp_path / str(n), n, monkeypatch, samples) for n in (1, 2))
    assert alone.intensities == together.intensities
    assert (alone.intensities[0].voxels == 900) == (samples == 900)


def test_intensities_are_those_of_the_foreground(tmp_path: Path) -> None:
    image = np.full((1, 4, 10, 10), -1000.0)
    label = np.zeros((4, 10, 10))
    image[0, 1], label[1] = 40, 1
    image[0, 2], label[2] = 60, 1
    dataset = write_dataset(tmp_path / "d", {"a": (image, label), "b": (image - 500, None)}, channels=("CT",))
    intensity = collect(dataset, split(["a"], ["b"]), foreground_channels=[0]).intensities[0]
    assert (intensity.lower, intensity.upper, intensity.mean, intensity.std) == (40, 60, 50, 10)
    assert intensity.voxels == 200


def test_a_bad_file_is_named_whichever_process_meets_it(tmp_path: Path) -> None:
    cases = {name: (np.ones((1, 4, 8, 8)), np.ones((4, 8, 8))) for name in NAMES}
    dataset = write_dataset(tmp_path / "d", cases, channels=("CT",))
    path = dataset.root / "imagesTr" / "b_0000.nii.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ImageError, match=r"^[^\n]*b_0000\.nii\.gz[^\n]*$"):
        collect(dataset, split(NAMES), foreground_channels=[0])
