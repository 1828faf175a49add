"""How a whole scan is predicted: the settings that a run keeps and a prediction may override."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from scantly.errors import ConfigError, times
from scantly.settings import Settings, merge, parse

__all__ = ["DEFAULT_INFERENCE", "InferenceSettings", "setting_word"]


class InferenceSettings(Settings):
    """Windows, test-time flips and post-processing.

    The literature's procedure on LA (Yu et al., MICCAI 2019) is ``window: uniform`` with ``stride: [4, 18, 18]``.
    """

    window: Literal["gaussian", "uniform", "whole"] = Field(
        "gaussian",
        description="gaussian: overlapping windows, weighted by a Gaussian around their centers; uniform: all weights "
        "equal, as the literature does; whole: one pass over the whole padded slice or volume, fastest, much memory",
    )
    overlap: float = Field(0.5, ge=0, lt=1, description="share of a window's side that its neighbor overlaps")
    stride: tuple[int, ...] | None = Field(
        None, description="distance of neighboring windows (z, y, x) or (y, x) in voxels; null: from overlap"
    )
    patch_size: tuple[int, ...] | None = Field(
        None, description="side lengths of a window (z, y, x) or (y, x) in voxels; null: the training patch"
    )
    flips: bool = Field(
        False, description="average over all flips of the image: 4 (2D) or 8 (3D) times the time, a little more Dice"
    )
    largest_component: bool = Field(
        False, description="keep the largest component of each foreground class (full connectivity), as SASSNet, DTC"
    )
    resample: Literal["probabilities", "logits"] = Field(
        "probabilities",
        description="what is interpolated to the scan's own grid before the most probable class is taken; logits: as "
        "UniMatch's public code; without effect where the plan's interpolation is nearest",
    )
    batch: int | None = Field(
        None, ge=1, description="windows per forward pass; null: by device; it changes speed and memory only"
    )

    @field_validator("stride", "patch_size")
    @classmethod
    def _positive(cls, sides: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sides is not None and (len(sides) not in {2, 3} or min(sides) < 1):
            raise ValueError("give two (y, x) or three (z, y, x) positive numbers of voxels")
        return sides

    @model_validator(mode="after")
    def _whole_has_no_windows(self) -> InferenceSettings:
        if self.window == "whole" and (self.stride is not None or self.patch_size is not None):
            raise ValueError("window 'whole' is one pass without windows; leave out stride and patch_size")
        return self

    def window_sides(self, patch_size: Sequence[int]) -> tuple[int, ...]:
        """Side lengths of a window, for a model trained on patches of ``patch_size``."""
        return self.patch_size or tuple(patch_size)

    def check(self, patch_size: Sequence[int]) -> None:
        """Refuse sizes of another dimension, and strides that leave gaps between windows.

        Args:
            patch_size: The training patch, (z, y, x) or (y, x).

        Raises:
            ConfigError: naming the setting.
        """
        for name, sides in (("patch_size", self.patch_size), ("stride", self.stride)):
            if sides is not None and len(sides) != len(patch_size):
                raise ConfigError(
                    f"evaluation.inference.{name} is {times(sides)}, but the model is {len(patch_size)}D; give "
                    f"{len(patch_size)} numbers."
                )
        window = self.window_sides(patch_size)
        if self.stride is not None and any(step > side for step, side in zip(self.stride, window, strict=True)):
            raise ConfigError(
                f"evaluation.inference.stride {times(self.stride)} is larger than the window {times(window)} and would "
                "leave gaps (both are z, y, x); lower it."
            )

    def overridden(self, values: Mapping[str, Any]) -> InferenceSettings:
        """Settings in which the given ones replace these.

        A new ``window`` also resets overlap, stride and window size to their defaults, a new ``overlap`` the
        stride: what a model's protocol says of its own windows has no meaning for other ones.

        Args:
            values: Names and values of settings.

        Raises:
            ConfigError: for an unknown name, a bad value, or overlap and stride together.
        """
        if "overlap" in values and values.get("stride") is not None:
            raise ConfigError("overlap and stride both say how far apart windows are; give one of them.")
        kept = self.model_dump()
        if "window" in values:
            dropped: tuple[str, ...] = ("overlap", "stride", "patch_size")
        else:
            dropped = ("stride",) if "overlap" in values else ()
        kept = {name: value for name, value in kept.items() if name not in dropped}
        return parse(InferenceSettings, merge(kept, values), where="inference")

    def difference(self, usual: InferenceSettings) -> str:
        """What differs from ``usual`` in words that can be part of a file name; empty if nothing that matters does.

        Example:
            >>> InferenceSettings(window="whole", flips=True).difference(InferenceSettings())
            'window-whole_flips-true'
        """
        mine, its = self.to_dict(), usual.to_dict()
        return "_".join(f"{name}-{setting_word(value)}" for name, value in mine.items() if value != its[name])

    def to_dict(self) -> dict[str, Any]:
        """Plain data of all that shapes the result, thus without ``batch``."""
        return self.model_dump(mode="json", exclude={"batch"})


def setting_word(value: Any) -> str:
    """A setting's value as part of a file name."""
    if isinstance(value, list):
        return "x".join(map(str, value))
    return re.sub(r"[^\w.+-]", "-", str(value).lower())


DEFAULT_INFERENCE = InferenceSettings()
