"""Which classes a label map holds, and where: what streams draw by without reading whole maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantly.files import digest

__all__ = ["Presence"]

_FOREGROUND_VOXELS = 1000


@dataclass(frozen=True)
class Presence:
    """Classes of a label map.

    Attributes:
        classes_per_slice: Class indices in each slice, background included; what lies below 0 is no class.
        foreground: Up to 1000 voxels of each foreground class, flat indices into (D, H, W).
    """

    classes_per_slice: tuple[NDArray[np.int64], ...]
    foreground: dict[int, NDArray[np.int64]]

    @classmethod
    def of(cls, label: NDArray[Any], name: str) -> Presence:
        """Of a label map (D, H, W); the voxels are drawn by the case's name, the same every time."""
        foreground = {}
        for value in np.unique(label):
            if value <= 0:
                continue
            flat = np.flatnonzero(label == value)
            if flat.size > _FOREGROUND_VOXELS:
                generator = np.random.default_rng([int(digest(name), 16), int(value)])
                flat = np.sort(generator.choice(flat, _FOREGROUND_VOXELS, replace=False))
            foreground[int(value)] = flat
        present = (np.unique(plane).astype(np.int64) for plane in label)
        return cls(tuple(classes[classes >= 0] for classes in present), foreground)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Presence:
        """Inverse of :meth:`to_dict`; arrays take a fraction of the memory of lists."""
        slices = tuple(np.array(present, dtype=np.int64) for present in values["classes_per_slice"])
        voxels = {int(value): np.array(flat, dtype=np.int64) for value, flat in values["foreground"].items()}
        return cls(slices, voxels)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a JSON file."""
        return {
            "classes_per_slice": [present.tolist() for present in self.classes_per_slice],
            "foreground": {str(value): flat.tolist() for value, flat in self.foreground.items()},
        }

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of classes in each slice, background included, (D,)."""
        return np.array([len(present) for present in self.classes_per_slice], dtype=np.int64)

    @property
    def count(self) -> int:
        """Number of classes in the whole map, background included."""
        return len(np.unique(np.concatenate(self.classes_per_slice)))
