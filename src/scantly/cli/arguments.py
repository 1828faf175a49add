"""What the parser cannot do: options with a varying number of values, and ``--debug`` anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from scantly.errors import ConfigError

__all__ = ["examples", "join_values", "parse_labeled", "parse_size", "take_debug"]

_NUMBERS = ("--size", "--stride")


def take_debug(words: Sequence[str]) -> tuple[list[str], bool]:
    """Remove ``--debug``, wherever it stands before a ``--``.

    Returns:
        The other words, and whether it was there.
    """
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return [*kept, *words[end:]], len(kept) < end


def join_values(words: Sequence[str]) -> list[str]:
    """Give options with several values the form that the parser knows.

    ``--size`` and ``--stride`` take the whole numbers that follow, ``--set`` the words that contain ``=`` and do
    not begin with ``-``. Nothing behind ``--`` is touched.

    Example:
        >>> join_values(["--size", "64", "64", "32", "--set", "a=1", "b=2", "--resume"])
        ['--size', '64 64 32', '--set', 'a=1', '--set', 'b=2', '--resume']
    """
    joined: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*joined, word, *rest]
        option, equals, first = word.partition("=")
        if option not in {*_NUMBERS, "--set"}:
            joined.append(word)
            continue
        belongs = str.isdecimal if option in _NUMBERS else _is_assignment
        values = [*([first] if equals else []), *takewhile(belongs, rest)]
        del rest[: len(values) - bool(equals)]
        if not values:
            joined.append(option)  # the parser takes the next word, and says what is wrong with it
        elif option in _NUMBERS:
            joined += [option, " ".join(values)]
        else:
            joined += [part for value in values for part in (option, value)]
    return joined


def _is_assignment(word: str) -> bool:
    return "=" in word and not word.startswith("-")


def parse_size(text: str | None, option: str = "--size") -> list[int] | None:
    """``"64 64 32"`` as numbers.

    Raises:
        ConfigError: if it is anything else than two or three positive whole numbers.
    """
    if text is None:
        return None
    parts = text.split()
    if len(parts) not in {2, 3} or not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} takes H W or H W D in voxels, for instance 256 256; got '{text}'.")
    return [int(part) for part in parts]


def parse_labeled(text: str | None) -> int | str | None:
    """``"7"`` as the number 7; a share such as ``"10%"`` as it is."""
    return int(text) if text is not None and text.isdecimal() else text


def examples(*commands: str) -> str:
    r"""The end of a command's help; ``\b`` keeps the parser from wrapping the lines anew."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)
