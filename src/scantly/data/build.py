"""Making a store: cases prepared on disk, made again when plan or source files change.

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

Every chunk of an array has a checksum, which is compared on every read. A reader that finds a damaged chunk
removes the ``.json``, so that the next :func:`build_store` prepares this case again, and no other.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from scantly import imaging
from scantly.data.arrays import chunks_for, write_array
from scantly.data.dataset import Dataset
from scantly.data.faults import as_one, case_faults
from scantly.data.parallel import in_order, worker_count
from scantly.data.plan import Plan
from scantly.data.prepare import Record, prepare, prepare_label
from scantly.data.presence import Presence
from scantly.data.store import FORMAT, MANIFEST, Store
from scantly.errors import ConfigError, DatasetError, ImageError, ScantlyError
from scantly.files import digest, read_json, write_json, write_text
from scantly.imaging import Label
from scantly.imaging.decoding import within_memory

__all__ = ["build_store", "cache_root"]

log = logging.getLogger("scantly")

#: Memory that preparation takes per voxel and channel, of the grid before or after it; measured: 27.
_BYTES_PER_VOXEL = 32

Report = Callable[[int, int, str], None]


def build_store(
    dataset: Dataset,
    names: Sequence[str],
    plan: Plan,
    *,
    root: Path | None = None,
    with_labels: Collection[str],
    check_labels: Collection[str] = (),
    workers: int | None = None,
    progress: Report | None = None,
) -> Store:
    """Prepare cases, or take those that are already prepared from unchanged files with the same plan.

    Safe against kills (what is whole is kept, the rest is made again) and against a second process that
    prepares the same dataset (it waits). Files and errors do not depend on the number of workers.

    Args:
        dataset: The dataset folder.
        names: Cases wanted, labeled or not.
        plan: How to prepare them. Patch and batch sizes do not matter here.
        root: Cache folder; ``None``: ``$SCANTLY_CACHE``, else ``~/.cache/scantly``.
        with_labels: Those whose label is prepared too (names outside ``names`` are ignored); the label files
            of all others are not opened.
        check_labels: Those whose label is read but not prepared, for validation: what is wrong with it is told now.
        workers: Processes that prepare; 0 or 1: none but this one; ``None``: one per core that this process may
            use, as many as memory allows.
        progress: Called as ``progress(done, total, name)`` after each case, in the order of ``names``.

    Returns:
        The store of exactly these cases and labels.

    Raises:
        ConfigError: if the plan is for another number of channels.
        DatasetError: if no labeled case has any foreground.
        DatasetError: if a case has the wrong number of channels, a label lies on another grid than its image
            (naming both), holds a value that is not in ``dataset.json``, or is missing.
        ImageError: if a file cannot be read or holds NaN. The faults of all cases are told, a line each; the others
            are prepared nevertheless.
        RunError: if the cache folder cannot be written, or a worker is killed.
    """
    if len(plan.normalization) != len(dataset.channels):
        raise ConfigError(
            f"the plan normalizes {len(plan.normalization)} channels, but {dataset.root} has "
            f"{len(dataset.channels)}; make the plan from this dataset."
        )
    labeled = set(with_labels).intersection(names)
    base = cache_root(root) / f"{_file_name(dataset.name)}-{_digest(dataset, plan)}"
    folder = base / f"set-{digest([list(names), sorted(labeled)])}"
    base.mkdir(parents=True, exist_ok=True)
    with _locked(base):
        _clear_leftovers(base / "images", folder / "labels")
        jobs = [_Job(dataset, name, plan, base, folder, name in labeled, name in check_labels) for name in names]
        known = [job.known() for job in jobs]
        missing = [job for job, entry in zip(jobs, known, strict=True) if entry is None]
        need = max((job.memory() for job in missing), default=0) if workers is None else 0
        processes = worker_count(workers, len(missing), need)
        shapes: dict[str, dict[str, Any]] = {}
        faults: dict[str, list[ScantlyError]] = {}
        with closing(in_order(_Job.attempt, missing, processes)) as made:
            for done, (name, entry) in enumerate(zip(names, known, strict=True), start=1):
                found = next(made) if entry is None else entry
                if isinstance(found, list):
                    faults[name] = found
                else:
                    shapes[name] = found
                if progress is not None:
                    progress(done, len(names), name)
        _clear_leftovers(base / "images", folder / "labels")  # of workers that outlived a killed process for a moment
        if faults:
            raise as_one(faults, len(names))
        manifest = {
            "format": FORMAT,
            "dataset": dataset.name,
            "classes": list(dataset.classes),
            "channels": list(dataset.channels),
            "preparation": plan.preparation(),
            "cases": shapes,
        }
        path = folder / MANIFEST
        if not path.exists() or _read_or_none(path) != manifest:
            write_json(path, manifest)
    store = Store.open(folder)
    _tell_empty(store, [name for name in names if name in labeled])
    return store


def _tell_empty(store: Store, labeled: Sequence[str]) -> None:
    empty = [name for name in labeled if not store.foreground(name)]
    if empty and len(empty) == len(labeled):
        raise DatasetError(
            f"the label{'' if len(empty) == 1 else 's'} of {', '.join(empty[:8])} hold{'s' if len(empty) == 1 else ''} "
            "background alone, and there is no other labeled case to learn from; annotate one, or give more --labeled."
        )
    if empty:
        more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
        log.warning(
            "The label is all background in %s%s: patches of such cases are drawn anywhere; if they were never "
            "annotated, remove their label files.",
            ", ".join(empty[:8]),
            more,
        )


@dataclass(frozen=True)
class _Job:
    """The preparation of one case; holds plain data only, so it can be sent to another process."""

    dataset: Dataset
    name: str
    plan: Plan
    base: Path
    folder: Path
    with_label: bool
    check_label: bool = False

    def known(self) -> dict[str, Any] | None:
        """The case's entry in the manifest if nothing needs to be made."""
        if self.check_label:
            return None
        try:
            image = _whole(self._image_path, self._image_sources())
            if image is None or (self.with_label and _whole(self._label_path, self._label_sources()) is None):
                return None
        except DatasetError:  # a file is gone, as :meth:`attempt` will tell
            return None
        return self._entry(image["record"])

    def attempt(self) -> dict[str, Any] | list[ScantlyError]:
        """As :meth:`run`; what is wrong with the case instead of an error."""
        try:
            return self.run()
        except (DatasetError, ImageError) as error:
            asked = self.with_label or self.check_label
            return case_faults(self.dataset, self.name, with_label=asked) or [error]

    def run(self) -> dict[str, Any]:
        """Make what is missing; returns the case's entry in the manifest."""
        record = self._image()
        if self.check_label:
            self.dataset.read_label(self.name)
        if self.with_label:
            self._label(Record.from_dict(record))
        return self._entry(record)

    def memory(self) -> int:
        """Bytes that preparing the case takes at most, about; 0 if it cannot be prepared, as :meth:`run` will tell."""
        plan = self.plan
        try:
            geometry = imaging.read_geometry(self.dataset.case(self.name).images[0])
        except ImageError:
            return 0
        voxels = prepared = float(math.prod(geometry.shape))
        if plan.size is not None:
            prepared = math.prod(plan.size) * (geometry.shape[0] if plan.spatial_dims == 2 else 1)
        elif plan.spacing is not None and geometry.has_spacing:
            first = 3 - plan.spatial_dims
            prepared *= math.prod(geometry.spacing[first:]) / math.prod(plan.spacing[first:])
        return int(max(voxels, prepared) * len(self.dataset.channels) * _BYTES_PER_VOXEL)

    def _entry(self, record: Mapping[str, Any]) -> dict[str, Any]:
        return {"shape": record["prepared_shape"], "labeled": self.with_label}

    @property
    def _image_path(self) -> Path:
        return self.base / "images" / f"{self.name}.b2nd"

    @property
    def _label_path(self) -> Path:
        return self.folder / "labels" / f"{self.name}.b2nd"

    def _image_sources(self) -> list[list[Any]]:
        return _sources(self.dataset.case(self.name).images)

    def _label_sources(self) -> list[list[Any]]:
        case = self.dataset.case(self.name)
        return _sources([*case.images, *([case.label] if case.label else [])])

    def _image(self) -> Any:
        path, sources = self._image_path, self._image_sources()
        known = _whole(path, sources)
        if known is not None:
            return known["record"]
        path.with_suffix(".json").unlink(missing_ok=True)
        with within_memory(self.dataset.case(self.name).images[0]):
            array, record = prepare(self.dataset.read_image(self.name), self.plan)
        size = write_array(path, array, chunks_for(array.shape, self.plan.spatial_dims))
        _write_sidecar(path, {"sources": sources, "bytes": size, "record": record.to_dict()})
        return record.to_dict()

    def _label(self, record: Record) -> None:
        path, sources = self._label_path, self._label_sources()
        if _whole(path, sources) is not None:
            return
        path.with_suffix(".json").unlink(missing_ok=True)
        label = self.dataset.read_label(self.name)
        # the image's grid: a difference within the tolerance must not turn or size the label otherwise
        with within_memory(self.dataset.case(self.name).label):
            array = prepare_label(Label(label.array, record.geometry), self.plan)
        size = write_array(path, array, chunks_for(array.shape, self.plan.spatial_dims))
        _write_sidecar(path, {"sources": sources, "bytes": size, **Presence.of(array, self.name).to_dict()})


def _sources(paths: Sequence[Path]) -> list[list[Any]]:
    """Path, size and time of change of the files that a prepared array comes from."""
    found = []
    for path in paths:
        try:
            state = path.stat()
        except FileNotFoundError:
            raise DatasetError(f"{path} does not exist; restore it or remove the case.") from None
        except OSError as error:
            raise DatasetError(f"{path} cannot be read ({error.strerror}); check path and permissions.") from error
        found.append([str(path.absolute()), state.st_size, state.st_mtime_ns])
    return found


def _whole(path: Path, sources: list[list[Any]]) -> dict[str, Any] | None:
    """The sidecar of an array that is whole and made from these very files, else ``None``."""
    known = _read_or_none(path.with_suffix(".json"))
    if known is None or known.get("format") != FORMAT or known.get("sources") != sources:
        return None
    whole = path.exists() and path.stat().st_size == known.get("bytes")
    return known if whole else None


def _read_or_none(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except ConfigError:
        return None


def _write_sidecar(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, **values}, separators=(",", ":"), allow_nan=False)
    write_text(path.with_suffix(".json"), text + "\n")


def _clear_leftovers(*folders: Path) -> None:
    """Remove what a killed preparation was writing; the lock says that no other one is."""
    for folder in folders:
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)


def _digest(dataset: Dataset, plan: Plan) -> str:
    where = str(dataset.root.resolve())
    return digest([FORMAT, where, list(dataset.classes), list(dataset.channels), plan.preparation()])


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "_", name)


def cache_root(root: Path | None = None) -> Path:
    """The folder of what can be made again: ``root``, else ``$SCANTLY_CACHE``, else ``~/.cache/scantly``."""
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
