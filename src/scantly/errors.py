"""Errors that a user can act on.

Every error that a user can cause derives from :class:`ScantlyError`. Its message is one sentence (or one
per fault found) that names the thing, the value received and the cure. The command line prints it without
a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "ConfigError",
    "DatasetError",
    "DeviceError",
    "ImageError",
    "PeerError",
    "RunError",
    "ScantlyError",
    "listing",
    "megabytes",
    "times",
    "together",
    "unknown_name",
]


class ScantlyError(Exception):
    """Base of all errors that the user can mend; the message says how."""


class ImageError(ScantlyError):
    """A scan or label file that cannot be read, written or used."""


class DatasetError(ScantlyError):
    """A dataset folder, split or prepared store that does not hold what it should."""


class ConfigError(ScantlyError):
    """A setting, name or combination of options that does not exist or does not fit."""


class RunError(ScantlyError):
    """A run folder that cannot be written, resumed, read or compared."""


class PeerError(RunError):
    """One of several training processes that ended for a reason which another of them tells."""


class DeviceError(ScantlyError):
    """A device or precision that is not there, or has too little memory for what was asked."""


def together(faults: Sequence[ScantlyError] | Mapping[str, ScantlyError], head: str) -> ScantlyError:
    r"""Several faults as one error, to be raised: a line for each below a head. The only one of one is itself.

    Args:
        faults: At least one; by name of the case where their sentences do not say it.
        head: The first line, without colon.

    Returns:
        Of the faults' own class where they have one.

    Example:
        >>> together([ImageError("a.png is cut off."), ImageError("b.png is empty.")], "2 of 3 scans are unreadable")
        ImageError('2 of 3 scans are unreadable:\n  a.png is cut off.\n  b.png is empty.')
    """
    errors = list(faults.values() if isinstance(faults, Mapping) else faults)
    return errors[0] if len(errors) == 1 else listing(faults, head)


def listing(faults: Sequence[ScantlyError] | Mapping[str, ScantlyError], head: str) -> ScantlyError:
    """As :func:`together`, with the head for a single fault too."""
    errors = list(faults.values() if isinstance(faults, Mapping) else faults)
    lines = [f"{name}: {error}" for name, error in faults.items()] if isinstance(faults, Mapping) else map(str, errors)
    kinds = {type(error) for error in errors}
    kind = kinds.pop() if len(kinds) == 1 else ScantlyError
    return kind("\n  ".join([f"{head}:", *lines]))


def times(sides: Iterable[int]) -> str:
    """Numbers of voxels per axis in words.

    Example:
        >>> times((80, 112, 112))
        '80 x 112 x 112'
    """
    return " x ".join(map(str, sides))


def megabytes(count: float) -> str:
    """Bytes in words.

    Example:
        >>> megabytes(1_234_567_890), megabytes(12_345_678)
        ('1.2 GB', '12 MB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Sentence for a name that is not known, with the nearest known one.

    Args:
        kind: What the name should have been, for instance ``"method"``.
        name: The name received.
        known: All names that exist.

    Returns:
        For instance ``unknown method 'mean_techer'; did you mean 'mean_teacher'? Known: ...``.

    Example:
        >>> unknown_name("method", "mean_techer", ["supervised", "mean_teacher"])
        "unknown method 'mean_techer'; did you mean 'mean_teacher'? Known: mean_teacher, supervised."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}';{hint} Known: {', '.join(names) or 'none'}."
