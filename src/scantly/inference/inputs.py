"""Which scans a prediction is asked for: files and folders, channels put together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from scantly.errors import ImageError
from scantly.imaging import ENDINGS, file_ending, stem

__all__ = ["find_inputs"]

_CHANNEL = re.compile(r"_(\d{4})$")


def find_inputs(inputs: Iterable[str | Path], *, channels: int) -> dict[str, tuple[Path, ...]]:
    """Scans by name from files and folders; channels are told by ``_0000``, ``_0001`` at the end of the name.

    Args:
        inputs: Files, or folders whose scans are all taken.
        channels: How many channels the model takes.

    Returns:
        Case name -> its files in channel order.

    Raises:
        ImageError: for a path that does not exist, a folder without scans, two scans of one name, or a scan
            with missing channels.
    """
    files: list[Path] = []
    for item in map(Path, inputs):
        if item.is_dir():
            found = sorted(f for f in item.iterdir() if file_ending(f) and not f.name.startswith("."))
            if not found:
                raise ImageError(f"{item} holds no scans ({', '.join(ENDINGS)}); give files or another folder.")
            files += found
        elif item.is_file():
            files.append(item)
        else:
            raise ImageError(f"{item} does not exist.")
    cases: dict[str, dict[int, Path]] = {}
    for file in files:
        name, channel = _case_and_channel(file, channels)
        if channel in cases.setdefault(name, {}):
            raise ImageError(f"{file} and {cases[name][channel]} are both channel {channel} of '{name}'; rename one.")
        cases[name][channel] = file
    for name, by_channel in cases.items():
        colors_in_one_file = list(by_channel) == [0] and file_ending(by_channel[0]) in {".png", ".tif", ".tiff"}
        if not colors_in_one_file and sorted(by_channel) != list(range(channels)):
            raise ImageError(
                f"'{name}' has channels {sorted(by_channel)}, the model takes {list(range(channels))}; give one file "
                "per channel, named <case>_0000, <case>_0001, ..."
            )
    return {name: tuple(by_channel[c] for c in sorted(by_channel)) for name, by_channel in cases.items()}


def _case_and_channel(file: Path, channels: int) -> tuple[str, int]:
    """With one channel only ``_0000`` is a channel; other numbers are part of the name, as in ``scan_0017``."""
    match = _CHANNEL.search(stem(file))
    if match is None or (channels == 1 and int(match[1]) > 0):
        return stem(file), 0
    return stem(file)[: match.start()], int(match[1])
