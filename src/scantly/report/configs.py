"""Configurations as text, and what differs between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from scantly.training.run import Run

__all__ = ["Difference", "as_yaml", "differences", "differing_keys", "flatten"]

_UNSET = "—"
_LONGEST = 60
_SAID_ELSEWHERE = ("plan.reasons.", "plan.fingerprint.")


@dataclass(frozen=True)
class Difference:
    """One setting that is not the same in all runs: its dotted key and its value in each run."""

    key: str
    values: tuple[str, ...]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys.

    Example:
        >>> flatten({"a": {"b": 1, "c": {"d": [2]}}})
        {'a.b': 1, 'a.c.d': [2]}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not all equal, in order of first appearance."""
    keys = dict.fromkeys(key for values in settings for key in values)
    return [key for key in keys if any(values.get(key) != settings[0].get(key) for values in settings)]


def as_yaml(values: Mapping[str, Any]) -> str:
    """Plain settings as YAML text in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=100)


def differences(runs: Sequence[Run]) -> list[Difference]:
    """Settings and environment that differ between runs, but for a plan's reasons and fingerprint."""
    settings = [flatten(run.config) | flatten(run.environment, "environment.") for run in runs]
    return [
        Difference(key, tuple(_short(values[key]) if key in values else _UNSET for values in settings))
        for key in differing_keys(settings)
        if not key.startswith(_SAID_ELSEWHERE)
    ]


def _short(value: Any) -> str:
    if isinstance(value, list) and len(str(value)) > _LONGEST:
        return f"{len(value)} entries: {value[0]} … {value[-1]}"
    text = str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
