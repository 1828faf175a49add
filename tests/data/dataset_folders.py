"""Small dataset folders for the tests of this package."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scantly import imaging

SHAPE = (3, 6, 5)
GEOMETRY = imaging.Geometry(SHAPE, imaging.grid((5.0, 0.7, 0.7)))


def write_scan(path: Path, seed: int, geometry: imaging.Geometry = GEOMETRY) -> None:
    """Write noise that differs from seed to seed."""
    values = np.random.default_rng(seed).normal(size=geometry.shape).astype(np.float32)
    imaging.write_scalar(path, values, geometry)


def write_label(path: Path, values: Sequence[int] = (0, 1, 2), geometry: imaging.Geometry = GEOMETRY) -> None:
    """Write a label that has all of ``values``."""
    array = np.resize(np.array(values), geometry.shape)
    imaging.write_label(path, array, geometry)


def make(
    root: Path,
    labeled: Sequence[str],
    unlabeled: Sequence[str] = (),
    *,
    test: Sequence[str] = (),
    channels: int = 1,
    ending: str = ".nii.gz",
    splits: Mapping[str, Any] | None = None,
) -> Path:
    """Write a sound dataset folder with the classes background, a, b.

    Args:
        root: Where.
        labeled: Names of training cases with label.
        unlabeled: Names of training cases without.
        test: Names of test cases with label.
        channels: Files per case.
        ending: File ending.
        splits: Content of ``splits.json``; None writes none.
    """
    for part, names in (("Tr", [*labeled, *unlabeled]), ("Ts", test)):
        for name in names:
            for channel in range(channels):
                seed = zlib.crc32(f"{part}{name}{channel}".encode())
                write_scan(root / f"images{part}" / f"{name}_{channel:04d}{ending}", seed)
            if name not in unlabeled:
                write_label(root / f"labels{part}" / f"{name}{ending}")
    describe(root, channels=channels, ending=ending)
    if splits is not None:
        (root / "splits.json").write_text(json.dumps(splits))
    return root


def describe(root: Path, *, channels: int = 1, ending: str = ".nii.gz", **other: Any) -> None:
    """Write ``dataset.json``; ``other`` replaces or, if None, removes keys."""
    root.mkdir(parents=True, exist_ok=True)
    info: dict[str, Any] = {
        "channel_names": {str(index): f"c{index}" for index in range(channels)},
        "labels": {"background": 0, "a": 1, "b": 2},
        "file_ending": ending,
    }
    info = {key: value for key, value in (info | other).items() if value is not None}
    (root / "dataset.json").write_text(json.dumps(info))
