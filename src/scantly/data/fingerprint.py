"""Summary numbers of the training cases, from which the plan is made.

Of all cases the headers are read; voxels only of labeled cases and only where a channel is normalized by the
foreground (CT), in several processes. Memory does not grow with the cohort.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from scantly import imaging
from scantly.data.dataset import Dataset
from scantly.data.faults import as_one, faults_of_cases
from scantly.data.parallel import in_order, worker_count
from scantly.data.splits import Split
from scantly.errors import DatasetError, ImageError
from scantly.imaging.decoding import within_memory

__all__ = ["Fingerprint", "Intensity", "collect"]

log = logging.getLogger("scantly")

#: Foreground voxels kept for the percentiles, all cases together (4 MB per channel).
_SAMPLES = 1_000_000


@dataclass(frozen=True)
class Intensity:
    """Foreground intensities of one channel over the labeled cases, in the image's own unit.

    Attributes:
        lower: 0.5th percentile.
        upper: 99.5th percentile.
        mean: Mean of the intensities clipped to ``[lower, upper]``.
        std: Standard deviation of the clipped intensities.
        voxels: Number of voxels the four numbers come from.
    """

    lower: float
    upper: float
    mean: float
    std: float
    voxels: int


@dataclass(frozen=True)
class Fingerprint:
    """What the training cases look like. Triples are (z, y, x), spacings in mm.

    Attributes:
        cases: Number of training cases, labeled and unlabeled.
        labeled: Number of labeled ones among them.
        flat: Every image is a single 2D image.
        orientation: Axes in which the numbers are given: ``LPS``, or ``stored`` for the files' own order.
        spacing_known: Every file states its spacing.
        median_spacing: Median over cases; ones where the spacing is not known.
        anisotropy: Largest over smallest side of the median voxel.
        min_shape: Smallest extent per axis, in voxels.
        median_shape: Median extent per axis, in voxels.
        max_shape: Largest extent per axis, in voxels.
        median_size: Median extent per axis after resampling to ``median_spacing``, in voxels.
        intensities: Foreground intensities of the channels that asked for them.
    """

    cases: int
    labeled: int
    flat: bool
    orientation: Literal["LPS", "stored"]
    spacing_known: bool
    median_spacing: tuple[float, float, float]
    anisotropy: float
    min_shape: tuple[int, int, int]
    median_shape: tuple[int, int, int]
    max_shape: tuple[int, int, int]
    median_size: tuple[int, int, int]
    intensities: Mapping[int, Intensity] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the plan file."""
        values: dict[str, Any] = {
            "cases": self.cases,
            "labeled": self.labeled,
            "orientation": self.orientation,
            "spacing_known": self.spacing_known,
            "median_spacing": list(self.median_spacing),
            "anisotropy": round(self.anisotropy, 4),
            "min_shape": list(self.min_shape),
            "median_shape": list(self.median_shape),
            "max_shape": list(self.max_shape),
        }
        if self.intensities:
            values["foreground"] = {str(channel): vars(found) for channel, found in self.intensities.items()}
        return values


def collect(dataset: Dataset, split: Split, *, foreground_channels: Collection[int] = ()) -> Fingerprint:
    """Look at the training cases of a split (labeled and unlabeled; never validation or test).

    Args:
        dataset: The dataset folder.
        split: Which of its cases train, and which of those are labeled.
        foreground_channels: Channels whose foreground intensities are wanted; their labeled cases are read
            whole, all others by header only.

    Raises:
        DatasetError: if the split has no training case, no labeled voxel where intensities are wanted, or a
            label that does not fit its image.
        ImageError: if a file cannot be read. Then all cases of the split but the test cases are read whole, with
            the labels that a training uses, and every fault is told, a line each.
    """
    names = [*split.labeled, *split.unlabeled]
    if not names:
        raise DatasetError(f"{dataset.root} has no training case in this split; a plan needs at least one.")
    with _all_faults(dataset, split):
        geometries = [imaging.read_geometry(dataset.case(name).images[0]) for name in names]
    flat = all(geometry.spatial_dims == 2 for geometry in geometries)
    orientation = _orientation(geometries)
    axes = [(0, 1, 2) if orientation == "stored" else _canonical_axes(g) for g in geometries]
    shapes = np.array([[g.shape[i] for i in order] for g, order in zip(geometries, axes, strict=True)])
    spacings = np.array([[g.spacing[i] for i in order] for g, order in zip(geometries, axes, strict=True)])
    known = all(geometry.has_spacing for geometry in geometries)
    spacing = np.median(spacings, axis=0) if known else np.ones(3)
    resampled = shapes * spacings / spacing if known else shapes
    sides = spacing[1:] if flat else spacing
    return Fingerprint(
        cases=len(names),
        labeled=len(split.labeled),
        flat=flat,
        orientation=orientation,
        spacing_known=known,
        median_spacing=_triple(np.round(spacing, 6), float),
        anisotropy=float(sides.max() / sides.min()),
        min_shape=_triple(shapes.min(axis=0), int),
        median_shape=_triple(np.median(shapes, axis=0).round(), int),
        max_shape=_triple(shapes.max(axis=0), int),
        median_size=_triple(np.median(resampled, axis=0).round(), int),
        intensities={c: _foreground(dataset, split, c) for c in sorted(foreground_channels)},
    )


@contextmanager
def _all_faults(dataset: Dataset, split: Split) -> Iterator[None]:
    """Turn the first fault of a case into all that a training would meet, one after the other."""
    try:
        yield
    except (DatasetError, ImageError) as error:
        names = [*split.labeled, *split.unlabeled, *split.val]
        log.info("A case cannot be used; reading all %d cases to tell everything that is wrong.", len(names))
        faults = faults_of_cases(dataset, names, with_labels={*split.labeled, *split.val})
        raise (as_one(faults, len(names)) if faults else error) from error


def _triple(values: NDArray[Any], kind: type) -> tuple[Any, Any, Any]:
    z, y, x = (kind(value) for value in values)
    return z, y, x


def _canonical_axes(geometry: imaging.Geometry) -> tuple[int, ...]:
    """Array axes of the stored image in the order of the canonical one."""
    if geometry.spatial_dims == 2:
        return 0, 1, 2
    # column i of the affine is file axis i (x, y, z), that is array axis 2 - i
    target = orientations.io_orientation(geometry.affine)[:, 0].astype(int)
    return tuple(2 - int(np.flatnonzero(target == 2 - axis)[0]) for axis in range(3))


def _orientation(geometries: Sequence[imaging.Geometry]) -> Literal["LPS", "stored"]:
    """``stored`` where that, and not LPS, makes the thick axis the slice axis in most scans.

    2D training takes slices along the first axis; a sagittally or coronally acquired scan has its sharp
    planes along its own slice axis.
    """
    stored_better = 0
    for geometry in geometries:
        spacing = np.asarray(geometry.spacing)
        canonical = spacing[list(_canonical_axes(geometry))]
        thick = spacing.max() > 3 * spacing.min()
        if geometry.spatial_dims == 3 and thick and canonical.argmax() != 0 and spacing.argmax() == 0:
            stored_better += 1
    return "stored" if stored_better > len(geometries) / 2 else "LPS"


def _foreground(dataset: Dataset, split: Split, channel: int) -> Intensity:
    """Percentiles, mean and deviation over a bounded, evenly spread sample of foreground voxels."""
    quota = max(1, _SAMPLES // max(1, len(split.labeled)))
    jobs = [_Sample(dataset, name, channel, number, quota) for number, name in enumerate(split.labeled)]
    workers = worker_count(None, len(jobs), max((job.memory() for job in jobs), default=0))
    with _all_faults(dataset, split), closing(in_order(_Sample.draw, jobs, workers)) as drawn:
        samples = list(drawn)
    pooled = np.concatenate(samples).astype(np.float64) if samples else np.zeros(0)
    if pooled.size == 0:
        raise DatasetError(
            f"channel {channel} is normalized by the foreground (CT), but no labeled case has a foreground "
            "voxel; label at least one structure or set another scheme under 'plan.normalization'."
        )
    lower, upper = np.percentile(pooled, [0.5, 99.5])
    pooled = pooled.clip(lower, upper)
    lower, upper, mean, std = (round(float(n), 6) for n in (lower, upper, pooled.mean(), pooled.std()))
    return Intensity(lower=lower, upper=upper, mean=mean, std=std, voxels=int(pooled.size))


@dataclass(frozen=True)
class _Sample:
    """Foreground voxels of one case; plain data, so it can be sent to another process."""

    dataset: Dataset
    name: str
    channel: int
    number: int
    quota: int

    def memory(self) -> int:
        """Bytes that drawing takes, about: all channels, the label, the voxels of the foreground."""
        voxels = math.prod(imaging.read_geometry(self.dataset.case(self.name).images[0]).shape)
        return voxels * (8 * len(self.dataset.channels) + 8)

    def draw(self) -> NDArray[np.float32]:
        """At most ``quota`` intensities, by a generator of the case's own."""
        with within_memory(self.dataset.case(self.name).images[0]):
            mask = self.dataset.read_label(self.name).array > 0
            values: NDArray[np.float32] = self.dataset.read_image(self.name).array[self.channel][mask]
        if values.size > self.quota:
            values = np.random.default_rng([self.number, self.channel]).choice(values, self.quota, replace=False)
        return values
