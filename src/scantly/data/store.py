"""The store: prepared cases on disk, read in parts, remade when plan or source files change.

Layout, below the cache folder::

    <dataset>-<digest of dataset folder, classes and preparation>/
        images/<case>.b2nd, <case>.json      prepared image (C, D, H, W) float32; record and sources
        set-<digest of the cases>/
            store.json                       the cases of this store; written last of all
            labels/<case>.b2nd, <case>.json  prepared label (D, H, W); classes per slice, foreground voxels

Images are shared by all runs of one plan. Labels are not: a run with three labeled subjects has a folder
with the labels of these three and of no other case, so no mistake can read a hidden label, and another run
never changes the files of this one. A case's ``.json`` is written after its array; without it, or with a
file of another size, the case counts as not prepared.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from scantly.data.arrays import ArrayFolder, Recent, chunks_for, write_array
from scantly.data.dataset import Dataset
from scantly.data.plan import Plan
from scantly.data.prepare import Record, prepare, prepare_label
from scantly.errors import ConfigError, DatasetError
from scantly.files import digest, read_json, write_json, write_text
from scantly.imaging import Label

__all__ = ["Store", "build_store"]

log = logging.getLogger("scantly")

#: Raised when prepared arrays or sidecars change their meaning; older stores are then remade.
_FORMAT = 1
_FOREGROUND_VOXELS = 1000
_SIDECARS = 512
_MANIFEST = "store.json"

Index = tuple[slice, slice, slice]
Report = Callable[[int, int, str], None]


class Store:
    """Prepared cases of one plan. Opened by :meth:`open`, made by :func:`build_store`.

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
        self._sidecars: Recent[str, dict[str, Any]] = Recent(_SIDECARS)

    @classmethod
    def open(cls, url: str | Path) -> Store:
        """Open a store that :func:`build_store` made.

        Args:
            url: Its folder, or an fsspec URL of a copy of it and of the ``images`` folder beside it. Remote
                arrays are fetched whole when first touched.

        Raises:
            DatasetError: if there is no complete store.
        """
        where = os.path.abspath(url) if "://" not in str(url) else str(url)  # noqa: PTH100 (a path or a URL)
        manifest = _parse(ArrayFolder(where).read_bytes(_MANIFEST), f"{where}/{_MANIFEST}")
        if manifest.get("format") != _FORMAT:
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
        """Part of a prepared image, (C, d, h, w); only the chunks it touches are decompressed."""
        self._entry(case)
        return self._images.read(f"{case}.b2nd", (slice(None), *index))

    def read_label(self, case: str, index: Index) -> NDArray[np.uint8] | NDArray[np.int16]:
        """Part of a prepared label, (d, h, w), uint8 (int16 beyond 255 classes).

        Raises:
            DatasetError: if the case has no label in this store.
        """
        self._require_label(case)
        return self._folder.read(f"labels/{case}.b2nd", index)

    def record(self, case: str) -> Record:
        """What was done to the case, for :func:`scantly.data.prepare.restore`."""
        self._entry(case)
        sidecar = self._sidecar(self._images, f"{case}.json")
        return Record.from_dict(sidecar["record"])

    def classes_per_slice(self, case: str) -> NDArray[np.bool_]:
        """Which classes each slice of a labeled case holds, (D, K) bool; column 0 is background."""
        self._require_label(case)
        present = np.zeros((self.shape(case)[0], self.num_classes), dtype=bool)
        for row, values in enumerate(self._label_sidecar(case)["classes_per_slice"]):
            present[row, values] = True
        return present

    def foreground(self, case: str) -> dict[int, NDArray[np.int64]]:
        """Sampled voxels of each foreground class in a labeled case, (n, 3) as (z, y, x), n <= 1000."""
        self._require_label(case)
        shape = self.shape(case)
        return {
            int(value): np.stack(np.unravel_index(np.asarray(flat, dtype=np.int64), shape), axis=1)
            for value, flat in self._label_sidecar(case)["foreground"].items()
        }

    def _entry(self, case: str) -> dict[str, Any]:
        try:
            entry: dict[str, Any] = self._manifest["cases"][case]
        except KeyError:
            raise DatasetError(f"case '{case}' is not in the store {self.url}; prepare it first.") from None
        return entry

    def _require_label(self, case: str) -> None:
        if not self.has_label(case):
            raise DatasetError(f"the label of case '{case}' is not in the store {self.url}: it is hidden.")

    def _label_sidecar(self, case: str) -> dict[str, Any]:
        return self._sidecar(self._folder, f"labels/{case}.json")

    def _sidecar(self, folder: ArrayFolder, name: str) -> dict[str, Any]:
        where = f"{folder.url}/{name}"
        return self._sidecars.get(where, lambda: _parse(folder.read_bytes(name), where))


def build_store(
    dataset: Dataset,
    names: Sequence[str],
    plan: Plan,
    *,
    root: Path | None = None,
    with_labels: Collection[str],
    progress: Report | None = None,
) -> Store:
    """Prepare cases, or take those that are already prepared from unchanged files with the same plan.

    Safe against kills (what is whole is kept, the rest is made again) and against a second process that
    prepares the same dataset (it waits).

    Args:
        dataset: The dataset folder.
        names: Cases wanted, labeled or not.
        plan: How to prepare them. Patch and batch sizes do not matter here.
        root: Cache folder; ``None``: ``$SCANTLY_CACHE``, else ``~/.cache/scantly``.
        with_labels: Those whose label is prepared too (names outside ``names`` are ignored); the label files
            of all others are not opened.
        progress: Called as ``progress(done, total, name)`` after each case.

    Returns:
        The store of exactly these cases and labels.

    Raises:
        ConfigError: if the plan is for another number of channels.
        DatasetError: if a case has the wrong number of channels, a label lies on another grid than its image
            (naming both), holds a value that is not in ``dataset.json``, or is missing.
        ImageError: if a file cannot be read or holds NaN.
        RunError: if the cache folder cannot be written.
    """
    if len(plan.normalization) != len(dataset.channels):
        raise ConfigError(
            f"the plan normalizes {len(plan.normalization)} channels, but {dataset.root} has "
            f"{len(dataset.channels)}; make the plan from this dataset."
        )
    labeled = set(with_labels).intersection(names)
    base = _cache_root(root) / f"{_file_name(dataset.name)}-{_digest(dataset, plan)}"
    folder = base / f"set-{digest([list(names), sorted(labeled)])}"
    base.mkdir(parents=True, exist_ok=True)
    with _locked(base):
        shapes: dict[str, dict[str, Any]] = {}
        for done, name in enumerate(names, start=1):
            shapes[name] = _Job(dataset, name, plan, base, folder, name in labeled).run()
            if progress is not None:
                progress(done, len(names), name)
        manifest = {
            "format": _FORMAT,
            "dataset": dataset.name,
            "classes": list(dataset.classes),
            "channels": list(dataset.channels),
            "preparation": plan.preparation(),
            "cases": shapes,
        }
        path = folder / _MANIFEST
        if not path.exists() or _read_or_none(path) != manifest:
            write_json(path, manifest)
    return Store.open(folder)


@dataclass(frozen=True)
class _Job:
    """The preparation of one case; holds plain data only, so it can be sent to another process."""

    dataset: Dataset
    name: str
    plan: Plan
    base: Path
    folder: Path
    with_label: bool

    def run(self) -> dict[str, Any]:
        """Make what is missing; returns the case's entry in the manifest."""
        record = self._image()
        if self.with_label:
            self._label(Record.from_dict(record))
        return {"shape": record["prepared_shape"], "labeled": self.with_label}

    def _image(self) -> Any:
        path = self.base / "images" / f"{self.name}.b2nd"
        sources = _sources(self.dataset.case(self.name).images)
        known = _whole(path, sources)
        if known is not None:
            return known["record"]
        path.with_suffix(".json").unlink(missing_ok=True)
        array, record = prepare(self.dataset.read_image(self.name), self.plan)
        size = write_array(path, array, *chunks_for(array.shape, self.plan.spatial_dims))
        _write_sidecar(path, {"sources": sources, "bytes": size, "record": record.to_dict()})
        return record.to_dict()

    def _label(self, record: Record) -> None:
        case = self.dataset.case(self.name)
        path = self.folder / "labels" / f"{self.name}.b2nd"
        sources = _sources([*case.images, *([case.label] if case.label else [])])
        if _whole(path, sources) is not None:
            return
        path.with_suffix(".json").unlink(missing_ok=True)
        label = self.dataset.read_label(self.name)
        # the image's grid: a difference within the tolerance must not turn or size the label otherwise
        array = prepare_label(Label(label.array, record.geometry), self.plan)
        size = write_array(path, array, *chunks_for(array.shape, self.plan.spatial_dims))
        _write_sidecar(path, {"sources": sources, "bytes": size, **_presence(array, self.name)})


def _presence(label: NDArray[Any], name: str) -> dict[str, Any]:
    """Classes per slice, and up to 1000 voxels per foreground class (flat indices, drawn by the name)."""
    foreground = {}
    for value in np.unique(label):
        if value == 0:
            continue
        flat = np.flatnonzero(label == value)
        if flat.size > _FOREGROUND_VOXELS:
            generator = np.random.default_rng([int(digest(name), 16), int(value)])
            flat = np.sort(generator.choice(flat, _FOREGROUND_VOXELS, replace=False))
        foreground[str(int(value))] = flat.tolist()
    return {"classes_per_slice": [np.unique(plane).tolist() for plane in label], "foreground": foreground}


def _sources(paths: Sequence[Path]) -> list[list[Any]]:
    """Path, size and time of change of the files that a prepared array comes from."""
    found = []
    for path in paths:
        try:
            state = path.stat()
        except FileNotFoundError:
            raise DatasetError(f"{path} does not exist; restore it or remove the case.") from None
        found.append([str(path.absolute()), state.st_size, state.st_mtime_ns])
    return found


def _whole(path: Path, sources: list[list[Any]]) -> dict[str, Any] | None:
    """The sidecar of an array that is whole and made from these very files, else ``None``."""
    known = _read_or_none(path.with_suffix(".json"))
    if known is None or known.get("format") != _FORMAT or known.get("sources") != sources:
        return None
    whole = path.exists() and path.stat().st_size == known.get("bytes")
    return known if whole else None


def _read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        value = read_json(path)
    except ConfigError:
        return None
    return value if isinstance(value, dict) else None


def _write_sidecar(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps({"format": _FORMAT, **values}, separators=(",", ":"), allow_nan=False)
    write_text(path.with_suffix(".json"), text + "\n")


def _parse(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise DatasetError(f"{where} is damaged; remove it and prepare the dataset again.")
    return value


def _digest(dataset: Dataset, plan: Plan) -> str:
    where = str(dataset.root.resolve())
    return digest([_FORMAT, where, list(dataset.classes), list(dataset.channels), plan.preparation()])


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def _cache_root(root: Path | None) -> Path:
    if root is not None:
        return root.absolute()
    return Path(os.environ.get("SCANTLY_CACHE") or "~/.cache/scantly").expanduser().absolute()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, saying so if another process has it."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log.info("Waiting for another process that is preparing %s.", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
