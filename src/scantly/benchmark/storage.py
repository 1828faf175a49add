"""Run folders kept under an address of fsspec (``s3://bucket/results``), for workers that share no disk.

A worker fetches what is there, works on its own disk and sends files back whenever they have changed. What lies there
is at any moment a folder that can be resumed, as one is that a kill leaves behind: log, pseudo-labels and best
checkpoint may be newer than the last checkpoint (what is newer is cut back or made again), never older. So the last
checkpoint is held as it is when a round of sending begins, and sent when all else of the round is there; after it comes
the model alone, which marks the run as finished.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem

from scantly.data.build import cache_root
from scantly.errors import RunError, ScantlyError
from scantly.files import digest, temporary_name

__all__ = ["Remote", "is_address", "scratch_folder"]

_LOGGER = logging.getLogger("scantly")
#: Order of sending; what is not named stands in the middle.
_FIRST = ("environment.json", "config.yaml", "checkpoints/stage-", "pseudo_labels/", "checkpoints/best.ckpt")
_CHECKPOINT = "checkpoints/last.ckpt"
_LAST = (_CHECKPOINT, "model.safetensors")
_SKIPPED = (".lock", ".tmp-")
_HELD = ".tmp-held"
#: Seconds before the last round is tried again.
_PAUSES = (2.0, 10.0, 60.0)


def is_address(place: str) -> bool:
    """Whether it is an address of fsspec rather than a path.

    Example:
        >>> is_address("s3://bucket/results"), is_address("results")
        (True, False)
    """
    return "://" in place


def scratch_folder(address: str) -> Path:
    """Where this machine works on what is kept under an address: a folder of its own in the cache."""
    return cache_root() / "benchmarks" / digest(address.rstrip("/"))


class Remote:
    """A folder under an address.

    Args:
        address: For instance ``s3://bucket/results/cells/acdc/supervised-3-seed1``.
        without: Beginnings of names, below the folder, that are neither fetched nor sent.

    Raises:
        RunError: if the address cannot be used.
    """

    def __init__(self, address: str, *, without: tuple[str, ...] = ()) -> None:
        self.address, self._without = address.rstrip("/"), without
        with self._told("used"):
            self._files, self._root = fsspec.core.url_to_fs(self.address)
        self._sent: dict[str, tuple[int, int]] = {}

    def fetch(self, folder: Path, *, suffixes: tuple[str, ...] = ()) -> list[str]:
        """Make a folder of this machine what lies under the address.

        Files that are not there are removed, lest parts of two states are mixed: what was not sent is done again.

        Args:
            folder: Where to.
            suffixes: Copy only files with these endings; none: all.

        Returns:
            Names of all that is there, below the address.

        Raises:
            RunError: if it cannot be read.
        """
        with self._told("read"):
            there = {name: place for name, place in self._names().items() if not self._left_out(name)}
            self._clear(folder, there)
            for name, place in there.items():
                if suffixes and not name.endswith(suffixes):
                    continue
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(temporary_name(target.name))
                self._files.get_file(place, str(partial))
                partial.replace(target)
                self._sent[name] = _stamp(target)
        return sorted(there)

    def _clear(self, folder: Path, there: Container[str]) -> None:
        """Remove what is not there, and folders that are then empty."""
        for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):
                    path.rmdir()
            elif name not in there and not self._left_out(name):
                path.unlink()

    def _names(self) -> dict[str, str]:
        """Files by their name below the address."""
        self._files.invalidate_cache()
        try:
            self._files.info(self._root)
        except FileNotFoundError:
            return {}
        return {place[len(self._root) :].lstrip("/"): place for place in self._files.find(self._root)}

    def require_writable(self) -> None:
        """Write a small file and remove it.

        Raises:
            RunError: if that fails.
        """
        place = f"{self._root}/.tmp-{uuid.uuid4().hex}"
        with self._told("written"):
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(place, b"may be removed")
            self._files.rm_file(place)

    def send(self, folder: Path) -> None:
        """Copy what has changed since it was last sent or fetched, each file whole or not at all; links are left out.

        Raises:
            RunError: if it cannot be written.
        """
        with self._told("written"), _held(folder / _CHECKPOINT, folder / _HELD) as checkpoint:
            for path in _in_order(folder):
                name = path.relative_to(folder).as_posix()
                if self._left_out(name):
                    continue
                source = path if name != _CHECKPOINT else checkpoint
                try:
                    stamp = _stamp(source) if source else None
                    if source and stamp and self._sent.get(name) != stamp:
                        self._put(source, f"{self._root}/{name}")
                        self._sent[name] = stamp
                except FileNotFoundError:
                    if path.exists():  # so it is the address that is not there
                        raise

    def _put(self, source: Path, place: str) -> None:
        parent, _, name = place.rpartition("/")
        partial = f"{parent}/{temporary_name(name)}"
        self._files.makedirs(parent, exist_ok=True)
        self._files.put_file(str(source), partial)
        if type(self._files).mv is not AbstractFileSystem.mv:
            self._files.mv(partial, place)
        else:  # fsspec's own takes brackets and the like in a name for a pattern
            self._files.cp_file(partial, place)
            self._files.rm_file(partial)

    @contextmanager
    def _told(self, verb: str) -> Iterator[None]:
        """Errors as one sentence."""
        try:
            yield
        except ScantlyError:
            raise
        except Exception as error:  # a file system of fsspec raises what its library does
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RunError(
                f"{self.address} cannot be {verb} ({reason}); check the address, its rights, and that the package of "
                "fsspec for it is installed."
            ) from error

    def _left_out(self, name: str) -> bool:
        return name.rpartition("/")[2].startswith(_SKIPPED) or name.startswith(self._without)

    @contextmanager
    def mirrored(self, folder: Path, *, every: float = 20.0) -> Iterator[None]:
        """Fetch, then send every so often while the block runs, and once more at its end.

        Args:
            folder: The folder of this machine.
            every: Seconds between two looks.

        Raises:
            RunError: if the address cannot be read, or cannot be written, before the block or after it.
        """
        self.require_writable()
        self.fetch(folder)
        over = threading.Event()
        thread = threading.Thread(target=self._keep_sending, args=(folder, every, over), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._send_at_last(folder)

    def _send_at_last(self, folder: Path) -> None:
        """What is not sent now is lost to all other machines: an address that is away for a moment is waited for."""
        for pause in _PAUSES:
            try:
                return self.send(folder)
            except RunError as error:
                _LOGGER.warning("%s Trying again in %g seconds.", error, pause)
                time.sleep(pause)
        return self.send(folder)

    def _keep_sending(self, folder: Path, every: float, over: threading.Event) -> None:
        while not over.wait(every):
            try:
                self.send(folder)
            except RunError as error:  # the block goes on; its end sends again and then fails
                _LOGGER.warning("%s", error)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@contextmanager
def _held(path: Path, place: Path) -> Iterator[Path | None]:
    """The file as it is now, though it may be replaced meanwhile; ``None`` where there is none."""
    if not path.is_file():
        yield None
        return
    place.unlink(missing_ok=True)
    try:
        try:
            os.link(path, place)
        except OSError:  # no links on this file system
            shutil.copy2(path, place)
        yield place
    finally:
        place.unlink(missing_ok=True)


def _in_order(folder: Path) -> list[Path]:
    def rank(path: Path) -> tuple[int, str]:
        name = path.relative_to(folder).as_posix()
        for number, start in enumerate(_FIRST):
            if name.startswith(start):
                return number, name
        return len(_FIRST) + (1 + _LAST.index(name) if name in _LAST else 0), name

    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(files, key=rank)
