"""The grid that scans are prepared on, chosen from the fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scantly.data.fingerprint import Fingerprint
from scantly.data.topology import STEP

__all__ = ["dimensions", "orientation_reason", "prepared_shape", "target_spacing"]

#: More anisotropic voxels than this are not isotropic enough for 3D kernels (nnU-Net's threshold too).
_ANISOTROPIC = 3.0
_FEW_SLICES = 32


def dimensions(found: Fingerprint) -> tuple[int, str]:
    """2 or 3 dimensions, and why."""
    slices = found.median_shape[0]
    if found.flat:
        return 2, "every image is a single 2D image"
    if found.anisotropy > _ANISOTROPIC and slices < _FEW_SLICES:
        return 2, (
            f"voxels are {found.anisotropy:.1f} times longer than wide (above {_ANISOTROPIC:g}) and there "
            f"are {slices} slices in the median (fewer than {_FEW_SLICES})"
        )
    if slices < STEP:
        return 2, f"there are {slices} slices in the median, fewer than the {STEP} that a 3D network needs"
    return 3, (
        f"volumes with {slices} slices in the median and voxels {found.anisotropy:.1f} times longer than "
        f"wide (2D: above {_ANISOTROPIC:g} and fewer than {_FEW_SLICES} slices, or fewer than {STEP})"
    )


def orientation_reason(found: Fingerprint) -> str:
    """Why the axes are the fingerprint's."""
    if found.orientation == "stored":
        return "the thick slices lie along the files' own first axis, not along the body axis"
    return "all cases in the same axes, whatever their files' order"


def target_spacing(found: Fingerprint, size: Any) -> tuple[tuple[float, ...] | None, str]:
    """The voxel size ``(z, y, x)`` in mm that images are resampled to, and why; ``None`` where there is none.

    Args:
        found: The fingerprint.
        size: The plan section's ``size``.
    """
    if size is not None:
        return None, "size fixes the grid"
    if not found.spacing_known:
        return None, "not every file states its spacing, so images stay as stored"
    spacing = found.median_spacing
    return spacing, f"the median over {found.cases} training cases (z, y, x, mm; 2D plans keep the slices)"


def prepared_shape(
    found: Fingerprint, spacing: Sequence[float] | None, crop_fraction: float | None
) -> tuple[int, int, int]:
    """Median shape ``(z, y, x)`` after crop and resampling, in voxels.

    Args:
        found: The fingerprint.
        spacing: What images are resampled to, ``(z, y, x)`` in mm; ``None``: they stay as stored.
        crop_fraction: Share of each in-plane extent that is kept; ``None``: all.
    """
    shape = [float(side) for side in found.median_shape]
    if spacing is not None:
        extents = (n * mm for n, mm in zip(found.median_size, found.median_spacing, strict=True))
        shape = [extent / target for extent, target in zip(extents, spacing, strict=True)]
    if crop_fraction is not None:
        shape[1:] = [side * crop_fraction for side in shape[1:]]
    z, y, x = (max(1, round(side)) for side in shape)
    return z, y, x
