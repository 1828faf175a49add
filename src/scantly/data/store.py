"""The store: prepared cases, read in parts; :mod:`scantly.data.build` makes them and tells how they lie on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scantly.data.arrays import ArrayFolder, DamagedArrayError, Recent
from scantly.data.prepare import Record
from scantly.data.presence import Presence
from scantly.errors import DatasetError

__all__ = ["FORMAT", "MANIFEST", "Store"]

#: Raised when prepared arrays or sidecars change their meaning; older stores are then remade.
FORMAT = 3
#: The cases of a store; written last of all.
MANIFEST = "store.json"
_SIDECARS = 512

Index = tuple[slice, slice, slice]


class Store:
    """Prepared cases of one plan. Opened by :meth:`open`, made by :func:`~scantly.data.build.build_store`.

    Cheap to pickle and safe in forked or spawned loader workers: every process opens files by itself, and
    keeps only a few of them open.

    Attributes:
        url: Path or fsspec URL of the store.
        cases: Case names in the order in which they were prepared.
        classes: Class names, background first.
        channels: Channel names.
    """

    def __init__(self, url: str, manifest: dict[str, Any]) -> None:
        self.url = url
        self.cases: tuple[str, ...] = tuple(manifest["cases"])
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self.channels: tuple[str, ...] = tuple(manifest["channels"])
        self._manifest = manifest
        self._folder = ArrayFolder(url)
        self._images = ArrayFolder(f"{url.rstrip('/').rpartition('/')[0]}/images")
        self._records: Recent[str, Record] = Recent(_SIDECARS)
        self._presences: Recent[str, Presence] = Recent(_SIDECARS)

    @classmethod
    def open(cls, url: str | Path) -> Store:
        """Open a store that :func:`~scantly.data.build.build_store` made.

        Args:
            url: Its folder, or an fsspec URL of a copy of it and of the ``images`` folder beside it. Of remote
                arrays, too, only the chunks that are read are fetched.

        Raises:
            DatasetError: if there is no complete store.
        """
        where = os.path.abspath(url) if "://" not in str(url) else str(url)  # noqa: PTH100 (a path or a URL)
        manifest = _parse(ArrayFolder(where).read_bytes(MANIFEST), f"{where}/{MANIFEST}")
        if manifest.get("format") != FORMAT:
            raise DatasetError(f"{where} was made by another version of Scantly; prepare the dataset again.")
        return cls(where, manifest)

    def __reduce__(self) -> tuple[type[Store], tuple[str, dict[str, Any]]]:
        return type(self), (self.url, self._manifest)

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes)

    def shape(self, case: str) -> tuple[int, int, int]:
        """Shape (D, H, W) of the prepared case."""
        depth, height, width = self._entry(case)["shape"]
        return depth, height, width

    def has_label(self, case: str) -> bool:
        """Whether the store holds the case's label."""
        return bool(self._entry(case)["labeled"])

    def read_image(self, case: str, index: Index) -> NDArray[np.float32]:
        """Part of a prepared image, (C, d, h, w); only the chunks it touches are read.

        Raises:
            DamagedArrayError: if one of them is damaged; the case is prepared again by the next
                :func:`~scantly.data.build.build_store`.
        """
        self._entry(case)
        return self._read(self._images, case, (slice(None), *index))

    def read_label(self, case: str, index: Index) -> NDArray[np.uint8] | NDArray[np.int16]:
        """Part of a prepared label, (d, h, w), uint8 (int16 beyond 255 classes).

        Raises:
            DamagedArrayError: as :meth:`read_image`.
            DatasetError: if the case has no label in this store.
        """
        self._require_label(case)
        return self._read(self._folder, f"labels/{case}", index)

    def record(self, case: str) -> Record:
        """What was done to the case, for :func:`scantly.data.prepare.restore`."""
        self._entry(case)
        return self._records.get(case, lambda: Record.from_dict(_sidecar(self._images, case)["record"]))

    def classes_per_slice(self, case: str) -> NDArray[np.bool_]:
        """Which classes each slice of a labeled case holds, (D, K) bool; column 0 is background."""
        present = np.zeros((self.shape(case)[0], self.num_classes), dtype=bool)
        for row, values in enumerate(self.presence(case).classes_per_slice):
            present[row, values] = True
        return present

    def foreground(self, case: str) -> dict[int, NDArray[np.int64]]:
        """Sampled voxels of each foreground class in a labeled case, (n, 3) as (z, y, x), n <= 1000."""
        shape = self.shape(case)
        found = self.presence(case).foreground
        return {value: np.stack(np.unravel_index(flat, shape), axis=1) for value, flat in found.items()}

    def _read(self, folder: ArrayFolder, name: str, index: tuple[slice, ...]) -> NDArray[Any]:
        try:
            return folder.read(f"{name}.b2nd", index)
        except DamagedArrayError as error:
            if not folder.local:
                raise
            path = Path(folder.url) / f"{name}.b2nd"
            try:
                path.with_suffix(".json").unlink(missing_ok=True)
            except OSError:  # a store that only others may write to
                raise error from None
            raise DamagedArrayError(
                f"{path} is damaged; remove it or leave it: the next start, a training with --resume, prepares this "
                "case again."
            ) from None

    def _entry(self, case: str) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = self._manifest["cases"][case]
        except KeyError:
            raise DatasetError(f"case '{case}' is not in the store {self.url}; prepare it first.") from None
        return entry

    def _require_label(self, case: str) -> None:
        if not self.has_label(case):
            raise DatasetError(f"the label of case '{case}' is not in the store {self.url}: it is hidden.")

    def presence(self, case: str) -> Presence:
        """Which classes the label of a labeled case holds."""
        self._require_label(case)
        return self._presences.get(case, lambda: Presence.from_dict(_sidecar(self._folder, f"labels/{case}")))


def _sidecar(folder: ArrayFolder, name: str) -> dict[str, Any]:
    return _parse(folder.read_bytes(f"{name}.json"), f"{folder.url}/{name}.json")


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DatasetError(f"{where} is damaged; remove it and prepare the dataset again.")
    return value
