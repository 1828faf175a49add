"""Files written whole or not at all, and the text formats of the project: one reader for JSON, one for YAML.

Everything Scantly writes goes through :func:`atomic_path`: a reader, or a run that is resumed after a kill,
sees either the old file or the new one, never a part. Folders that a command fills have one writer at a time, by
:func:`sole_writer`.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import json
import os
import tempfile
import unicodedata
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
    "kind_of",
    "longest_name",
    "name_too_long",
    "normal_name",
    "parse_yaml",
    "read_json",
    "read_text",
    "read_yaml",
    "sole_writer",
    "temporary_name",
    "write_json",
    "write_text",
    "write_yaml",
]


_LONGEST_NAME = 255  # bytes, of almost all file systems
_HIDDEN = ".tmp-"
_RANDOM = 9  # what tempfile puts into the middle, and the hyphen


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that replaces it when the block ends without an error.

    The temporary name keeps the suffixes of ``path`` (writers that look at them work) and is no longer than the
    file system allows where that of ``path`` is not; it is hidden, and removed if the block fails. Contents and
    directory entry are flushed to the disk before and after the replacement, so a power cut leaves one whole
    version too.

    Args:
        path: Final file. Missing parent folders are made.

    Raises:
        RunError: if the disk is full or not writable; the earlier file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tail = _tail(path.name, longest_name(path.parent) - len(_HIDDEN) - _RANDOM)
        handle, name = tempfile.mkstemp(prefix=_HIDDEN, suffix=f"-{tail}", dir=path.parent)
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
        long = error.errno == errno.ENAMETOOLONG
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; "
            f"{'choose a shorter name' if long else 'free space or choose another folder'}. "
            "What was there before is unchanged."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


def normal_name(name: str) -> str:
    """A name by which cases, classes and persons are compared: letters with accents as one sign each (Unicode NFC).

    macOS writes file names with letter and accent apart (NFD); what looks alike is then no longer equal.
    """
    return unicodedata.normalize("NFC", name)


def longest_name(folder: Path) -> int:
    """Bytes that the name of a file in a folder may have, by its file system; the folder need not exist yet."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path())
    try:
        return os.pathconf(there, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # Windows, and file systems that do not say
        return _LONGEST_NAME


def name_too_long(path: Path) -> str | None:
    """What is wrong with a file's name if it is longer than its file system allows; None if it is not.

    Letters beyond ASCII take two to four bytes each.
    """
    length, longest = len(os.fsencode(path.name)), longest_name(path.parent)
    return f"{path} would have a name of {length} bytes, {longest} are possible" if length > longest else None


def temporary_name(name: str) -> str:
    """Hidden name for a file on its way to ``name``, no longer than file systems allow."""
    return _HIDDEN + _tail(name, _LONGEST_NAME - len(_HIDDEN))


def _tail(name: str, length: int) -> str:
    """The end of a name that fits into so many bytes: its suffixes stay."""
    while len(os.fsencode(name)) > length:
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


def write_yaml(path: Path, value: Any) -> None:
    """Write plain lists, dicts and scalars as YAML in the order given, atomically."""
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100))


def read_text(path: Path) -> str:
    """Read a text file saved as UTF-8, with or without a byte-order mark; line ends become single line feeds.

    Raises:
        ConfigError: if the file is missing, a folder or not readable, or is saved as something else than UTF-8.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; give the file.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); check its permissions.") from error
    coding = _wide_coding(content)
    if coding is not None:
        raise ConfigError(f"{path} is saved as {coding}; save it as UTF-8.")
    if b"\0" in content:
        raise ConfigError(f"{path} is no text file (it holds zero bytes); give a text file saved as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = max(1, len(content[: error.start + 1].splitlines()))
        raise ConfigError(
            f"{path} is not saved as UTF-8 (line {line} holds other bytes, as of Latin-1 or Windows-1252); save it as "
            "UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _wide_coding(content: bytes) -> str | None:
    """UTF-16 or UTF-32, by the byte-order mark or the zero bytes that letters have in them; None: neither."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    sides = content[0::2].count(0), content[1::2].count(0)
    return "UTF-16" if max(sides) > len(content) // 4 and min(sides) == 0 else None


class _TwiceError(ValueError):
    """A key that is there twice, and where in words."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ConfigError: if the file cannot be read (:func:`read_text`), is empty, is not JSON (with the line of the
            fault), gives a key twice, or holds something else than an object.
    """
    text = read_text(path)
    if not text.strip():
        raise ConfigError(f"{path} is empty; write an object, {{...}}, or remove the file.")
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except _TwiceError as error:
        raise ConfigError(f"{path} has the key {error} twice in one object; keep one.") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON ({_json_fault(error)}); mend or remove it.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({str(error).partition(';')[0]}); mend or remove it.") from error
    except RecursionError:
        raise ConfigError(f"{path} is not valid JSON (it is nested too deeply); mend or remove it.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {kind_of(value)}, not an object; write {{...}} or remove it.")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(repr(next(key for key in keys if keys.count(key) > 1)))
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _json_fault(error: json.JSONDecodeError) -> str:
    """Where and what, in words."""
    after = error.doc[error.pos :].lstrip(", \t\n")[:1]  # newer Pythons point at the comma, older ones behind it
    before = error.doc[: error.pos + 1].rstrip("]} \t\n")
    if after and after in "]}" and before.endswith(","):
        line = before.count("\n") + 1
        return f"line {line}: the comma before the closing '{after}' is one too many"
    return f"line {error.lineno}, column {error.colno}: {error.msg[0].lower()}{error.msg[1:]}"


def kind_of(value: Any) -> str:
    """What a value of JSON or YAML is, in words.

    Example:
        >>> [kind_of(value) for value in ([1], {}, "a", 1.5, True, None)]
        ['a list', 'an object', 'text', 'a number', 'true or false', 'null']
    """
    kinds = {list: "a list", dict: "an object", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


class _Loader(yaml.SafeLoader):
    """Plain data only; a key that is given twice is refused rather than the first value dropped."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1  # "2" and 2 are two keys
            if name in seen:
                lines = f" (lines {seen[name]} and {line})" if line != seen[name] else ""
                raise _TwiceError(f"the key {key.value!r} twice{lines}")
            seen[name] = line
        return super().construct_mapping(node, deep=deep)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text holds; only plain data is built, never objects.

    Args:
        text: The text.
        where: Begins messages, for instance a path.

    Raises:
        ConfigError: if it is not YAML, with the line of the fault, or gives a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _TwiceError as error:
        raise ConfigError(f"{where} has {error}; keep one.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        fault = f"{line}{error.problem or error.context}"
    except yaml.reader.ReaderError as error:
        line = f"line {text.count(chr(10), 0, error.position) + 1}: "
        fault = f"{line}the character {error.character!r} cannot stand there"
    except (ValueError, TypeError) as error:  # what looks like a date and is none, keys that no dictionary takes
        fault = str(error)
    except RecursionError:
        fault = "it is nested too deeply"
    raise ConfigError(f"{where} is not valid YAML ({' '.join(fault.split())}); mend it.")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Only plain data is built, never objects.

    Raises:
        ConfigError: if the file cannot be read (:func:`read_text`), is empty, is not YAML (with the line of the
            fault), gives a key twice, or does not hold a mapping.
    """
    value = parse_yaml(read_text(path), str(path))
    if value is None:
        raise ConfigError(f"{path} is empty; write 'section: ...' lines.")
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {kind_of(value)}, not settings; write 'section: ...' lines.")
    return value


def digest(value: Any) -> str:
    """Short hexadecimal SHA-256 of plain data, independent of the order of dictionary keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
