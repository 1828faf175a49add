"""The plan: how cases are prepared and sampled, each choice with its reason, in a file that can be edited."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from scantly import imaging
from scantly.data import grids, normalization
from scantly.data.dataset import Dataset
from scantly.data.fingerprint import Fingerprint, collect
from scantly.data.normalization import ChannelNormalization
from scantly.data.splits import Split
from scantly.data.topology import (
    STEP,
    anisotropy,
    default_network,
    fit_patch,
    plan_topology,
    side_factors,
    side_steps,
    training_bytes,
)
from scantly.errors import ConfigError, DatasetError, times
from scantly.files import read_yaml, write_yaml
from scantly.settings import Settings, merge, parse

__all__ = ["ChannelNormalization", "Plan", "make_plan"]

SET_BY_USER = "set by the recipe or the user"

#: Share of the budget for these activations; the rest is weights, workspaces and a method's further networks.
_ACTIVATION_SHARE = 0.5
#: The published batches: 12 + 12 slices (ACDC), 2 + 2 volumes (LA, BraTS); larger ones cost time and gain little.
_LARGEST_BATCH = {2: 12, 3: 2}


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
    kernel_sizes: tuple[tuple[int, ...], ...] | None = Field(
        default=None,
        description="side of the kernels per level, finest first, (z, y, x) or (y, x); flat kernels (1) in 3D make "
        "network.name auto a dynunet, which has them",
    )
    strides: tuple[tuple[int, ...], ...] | None = Field(
        default=None, description="stride per level, finest first, (z, y, x) or (y, x); taken by network dynunet"
    )
    patch_size: tuple[int, ...] = Field(description="training patch (H, W) or (D, H, W), in voxels")
    labeled_batch_size: int = Field(ge=1, description="labeled rows per step")
    unlabeled_batch_size: int = Field(ge=0, description="unlabeled rows per step")
    foreground_fraction: float = Field(
        default=0.33, ge=0, le=1, description="share of the labeled rows drawn around a foreground voxel"
    )
    pad_margin: int = Field(
        default=0,
        ge=0,
        description="voxels added at both ends of every axis, beside what is missing, once any side of a case is "
        "not larger than the patch; 0: only what is missing; the literature's LA code has 3",
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

    @field_validator("kernel_sizes", "strides")
    @classmethod
    def _one_number_per_axis(
        cls, levels: tuple[tuple[int, ...], ...] | None, info: ValidationInfo
    ) -> tuple[tuple[int, ...], ...] | None:
        dims = info.data.get("spatial_dims")
        for level in levels or ():
            if (dims is not None and len(level) != dims) or min(level, default=0) < 1:
                raise ValueError(f"level {list(level)} is not one positive number per axis; give {dims} numbers")
        return levels

    @field_validator("patch_size")
    @classmethod
    def _patch_fits(cls, patch: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        dims, kernels, strides = (info.data.get(name) for name in ("spatial_dims", "kernel_sizes", "strides"))
        _check_sides(patch, dims)
        if dims is not None and strides and default_network(dims, kernels) == "dynunet":
            for axis, side, factor in zip("zyx", patch, side_factors(strides), strict=True):
                _check_divisible(side, factor, f"plan.strides halve {axis} {factor.bit_length() - 1} times")
        else:
            for side in patch:
                if side >= STEP:
                    _check_divisible(side, STEP, "the networks halve the patch four times")
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


def _check_divisible(side: int, factor: int, why: str) -> None:
    if side % factor:
        below = side // factor * factor
        choice = f"{below} or {below + factor}" if below else f"{factor}"
        raise ValueError(f"side {side} is not divisible by {factor}, and {why}; use {choice}")


def make_plan(
    dataset: Dataset,
    split: Split,
    *,
    dims: Literal[2, 3] | None = None,
    overrides: Mapping[str, Any] | None = None,
    network: str = "auto",
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
        network: The network that the patch must fit; ``auto``: the U-Net in 2D, in 3D the V-Net, or where voxels
            are 2 times or more as long as wide the nnU-Net-like one, which has flat kernels.
        memory_gb: Memory of the training device that patch and batch may fill, in 10^9 bytes.

    Raises:
        ConfigError: if overrides do not fit, ``dims`` contradicts them, or the plan would not be valid.
        DatasetError: if there is no training case, no foreground for a CT channel, or a single slice among
            volumes.
        ImageError: if a file cannot be read.
    """
    given = merge(overrides or {})
    for name in ("kernel_sizes", "strides"):
        if given.get(name, ()) is None:
            del given[name]
    _check_dims(given, dims)
    given["normalization"], normalization_reason = normalization.requested(dataset, given.get("normalization"))
    wants_foreground = [
        channel for channel, entry in enumerate(given["normalization"]) if normalization.lacks_numbers(entry)
    ]
    found = collect(dataset, split, foreground_channels=wants_foreground)
    choices = _Choices(found, given, dims, network)
    choices.choose_grid()
    if choices.values["spatial_dims"] == 3 and 1 in found.min_shape:
        _refuse_single_slices(dataset, [*split.labeled, *split.unlabeled])
    choices.choose_normalization(normalization_reason)
    choices.choose_patch(memory_gb)
    choices.choose_topology()
    choices.choose_batch(memory_gb)
    return choices.plan()


def _check_dims(given: Mapping[str, Any], dims: int | None) -> None:
    asked = given.get("spatial_dims")
    if dims is not None and asked is not None and asked != dims:
        raise ConfigError(
            f"the plan section asks for spatial_dims {asked} and the option for {dims} dimensions; remove one of them."
        )


class _Choices:
    """Values and reasons as they are chosen; a value that was given is taken as it is."""

    def __init__(self, found: Fingerprint, given: Mapping[str, Any], dims: int | None, network: str) -> None:
        self.found = found
        self.given = given
        self.dims = dims
        self.network = network
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
            self.put("spatial_dims", *grids.dimensions(found))
        self.put("orientation", found.orientation, grids.orientation_reason(found))
        self.put("crop_fraction", None, "whole images are kept")
        self.put("spacing", *grids.target_spacing(found, self.given.get("size")))
        self.put("size", None, "images keep the size that their spacing gives them")
        self.put("interpolation", "linear", "linear is exact enough for images and never overshoots")

    def choose_normalization(self, reason: str | None) -> None:
        entries = []
        for channel, entry in enumerate(self.given["normalization"]):
            needs = normalization.lacks_numbers(entry)
            entries.append(normalization.complete(entry, self.found.intensities[channel]) if needs else entry)
        self.values["normalization"] = entries
        self.reasons["normalization"] = SET_BY_USER if reason is None else reason

    def choose_patch(self, memory_gb: float) -> None:
        grid = self._grid()
        if grid.size is not None:
            self.put("patch_size", grid.size, "equal to size: whole prepared images are trained on")
            return
        lengths = self._lengths()
        follows = self._planned_network() == "dynunet"  # its depth per axis is planned, that of others is not
        steps = side_steps(lengths) if follows and grid.spatial_dims == 3 else (STEP,) * grid.spatial_dims
        shape = grids.prepared_shape(self.found, grid.spacing, grid.crop_fraction)[3 - grid.spatial_dims :]
        uniform = len(set(steps)) == 1
        multiples = str(STEP) if uniform else times(steps)
        reason = (
            f"the median prepared image is {times(shape)}; its sides to multiples of {multiples}, the "
            f"{'largest' if uniform else 'longest in mm'} shortened until 2 + 2 rows fit half of {memory_gb:g} GB"
        )
        weights = [1.0] * len(steps) if uniform else lengths
        self.put("patch_size", fit_patch(shape, steps, weights, self._voxels(memory_gb) / 4), reason)

    def choose_topology(self) -> None:
        lengths, patch = self._lengths(), self._grid().patch_size
        topology = plan_topology(patch, lengths)
        depth = len(topology.strides)
        deepest = [-(-side // factor) for side, factor in zip(patch, side_factors(topology.strides), strict=True)]
        flat = sum(1 in kernel for kernel in topology.kernel_sizes)
        voxel = f"voxels are {anisotropy(lengths):.1f} times longer than wide"
        if flat:
            reason = (
                f"{voxel} (2 or more): kernels are flat across the long side on {flat} of {depth} levels, until the "
                "planes are within a factor of 2"
            )
        elif self._grid().spacing is None and not self.found.spacing_known:
            reason = "the voxels' size is not known, so kernels have the same sides"
        elif self._grid().size is not None:
            reason = "every case is resized to one grid, so kernels have the same sides"
        else:
            reason = f"{voxel} (flat kernels: 2 or more), so kernels have the same sides"
        reason += f"; network.name auto is {default_network(len(patch), topology.kernel_sizes)}"
        self.put("kernel_sizes", topology.kernel_sizes, reason)
        reason = (
            f"sides are halved while they keep 4 voxels, coarse ones only once the others are as coarse: "
            f"{times(patch)} becomes {times(deepest)} at the deepest of {depth} levels"
        )
        self.put("strides", topology.strides, reason)

    def choose_batch(self, memory_gb: float) -> None:
        grid = self._grid()
        largest = _LARGEST_BATCH[grid.spatial_dims]
        rows = max(2, min(largest, int(self._voxels(memory_gb) / (2 * math.prod(grid.patch_size)))))
        need = 2 * rows * math.prod(grid.patch_size) * self._bytes() / 1e9
        reason = (
            f"{rows} labeled and {rows} unlabeled rows of {times(grid.patch_size)} need about {need:.1f} of "
            f"{memory_gb:g} GB (half of it, and {largest} + {largest} rows, are the most)"
        )
        self.put("labeled_batch_size", rows, reason)
        self.put("unlabeled_batch_size", rows, reason)
        self.put("foreground_fraction", 0.33, "a third of the labeled rows meets each structure often enough")
        self.put("pad_margin", 0, "cases that are smaller than the patch get what is missing and no more")

    def _lengths(self) -> tuple[float, ...]:
        """Size of a prepared voxel per axis; equal where it is not known."""
        grid = self._grid()
        spacing = grid.spacing
        if spacing is None and grid.size is None and self.found.spacing_known:
            spacing = self.found.median_spacing
        return (spacing or (1.0, 1.0, 1.0))[3 - grid.spatial_dims :]

    def _planned_network(self) -> str:
        """The network that will be built, before kernels are planned for its patch."""
        if self.network != "auto":
            return self.network
        lengths = self._lengths()
        kernels = self.given.get("kernel_sizes") or plan_topology([STEP] * len(lengths), lengths).kernel_sizes
        return default_network(len(lengths), kernels)

    def _bytes(self) -> float:
        return training_bytes(self._planned_network(), 2 if self.values["spatial_dims"] == 2 else 3)

    def _voxels(self, memory_gb: float) -> float:
        """Voxels, all rows together, that the budget allows."""
        return memory_gb * 1e9 * _ACTIVATION_SHARE / self._bytes()

    def _grid(self) -> Plan:
        """The plan so far, validated, with stand-ins for what is still open."""
        dims = 3 if self.values["spatial_dims"] == 3 else 2
        sides = self.values.get("size") or [STEP] * dims
        open_ones = {"patch_size": sides, "labeled_batch_size": 1, "unlabeled_batch_size": 1}
        if dims == 3 and "strides" not in self.values:  # what sides must be divisible by is not known yet
            flat = [[1] * dims]
            return parse(
                Plan, {**open_ones, **self.given, **self.values, "kernel_sizes": flat, "strides": flat}, where="plan"
            )
        return parse(Plan, {**open_ones, **self.given, **self.values}, where="plan")

    def plan(self) -> Plan:
        reasons = self.given.get("reasons", {})
        self.values["reasons"] = {**self.reasons, **reasons} if isinstance(reasons, Mapping) else reasons
        self.values["fingerprint"] = self.found.to_dict()
        return parse(Plan, self.values, where="plan")


def _refuse_single_slices(dataset: Dataset, names: Sequence[str]) -> None:
    for name in names:
        shape = imaging.read_geometry(dataset.case(name).images[0]).shape
        if 1 in shape:
            raise DatasetError(
                f"case {name} is a single slice ({times(shape)} voxels) and cannot be trained on in 3D; remove it "
                "from the training cases, or train on slices with --dims 2."
            )
