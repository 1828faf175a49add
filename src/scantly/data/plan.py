"""The plan: how cases are prepared and sampled, each choice with its reason, in a file that can be edited."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from scantly.data.dataset import Dataset
from scantly.data.fingerprint import Fingerprint, collect
from scantly.data.splits import Split
from scantly.errors import ConfigError
from scantly.files import read_yaml, write_yaml
from scantly.settings import Settings, merge, parse

__all__ = ["ChannelNormalization", "Plan", "make_plan"]

SET_BY_USER = "set by the recipe or the user"

#: Sides of a patch are multiples of this: the networks halve the resolution four times.
_STEP = 16
#: Training memory per voxel of a patch row. The activations that a U-Net of widths 16-256 keeps for the
#: backward pass are about 500 (2D) and 330 (3D) float32 per voxel.
_BYTES_PER_VOXEL = {2: 2000, 3: 1320}
#: Share of the budget for these activations; the rest is weights, workspaces and a method's further networks.
_ACTIVATION_SHARE = 0.5
#: The published batches have 12 + 12 slices (ACDC); larger ones cost time and gain little.
_LARGEST_BATCH = {2: 12, 3: 4}
#: More anisotropic voxels than this are not isotropic enough for 3D kernels (nnU-Net's threshold too).
_ANISOTROPIC = 3.0
_FEW_SLICES = 32


class ChannelNormalization(Settings):
    """Intensity normalization of one channel, over the whole image before any crop."""

    scheme: Literal["zscore", "minmax", "ct", "none"] = Field(
        description="zscore: zero mean, unit deviation per image; minmax: [0, 1] per image; ct: clip to "
        "[lower, upper], then subtract mean and divide by std (numbers of the cohort); none: as stored"
    )
    lower: float | None = Field(default=None, description="ct: lower clip, in the image's unit (HU)")
    upper: float | None = Field(default=None, description="ct: upper clip, in the image's unit (HU)")
    mean: float | None = Field(default=None, description="ct: mean to subtract, in the image's unit (HU)")
    std: float | None = Field(default=None, gt=0, description="ct: deviation to divide by (HU)")

    @property
    def complete(self) -> bool:
        """Whether the scheme has all its numbers."""
        return self.scheme != "ct" or None not in (self.lower, self.upper, self.mean, self.std)


class Plan(Settings):
    """How cases are prepared (orientation to normalization) and sampled (patch, batch).

    Triples are (z, y, x). Order of preparation: canonical orientation, normalization over the whole image,
    label-free center crop, resampling to ``spacing`` or resizing to ``size``.
    """

    spatial_dims: Literal[2, 3] = Field(description="2: slices are the items; 3: volumes")
    orientation: Literal["LPS", "stored"] = Field(
        default="LPS", description="LPS: axes permuted and flipped to the nearest LPS; stored: as in the file"
    )
    crop_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of each in-plane extent kept by the center crop, which never looks at a label; "
        "null: no crop",
    )
    spacing: tuple[float, float, float] | None = Field(
        default=None,
        description="target voxel size (z, y, x) in mm; 2D plans use y and x only; null: as stored",
    )
    size: tuple[int, ...] | None = Field(
        default=None,
        description="every slice (H, W) or volume (D, H, W) is resized to this, in voxels; excludes spacing",
    )
    interpolation: Literal["nearest", "linear", "cubic"] = Field(
        default="linear", description="interpolation of images; labels are always nearest"
    )
    normalization: tuple[ChannelNormalization, ...] = Field(
        min_length=1, description="one entry per channel, in the dataset's order"
    )
    patch_size: tuple[int, ...] = Field(description="training patch (H, W) or (D, H, W), in voxels")
    labeled_batch_size: int = Field(ge=1, description="labeled rows per step")
    unlabeled_batch_size: int = Field(ge=0, description="unlabeled rows per step")
    foreground_fraction: float = Field(
        default=0.33, ge=0, le=1, description="share of the labeled rows drawn around a foreground voxel"
    )
    reasons: dict[str, str] = Field(default_factory=dict, description="why each field has its value")
    fingerprint: dict[str, Any] = Field(default_factory=dict, description="numbers of the training cases")

    @field_validator("spacing")
    @classmethod
    def _positive(cls, spacing: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if spacing is not None and min(spacing) <= 0:
            raise ValueError("voxel sizes are lengths in mm; give positive numbers (z, y, x)")
        return spacing

    @field_validator("normalization")
    @classmethod
    def _ct_is_complete(cls, entries: tuple[ChannelNormalization, ...]) -> tuple[ChannelNormalization, ...]:
        for channel, entry in enumerate(entries):
            if not entry.complete:
                raise ValueError(f"channel {channel} is ct; give it lower, upper, mean and std")
        return entries

    @field_validator("size")
    @classmethod
    def _size_fits(cls, size: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if size is None:
            return None
        _check_sides(size, info.data.get("spatial_dims"))
        if info.data.get("spacing") is not None:
            raise ValueError("size and spacing both fix the grid; give one of them and set the other to null")
        return size

    @field_validator("patch_size")
    @classmethod
    def _patch_fits(cls, patch: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        _check_sides(patch, info.data.get("spatial_dims"))
        for side in patch:
            if side >= _STEP and side % _STEP:
                below, above = side // _STEP * _STEP, (side // _STEP + 1) * _STEP
                raise ValueError(
                    f"side {side} is not divisible by {_STEP}, and the networks halve the patch four times; "
                    f"use {below} or {above}"
                )
        return patch

    def preparation(self) -> dict[str, Any]:
        """The fields that shape prepared arrays; a store made with equal ones can be used again."""
        fields = {"spatial_dims", "orientation", "crop_fraction", "spacing", "size", "interpolation"}
        return self.model_dump(mode="json", include=fields | {"normalization"})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the order of a plan file."""
        return self.model_dump(mode="json")

    def write(self, path: Path) -> None:
        """Write the plan as YAML that can be edited and read back."""
        write_yaml(path, self.to_dict())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan file.

        Raises:
            ConfigError: naming the file and every field that is unknown, missing or does not fit.
        """
        return parse(cls, read_yaml(path), where=str(path))


def _check_sides(sides: tuple[int, ...], spatial_dims: int | None) -> None:
    if spatial_dims is not None and len(sides) != spatial_dims:
        names = {2: "2D plan needs two sides (H, W)", 3: "3D plan needs three sides (D, H, W)"}
        raise ValueError(f"a {names[spatial_dims]}, not {len(sides)}")
    if min(sides, default=0) < 1:
        raise ValueError("sides are numbers of voxels; give positive ones")


def make_plan(
    dataset: Dataset,
    split: Split,
    *,
    dims: Literal[2, 3] | None = None,
    overrides: Mapping[str, Any] | None = None,
    memory_gb: float = 8.0,
) -> Plan:
    """Plan preparation and sampling from the training cases.

    2D is chosen when the images are 2D, when voxels are anisotropic (largest over smallest side above 3) with
    fewer than 32 slices, or when there are fewer than 16 slices (a 3D network halves them four times);
    otherwise 3D. The target spacing is the median. Channels with "CT" in their name are clipped to the
    foreground's 0.5th and 99.5th percentile and scaled by its mean and deviation; all others are z-scored per
    image.

    Args:
        dataset: The dataset folder.
        split: Training cases; validation and test cases are not looked at.
        dims: 2 or 3 as the user wants; ``None``: chosen from the data.
        overrides: The ``plan`` section of recipe and user; its values win over what the data suggest.
        memory_gb: Memory of the training device that patch and batch may fill, in 10^9 bytes.

    Raises:
        ConfigError: if overrides do not fit, ``dims`` contradicts them, or the plan would not be valid.
        DatasetError: if there is no training case, or no foreground for a CT channel.
        ImageError: if a file cannot be read.
    """
    given = merge(overrides or {})
    _check_dims(given, dims)
    given["normalization"], normalization_reason = _requested_normalization(dataset, given.get("normalization"))
    wants_foreground = [channel for channel, entry in enumerate(given["normalization"]) if _lacks_numbers(entry)]
    found = collect(dataset, split, foreground_channels=wants_foreground)
    choices = _Choices(found, given, dims)
    choices.choose_grid()
    choices.choose_normalization(normalization_reason)
    choices.choose_patch(memory_gb)
    return choices.plan()


def _check_dims(given: Mapping[str, Any], dims: int | None) -> None:
    asked = given.get("spatial_dims")
    if dims is not None and asked is not None and asked != dims:
        raise ConfigError(
            f"the plan section asks for spatial_dims {asked} and the option for {dims} dimensions; remove one of them."
        )


def _requested_normalization(dataset: Dataset, given: Any) -> tuple[list[Any], str | None]:
    """Normalization per channel before the cohort's numbers are known, and the reason if not the user's."""
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


def _lacks_numbers(entry: Any) -> bool:
    numbers = ("lower", "upper", "mean", "std")
    return isinstance(entry, Mapping) and entry.get("scheme") == "ct" and any(entry.get(n) is None for n in numbers)


class _Choices:
    """Values and reasons as they are chosen; a value that was given is taken as it is."""

    def __init__(self, found: Fingerprint, given: Mapping[str, Any], dims: int | None) -> None:
        self.found = found
        self.given = given
        self.dims = dims
        self.values: dict[str, Any] = {}
        self.reasons: dict[str, str] = {}

    def put(self, name: str, value: Any, reason: str) -> None:
        if name in self.given:
            self.values[name], self.reasons[name] = self.given[name], SET_BY_USER
        else:
            self.values[name], self.reasons[name] = value, reason

    def choose_grid(self) -> None:
        found = self.found
        if found.flat and 3 in (self.dims, self.given.get("spatial_dims")):
            raise ConfigError("every image is a single 2D image, so a 3D plan is impossible; use 2 dimensions.")
        if self.dims is not None:
            self.put("spatial_dims", self.dims, SET_BY_USER)
        else:
            self.put("spatial_dims", *_dimensions(found))
        self.put("orientation", found.orientation, _orientation_reason(found))
        self.put("crop_fraction", None, "whole images are kept")
        self.put("spacing", *_spacing(found, self.given.get("size")))
        self.put("size", None, "images keep the size that their spacing gives them")
        self.put("interpolation", "linear", "linear is exact enough for images and never overshoots")

    def choose_normalization(self, reason: str | None) -> None:
        entries = []
        for channel, entry in enumerate(self.given["normalization"]):
            if _lacks_numbers(entry):
                number = self.found.intensities[channel]
                measured = {
                    "lower": number.lower,
                    "upper": number.upper,
                    "mean": number.mean,
                    "std": number.std,
                }
                entries.append(measured | {k: v for k, v in entry.items() if v is not None})
            else:
                entries.append(entry)
        self.values["normalization"] = entries
        self.reasons["normalization"] = SET_BY_USER if reason is None else reason

    def choose_patch(self, memory_gb: float) -> None:
        grid = self._grid()
        dims = grid.spatial_dims
        voxels = memory_gb * 1e9 * _ACTIVATION_SHARE / _BYTES_PER_VOXEL[dims]
        if grid.size is not None:
            self.put("patch_size", grid.size, "equal to size: whole prepared images are trained on")
        else:
            shape = _prepared_shape(self.found, grid)
            reason = (
                f"the median prepared image is {_times(shape)}; its sides to multiples of {_STEP}, the "
                f"largest shortened until 2 + 2 rows fit half of {memory_gb:g} GB"
            )
            self.put("patch_size", _patch(shape, voxels / 4), reason)
        patch = self._grid().patch_size
        largest = _LARGEST_BATCH[dims]
        rows = max(2, min(largest, int(voxels / (2 * math.prod(patch)))))
        need = 2 * rows * math.prod(patch) * _BYTES_PER_VOXEL[dims] / 1e9
        reason = (
            f"{rows} labeled and {rows} unlabeled rows of {_times(patch)} need about {need:.1f} of "
            f"{memory_gb:g} GB (half of it, and {largest} + {largest} rows, are the most)"
        )
        self.put("labeled_batch_size", rows, reason)
        self.put("unlabeled_batch_size", rows, reason)
        self.put("foreground_fraction", 0.33, "a third of the labeled rows meets each structure often enough")

    def _grid(self) -> Plan:
        """The plan so far, validated, with stand-ins for what is still open."""
        dims = self.values["spatial_dims"]
        sides = self.values.get("size") or [_STEP] * (3 if dims == 3 else 2)
        open_ones = {"patch_size": sides, "labeled_batch_size": 1, "unlabeled_batch_size": 1}
        return parse(Plan, {**open_ones, **self.given, **self.values}, where="plan")

    def plan(self) -> Plan:
        reasons = self.given.get("reasons", {})
        self.values["reasons"] = {**self.reasons, **reasons} if isinstance(reasons, Mapping) else reasons
        self.values["fingerprint"] = self.found.to_dict()
        return parse(Plan, self.values, where="plan")


def _dimensions(found: Fingerprint) -> tuple[int, str]:
    slices = found.median_shape[0]
    if found.flat:
        return 2, "every image is a single 2D image"
    if found.anisotropy > _ANISOTROPIC and slices < _FEW_SLICES:
        return 2, (
            f"voxels are {found.anisotropy:.1f} times longer than wide (above {_ANISOTROPIC:g}) and there "
            f"are {slices} slices in the median (fewer than {_FEW_SLICES})"
        )
    if slices < _STEP:
        return 2, f"there are {slices} slices in the median, fewer than the {_STEP} that a 3D network needs"
    return 3, (
        f"volumes with {slices} slices in the median and voxels {found.anisotropy:.1f} times longer than "
        f"wide (2D: above {_ANISOTROPIC:g} and fewer than {_FEW_SLICES} slices, or fewer than {_STEP})"
    )


def _orientation_reason(found: Fingerprint) -> str:
    if found.orientation == "stored":
        return "the thick slices lie along the files' own first axis, not along the body axis"
    return "all cases in the same axes, whatever their files' order"


def _spacing(found: Fingerprint, size: Any) -> tuple[tuple[float, ...] | None, str]:
    if size is not None:
        return None, "size fixes the grid"
    if not found.spacing_known:
        return None, "not every file states its spacing, so images stay as stored"
    spacing = found.median_spacing
    return spacing, f"the median over {found.cases} training cases (z, y, x, mm; 2D plans keep the slices)"


def _prepared_shape(found: Fingerprint, plan: Plan) -> tuple[int, ...]:
    """Median shape after crop and resampling."""
    shape = [float(side) for side in found.median_shape]
    if plan.spacing is not None:
        extents = (n * mm for n, mm in zip(found.median_size, found.median_spacing, strict=True))
        shape = [extent / target for extent, target in zip(extents, plan.spacing, strict=True)]
    if plan.crop_fraction is not None:
        shape[1:] = [side * plan.crop_fraction for side in shape[1:]]
    return tuple(max(1, round(side)) for side in shape[3 - plan.spatial_dims :])


def _patch(shape: Sequence[int], voxels: float) -> tuple[int, ...]:
    patch = [max(_STEP, (side + _STEP // 2) // _STEP * _STEP) for side in shape]
    while math.prod(patch) > voxels and max(patch) > _STEP:
        axis = max(range(len(patch)), key=lambda i: patch[i])
        patch[axis] -= _STEP
    return tuple(patch)


def _times(sides: Any) -> str:
    return " x ".join(str(side) for side in sides)
