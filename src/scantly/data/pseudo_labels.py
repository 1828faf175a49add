"""Pseudo-labels of the unlabeled pool, one file per case."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantly.data.arrays import ArrayFolder, Recent, write_array
from scantly.data.presence import Presence
from scantly.errors import ConfigError, DatasetError
from scantly.files import read_json, write_json

__all__ = ["PseudoLabels"]

_PRESENCES = 1024


class PseudoLabels:
    """Labels that the engine predicted for unlabeled cases, on the prepared grid, one file per case.

    Beside each lies a JSON file with the classes it holds.

    Attributes:
        folder: Where they lie.
    """

    #: Cheap to read both slice by slice and in patches; label maps are small.
    _CHUNK = (8, 128, 128)

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = ArrayFolder(folder.absolute())
        self._presences: Recent[str, Presence] = Recent(_PRESENCES)

    @classmethod
    def open(cls, folder: Path) -> PseudoLabels:
        """Open a folder, which need not exist before the first :meth:`write`."""
        return cls(folder)

    def __reduce__(self) -> tuple[type[PseudoLabels], tuple[Path]]:
        return type(self), (self.folder,)

    def write(self, case: str, array: NDArray[np.integer[Any]]) -> None:
        """Write a case's label map, (D, H, W) on the prepared grid, -1 where a voxel has no label, atomically.

        Raises:
            RunError: if the disk is full or not writable.
        """
        kind = np.uint8 if array.min(initial=0) >= 0 and array.max(initial=0) <= 255 else np.int16
        depth, height, width = (min(n, side) for n, side in zip(array.shape, self._CHUNK, strict=True))
        write_array(self.folder / f"{case}.b2nd", array.astype(kind), (depth, height, width))
        write_json(self.folder / f"{case}.json", Presence.of(array, case).to_dict())
        self._files.forget(f"{case}.b2nd")
        self._presences.forget(case)

    def read(self, case: str, index: tuple[slice, slice, slice]) -> NDArray[Any]:
        """Part of a case's label map, (d, h, w).

        Raises:
            DatasetError: if the case has none.
        """
        return self._files.read(f"{case}.b2nd", index)

    def presence(self, case: str) -> Presence:
        """Which classes a case's label map holds.

        Raises:
            DatasetError: if the file that says so is missing or damaged.
        """
        return self._presences.get(case, lambda: self._read_presence(case))

    def _read_presence(self, case: str) -> Presence:
        path = self.folder / f"{case}.json"
        try:
            return Presence.from_dict(read_json(path))
        except (ConfigError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path} is missing or damaged ({error}); remove the run folder and train it anew."
            ) from error
