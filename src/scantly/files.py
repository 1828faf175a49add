"""Files written whole or not at all, and the text formats of the project.

Everything Scantly writes goes through :func:`atomic_path`: a reader, or a run that is resumed after a kill,
sees either the old file or the new one, never a part. Folders that a command fills have one writer at a time, by
:func:`sole_writer`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from scantly.errors import ConfigError, RunError

__all__ = [
    "atomic_path",
    "digest",
    "holding",
    "read_json",
    "read_yaml",
    "sole_writer",
    "write_json",
    "write_text",
    "write_yaml",
]


#: Bytes of a file's name that its temporary name keeps; file systems take 255 in all.
_LONGEST_TAIL = 200


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that replaces it when the block ends without an error.

    The temporary name keeps the suffixes of ``path`` (writers that look at them work), is hidden, and is
    removed if the block fails. Contents and directory entry are flushed to the disk before and after the
    replacement, so a power cut leaves one whole version too.

    Args:
        path: Final file. Missing parent folders are made.

    Raises:
        RunError: if the disk is full or not writable; the earlier file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".tmp-", suffix="-" + _tail(path.name), dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        temporary.chmod(mode)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder. "
            "What was there before is unchanged."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def _tail(name: str) -> str:
    """The end of a name, as long as the temporary one may be: a name of 255 bytes can be written too."""
    while len(os.fsencode(name)) > _LONGEST_TAIL:
        name = name[1:]
    return name


def _remove(temporary: Path | None) -> None:
    if temporary is not None:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems (and Windows) cannot open folders; the rename is atomic anyway
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def sole_writer(folder: Path, doing: str, *, cure: str = "wait for it or choose another --out") -> Iterator[None]:
    """Hold a folder alone while the block writes into it.

    The lock is the system's, on ``.lock`` in the folder: it falls with the process, however that ends. At the end the
    file is removed, and so is a folder that was made for the block and stayed empty.

    Args:
        folder: Made if it is missing.
        doing: What the other process is said to be doing, for instance ``"predicting"``.
        cure: What the user can do about it.

    Raises:
        RunError: if another process holds the folder, or it cannot be written.
    """
    new = not folder.exists()
    try:
        with holding(folder / ".lock", f"another process is {doing} in {folder}; {cure}."):
            yield
    finally:
        if new:
            with suppress(OSError):  # not empty, as it should be
                folder.rmdir()


@contextmanager
def holding(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file while the block runs.

    Args:
        path: The file; missing parent folders are made. It is removed at the end.
        refusal: What is said if another process holds it.

    Raises:
        RunError: if so, or if the file cannot be written.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(refusal) from None
    except OSError as error:
        raise RunError(f"cannot write in {path.parent}: {error.strerror or error}; choose another folder.") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file; one that stays hinders nobody
            path.unlink()
        lock.release()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinities are refused (they are not JSON)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ConfigError: if the file is missing or is not JSON, with the line of the fault.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); mend or remove it.") from error


def write_yaml(path: Path, value: Any) -> None:
    """Write plain lists, dicts and scalars as YAML in the order given, atomically."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Only plain data is built, never objects.

    Raises:
        ConfigError: if the file is missing, is not YAML, or does not hold a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML ({error}); mend it.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, not settings; write 'section: ...' lines.")
    return value


def digest(value: Any) -> str:
    """Short hexadecimal SHA-256 of plain data, independent of the order of dictionary keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
