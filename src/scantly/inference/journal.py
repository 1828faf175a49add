"""Which scans of an interrupted prediction are done, so that the same command goes on with the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeGuard

from scantly.errors import ConfigError
from scantly.files import digest, read_json, write_json
from scantly.imaging.volumes import Source

__all__ = ["Journal", "state_of"]

_LOGGER = logging.getLogger("scantly")
_SECONDS_BETWEEN_WRITES = 1.0


class _Done(TypedDict):
    """A scan that was predicted: the state of its files, and the names of what was written for it."""

    state: str
    outputs: list[str]


class Journal:
    """A small file beside the predictions while they are not complete; it is removed with the last of them.

    A scan is done if it was predicted under the same key, its files have the size and time of change that they
    had then, and all outputs wanted were written then and are there. A prediction that came to its end leaves no
    journal: the same command then predicts everything again. A journal of another key is removed at once, since
    what it lists is about to be overwritten.

    Args:
        folder: Where the predictions are.
        key: Stands for model, settings and everything else that shapes a prediction.
    """

    NAME = ".scantly-predictions.json"

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / self.NAME
        self._key = key
        self._done: dict[str, _Done] = {}
        self._written_at = -_SECONDS_BETWEEN_WRITES
        if self._path.is_file():
            cure = "does not list predictions; remove it, and all scans are predicted"
            try:
                found = read_json(self._path)
            except ConfigError as error:
                reason = str(error).removeprefix(f"{self._path} ").partition(";")[0]
                raise ConfigError(f"{self._path} {cure} (it {reason}).") from error
            if not _is_journal(found):
                raise ConfigError(f"{self._path} {cure}.")
            if found["key"] == key:
                self._done = found["done"]
            else:
                self._path.unlink()
                _LOGGER.info("%s holds predictions of another model or other settings; all are made again", folder)

    def holds(self, case: str, state: str, outputs: Iterable[Path]) -> bool:
        """Whether a scan needs no prediction.

        Args:
            case: Its name.
            state: Of its files, see :func:`state_of`.
            outputs: What the prediction writes.
        """
        known = self._done.get(case)
        if known is None or known["state"] != state:
            return False
        return all(path.name in known["outputs"] and path.is_file() for path in outputs)

    def add(self, case: str, state: str, outputs: Iterable[Path]) -> None:
        """Note a scan whose outputs are written; ``state`` is that of before the prediction."""
        self._done[case] = {"state": state, "outputs": [path.name for path in outputs]}
        if time.monotonic() - self._written_at >= _SECONDS_BETWEEN_WRITES:
            self.save()

    def save(self) -> None:
        """Write the journal, unless there is nothing in it."""
        if self._done:
            write_json(self._path, {"key": self._key, "done": self._done})
            self._written_at = time.monotonic()

    @contextmanager
    def kept(self) -> Iterator[Journal]:
        """Write the journal when the block ends, however it ends."""
        try:
            yield self
        finally:
            self.save()

    def finish(self) -> None:
        """All scans are done."""
        self._path.unlink(missing_ok=True)


def _is_journal(found: object) -> TypeGuard[dict[str, Any]]:
    if not isinstance(found, dict) or "key" not in found or not isinstance(found.get("done"), dict):
        return False
    return all(
        isinstance(entry, dict) and isinstance(entry.get("state"), str) and isinstance(entry.get("outputs"), list)
        for entry in found["done"].values()
    )


def state_of(sources: Sequence[Source]) -> str:
    """Check sum of path, size and time of change of every file of a scan."""
    files = [
        file
        for source in sources
        for file in ([source] if isinstance(source, Path) else [part.path for part in source.slices])
    ]
    return digest([_stamp(file) for file in files])


def _stamp(file: Path) -> list[str | int]:
    try:
        found = file.stat()
    except OSError:  # gone meanwhile: whoever reads it says so
        return [str(file.resolve())]
    return [str(file.resolve()), found.st_size, found.st_mtime_ns]
