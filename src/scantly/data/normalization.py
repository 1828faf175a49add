"""Intensity normalization: its settings, and the choice per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from scantly.data.dataset import Dataset
from scantly.data.fingerprint import Intensity
from scantly.errors import ConfigError
from scantly.settings import Settings

__all__ = ["ChannelNormalization", "complete", "lacks_numbers", "requested"]


class ChannelNormalization(Settings):
    """Intensity normalization of one channel, over the whole image before any crop."""

    scheme: Literal["zscore", "minmax", "percentile", "ct", "none"] = Field(
        description="zscore: zero mean, unit deviation per image; minmax: [0, 1] per image; percentile: "
        "(I - p1) / (p99 - p1) with the image's percentiles 1 and 99, not clipped (LCLPL, Chaitanya et al., Medical "
        "Image Analysis 2023); ct: clip to [lower, upper], then subtract mean and divide by std (numbers of the "
        "cohort); none: as stored"
    )
    lower: float | None = Field(default=None, description="ct: lower clip, in the image's unit (HU)")
    upper: float | None = Field(default=None, description="ct: upper clip, in the image's unit (HU)")
    mean: float | None = Field(default=None, description="ct: mean to subtract, in the image's unit (HU)")
    std: float | None = Field(default=None, gt=0, description="ct: deviation to divide by (HU)")

    @property
    def complete(self) -> bool:
        """Whether the scheme has all its numbers."""
        return self.scheme != "ct" or None not in (self.lower, self.upper, self.mean, self.std)


def requested(dataset: Dataset, given: Any) -> tuple[list[Any], str | None]:
    """Normalization per channel before the cohort's numbers are known, and the reason if not the user's.

    Args:
        dataset: Its channels' names decide.
        given: The plan section's ``normalization``; ``None``: chosen by the names.

    Raises:
        ConfigError: if ``given`` is no list of one entry, or one per channel.
    """
    channels = dataset.channels
    if given is None:
        ct = ["ct" in name.lower().replace("_", " ").replace("-", " ").split() for name in channels]
        reason = "; ".join(
            f"channel {name!r} is CT: clipped and scaled by the foreground of the labeled cases"
            if is_ct
            else f"channel {name!r} is not named CT: z-score per image"
            for name, is_ct in zip(channels, ct, strict=True)
        )
        return [{"scheme": "ct" if is_ct else "zscore"} for is_ct in ct], reason
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ConfigError(
            f"setting 'plan.normalization' is {given!r}: give a list with one entry per channel, "
            "for instance [{scheme: zscore}]."
        )
    entries = [entry.model_dump() if isinstance(entry, ChannelNormalization) else entry for entry in given]
    if len(entries) == 1:
        entries = entries * len(channels)
    if len(entries) != len(channels):
        raise ConfigError(
            f"setting 'plan.normalization' has {len(entries)} entries, but {dataset.root} has "
            f"{len(channels)} channels ({', '.join(channels)}); give one entry, or one per channel."
        )
    return entries, None


def lacks_numbers(entry: Any) -> bool:
    """Whether an entry needs the cohort's foreground."""
    numbers = ("lower", "upper", "mean", "std")
    return isinstance(entry, Mapping) and entry.get("scheme") == "ct" and any(entry.get(n) is None for n in numbers)


def complete(entry: Any, found: Intensity) -> dict[str, Any]:
    """The entry with the cohort's numbers where it has none of its own."""
    measured = {"lower": found.lower, "upper": found.upper, "mean": found.mean, "std": found.std}
    return measured | {key: value for key, value in entry.items() if value is not None}
