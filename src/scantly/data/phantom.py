"""A generated cohort: short-axis-heart-like scans with a known truth, for the demo, tests and benchmarks.

Every subject is drawn from a generator seeded by ``(seed, subject)`` alone, so a cohort is the same on every
machine with the same NumPy, whatever was generated before. Anatomy is described in millimeters and sampled on
the grid asked for: the same subject can be had as eight thick slices or as an isotropic volume.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from scantly.errors import DatasetError
from scantly.files import write_json
from scantly.imaging import Geometry, write_label, write_scalar

__all__ = ["CLASSES", "EXTENT_MM", "generate_subject", "write_phantom"]

Array: TypeAlias = NDArray[np.float32]
Floats: TypeAlias = NDArray[np.floating[Any]]

CLASSES = ("background", "RV", "MYO", "LV")
"""Class names; the index is the label value."""

EXTENT_MM = (80.0, 150.0, 150.0)
"""Size of the imaged box along (z, y, x) in mm, whatever the grid."""

_RING_MM = 3.0  # thickness of the thin walls that are not labeled (right ventricle, vessels)


@dataclass(frozen=True)
class _Heart:
    """Shape of one heart; lengths in mm, angles in radians, positions on the axis as shares of the stack."""

    center: tuple[float, float]  # (x, y) of the left ventricle at mid height
    drift: tuple[float, float]  # how far the center moves from apex to base
    apex: float
    base: float
    radius: float  # outer radius of the left ventricle at the base
    wall: float
    wall_swing: float  # share by which the wall is thicker on one side
    wall_side: float
    stretch: float  # long over short axis of the left ventricle
    angle: float
    ripple: NDArray[np.float64]  # (orders 2-4, cosine and sine), shares of the radius
    septum: float  # direction from the left to the right ventricle
    rv_reach: float  # half axes and offset of the right ventricle, shares of the radius
    rv_height: float
    rv_offset: float
    rv_apex: float  # the right ventricle begins this far up the left one


@dataclass(frozen=True)
class _Tissue:
    """Signal of each tissue before bias field and noise; blood is about 1."""

    blood: float
    rv_blood: float
    myocardium: float
    fat: float
    liver: float
    muscle: float
    lung: float


def generate_subject(
    seed: int, subject: int, size: tuple[int, int, int] = (8, 96, 96)
) -> tuple[Array, NDArray[np.uint8]]:
    """Generate one scan and its true labels.

    Args:
        seed: Seed of the cohort.
        subject: Number of the subject, from 0.
        size: Grid (D, H, W); slice 0 is nearest the apex. The box imaged is :data:`EXTENT_MM`, so a finer
            grid shows the same anatomy in more detail (noise and texture are drawn anew).

    Returns:
        The image, (D, H, W) float32, nonnegative with an arbitrary scale per subject as in MR; and the
        labels, (D, H, W) uint8, indices into :data:`CLASSES`.

    Example:
        >>> image, label = generate_subject(0, 3, (4, 48, 48))
        >>> image.shape, sorted({int(value) for value in label.flat})
        ((4, 48, 48), [0, 1, 2, 3])
    """
    anatomy, surroundings, texture = (
        np.random.default_rng(sequence) for sequence in np.random.SeedSequence([seed, subject]).spawn(3)
    )
    heart = _draw_heart(anatomy)
    tissue = _draw_tissue(anatomy)
    canvas = _Canvas(size, tissue.lung, surroundings, texture)
    _paint_thorax(canvas, heart, tissue)
    label = _paint_heart(canvas, heart, tissue)
    return _degrade(canvas), label


def write_phantom(
    root: Path,
    *,
    subjects: int = 24,
    val: int = 2,
    test: int = 6,
    size: tuple[int, int, int] = (8, 96, 96),
    seed: int = 0,
) -> Path:
    """Write a generated cohort as a dataset folder (nnU-Net v2 raw layout with ``splits.json``).

    All cases carry labels, so that lower and upper bounds can both be trained; which of them a run may see is
    decided by its split.

    Args:
        root: Folder to write; it must not hold a dataset yet.
        subjects: Number of subjects in all; one case each.
        val: Subjects kept for validation (in ``imagesTr``).
        test: Subjects kept for testing (in ``imagesTs``); the rest are for training.
        size: Grid (D, H, W) of every scan.
        seed: Seed of the cohort.

    Returns:
        ``root``.

    Raises:
        DatasetError: if nothing is left to train on, or ``root`` already holds files.
    """
    if min(val, test) < 0 or subjects - val - test < 1:
        raise DatasetError(
            f"{subjects} subjects with {val} for validation and {test} for testing leave none to train on; "
            "ask for more subjects."
        )
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DatasetError(f"{root} is not empty; give a new folder for the generated cohort.")
    names = [f"subject{number:03d}" for number in range(subjects)]
    in_train, in_val = names[: subjects - val - test], names[subjects - val - test : subjects - test]
    in_test = names[subjects - test :]
    for number, name in enumerate(names):
        image, label = generate_subject(seed, number, size)
        part = "Ts" if name in in_test else "Tr"
        geometry = _geometry(size)
        write_scalar(root / f"images{part}" / f"{name}_0000.nii.gz", image, geometry)
        write_label(root / f"labels{part}" / f"{name}.nii.gz", label, geometry)
    splits = {
        "unit": "subject",
        "train": in_train,
        "val": in_val,
        "test": in_test,
        "labeled": {str(count): in_train[:count] for count in _labeled_counts(len(in_train))},
        "groups": {name: name for name in names},
    }
    write_json(root / "splits.json", splits)
    write_json(root / "dataset.json", _description(len(in_train) + val, test, seed, size))
    return root


def _labeled_counts(train: int) -> Iterator[int]:
    count = 1
    while count < train:
        yield count
        count *= 2
    yield train


def _description(training: int, testing: int, seed: int, size: tuple[int, int, int]) -> dict[str, object]:
    return {
        "name": "phantom",
        "channel_names": {"0": "MRI"},
        "labels": {name: value for value, name in enumerate(CLASSES)},
        "numTraining": training,
        "numTest": testing,
        "file_ending": ".nii.gz",
        "description": "Generated short-axis-heart-like scans with exact labels (scantly.data.phantom)",
        "generator": {"seed": seed, "size": list(size)},
    }


def _geometry(size: tuple[int, int, int]) -> Geometry:
    spacing = [extent / count for extent, count in zip(EXTENT_MM, size, strict=True)]
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])  # indices run to left, back, head
    affine[:3, 3] = [75.0 - spacing[2] / 2, 75.0 - spacing[1] / 2, spacing[0] / 2]
    return Geometry(shape=size, affine=affine, spatial_dims=3, has_spacing=True, header=None)


class _Canvas:
    """The image while it is painted: its grid in mm, and what is drawn at random.

    Attributes:
        z: Voxel centers as shares of the stack, (D, 1, 1).
        y: Voxel centers in mm from the middle, (1, H, 1).
        x: Voxel centers in mm from the middle, (1, 1, W).
        image: What is painted so far, (D, H, W).
        draw: Generator of shapes. The grid has no part in it, so every grid shows the same anatomy.
        texture: Generator of everything drawn voxel by voxel.
    """

    def __init__(
        self,
        size: tuple[int, int, int],
        background: float,
        draw: np.random.Generator,
        texture: np.random.Generator,
    ) -> None:
        z, y, x = ((np.arange(count, dtype=np.float32) + 0.5) / count for count in size)
        self.z: Floats = z[:, None, None]
        self.y: Floats = ((y - 0.5) * np.float32(EXTENT_MM[1]))[None, :, None]
        self.x: Floats = ((x - 0.5) * np.float32(EXTENT_MM[2]))[None, None, :]
        self.image: Array = np.full(size, background, np.float32)
        self.draw = draw
        self.texture = texture
        self._edge = EXTENT_MM[1] / size[1] * draw.uniform(0.25, 0.45)  # partial volume over about a pixel

    def paint(self, inside_mm: Floats, value: Floats | float) -> None:
        """Paint ``value`` where the signed distance ``inside_mm`` is positive, with a soft edge."""
        share = 1 / (1 + np.exp(-np.clip(inside_mm / self._edge, -30, 30)))
        self.image = (self.image + share * (value - self.image)).astype(np.float32)

    def noise(self, scale_mm: float) -> Array:
        """Gaussian noise (D, H, W) correlated over ``scale_mm``, standard deviation 1."""
        shape = self.image.shape
        sigma = [scale_mm * count / extent for count, extent in zip(shape, EXTENT_MM, strict=True)]
        white = self.texture.standard_normal(shape, np.float32)
        smooth: Array = ndimage.gaussian_filter(white, sigma, mode="wrap")
        scaled: Array = smooth / smooth.std()
        return scaled


def _draw_heart(rng: np.random.Generator) -> _Heart:
    return _Heart(
        center=(rng.uniform(0, 24), rng.uniform(-12, 14)),
        drift=(rng.uniform(-12, 4), rng.uniform(-10, 6)),
        apex=rng.uniform(-0.05, 0.09),
        base=rng.uniform(0.9, 1.06),
        radius=rng.uniform(25, 37),
        wall=rng.uniform(6.5, 12.5),
        wall_swing=rng.uniform(0.0, 0.3),
        wall_side=rng.uniform(-np.pi, np.pi),
        stretch=rng.uniform(1.0, 1.25),
        angle=rng.uniform(0, np.pi),
        ripple=rng.normal(0, [[0.03], [0.025], [0.015]], (3, 2)),
        septum=np.pi + rng.uniform(-0.75, 0.35),
        rv_reach=rng.uniform(0.85, 1.15),
        rv_height=rng.uniform(0.9, 1.25),
        rv_offset=rng.uniform(0.65, 0.9),
        rv_apex=rng.uniform(0.15, 0.32),
    )


def _draw_tissue(rng: np.random.Generator) -> _Tissue:
    blood = rng.uniform(0.75, 1.1)
    myocardium = rng.uniform(0.2, 0.5)
    return _Tissue(
        blood=blood,
        rv_blood=blood * rng.uniform(0.8, 1.08),
        myocardium=myocardium,
        fat=rng.uniform(0.55, 1.15),
        liver=rng.uniform(0.2, 0.65),
        muscle=myocardium * rng.uniform(0.8, 1.3),
        lung=rng.uniform(0.04, 0.16),
    )


def _ellipse(x: Floats, y: Floats, half: tuple[Floats | float, Floats | float]) -> Floats:
    """Approximate signed distance in mm, positive inside, to the ellipse with half axes ``half`` at 0."""
    a, b = (np.maximum(axis, 1e-3) for axis in half)
    level: Floats = (1 - np.sqrt((x / a) ** 2 + (y / b) ** 2)) * np.minimum(a, b)
    return level


def _paint_thorax(canvas: _Canvas, heart: _Heart, tissue: _Tissue) -> None:
    """Lung, liver, chest wall and the structures that resemble the heart without being it."""
    draw, z, y, x = canvas.draw, canvas.z, canvas.y, canvas.x
    for _ in range(int(draw.integers(8, 16))):  # small vessels of the lung
        at = draw.uniform(-75, 75, 2)
        half = (draw.uniform(1, 3), draw.uniform(1, 4))
        canvas.paint(_ellipse(x - at[0], y - at[1] - 20 * (z - draw.uniform(0, 1)), half), draw.uniform(0.3, 0.8))
    dome = draw.uniform(26, 48) - 30 * (0.5 - z) - draw.uniform(0.002, 0.006) * (x + draw.uniform(0, 40)) ** 2
    canvas.paint(y - dome + draw.uniform(0.1, 0.5) * x, tissue.liver)
    front = draw.uniform(2.2, 4.1)  # direction of the chest wall; the front is y < 0
    depth = np.cos(front) * 0.5 * x - (np.sin(front) * 0.9 + 0.6) * y
    wavy = 4 * np.sin(x / draw.uniform(9, 16) + draw.uniform(0, 6))
    start = draw.uniform(46, 62)
    canvas.paint(depth + wavy - start, tissue.muscle)
    canvas.paint(depth + 0.4 * wavy - start - draw.uniform(7, 13), tissue.fat)
    for number in range(int(draw.integers(2, 5))):
        _paint_distractor(canvas, heart, tissue, walled=number == 0)


def _paint_distractor(canvas: _Canvas, heart: _Heart, tissue: _Tissue, *, walled: bool) -> None:
    """A bright tube; with a wall it looks like a smaller left ventricle in the wrong place."""
    draw = canvas.draw
    direction, distance = draw.uniform(-np.pi, np.pi), heart.radius * draw.uniform(1.5, 2.4)
    lean = draw.uniform(-20, 20, 2)
    at_x = heart.center[0] + distance * np.cos(direction) + lean[0] * (canvas.z - 0.5)
    at_y = heart.center[1] + distance * np.sin(direction) + lean[1] * (canvas.z - 0.5)
    radius = heart.radius * (draw.uniform(0.4, 0.72) if walled else draw.uniform(0.15, 0.4))
    taper = 1 - draw.uniform(0, 0.8) * np.abs(canvas.z - draw.uniform(0, 1))
    body = _ellipse(canvas.x - at_x, canvas.y - at_y, (radius * taper * draw.uniform(0.8, 1.2), radius * taper))
    if walled:
        canvas.paint(body + _RING_MM, tissue.fat * draw.uniform(0.4, 1.0))
        canvas.paint(body, tissue.myocardium * draw.uniform(0.8, 1.2))
        body = body - draw.uniform(0.2, 0.5) * radius
    canvas.paint(body, tissue.blood * draw.uniform(0.75, 1.1))


def _paint_heart(canvas: _Canvas, heart: _Heart, tissue: _Tissue) -> NDArray[np.uint8]:
    """Paint both ventricles over the thorax and label them; above the base lie atria, which have no label."""
    draw = canvas.draw
    height = (canvas.z - heart.apex) / (heart.base - heart.apex)  # 0 at the apex, 1 at the base
    dx = canvas.x - heart.center[0] - heart.drift[0] * (height - 0.5)
    dy = canvas.y - heart.center[1] - heart.drift[1] * (height - 0.5)
    outer, inner = _left_ventricle(heart, height, dx, dy)
    right = _right_ventricle(heart, height, dx, dy)
    is_ventricle = (height >= 0) & (height <= 1)
    label = np.zeros(canvas.image.shape, np.uint8)
    for value, inside in ((1, right), (2, outer), (3, inner)):
        label[(inside > 0) & is_ventricle] = value

    fat = np.maximum(outer, right) + draw.uniform(2, 6) + 4 * canvas.noise(15)  # of uneven thickness
    canvas.paint(np.where(height > 0, fat, -100), tissue.fat * draw.uniform(0.5, 1))
    canvas.paint(right + _RING_MM, tissue.myocardium)
    strands = 0.07 * np.maximum(canvas.noise(3), 0)  # trabeculae
    canvas.paint(right, tissue.rv_blood - strands)
    canvas.paint(outer, tissue.myocardium)
    flow = 1 + draw.uniform(-0.006, 0.006) * dx + draw.uniform(-0.006, 0.006) * dy
    canvas.paint(inner, tissue.blood * flow)
    for side in (draw.uniform(0.4, 1.2), draw.uniform(2.0, 2.9)):  # papillary muscles belong to the cavity
        reach, half = heart.radius * draw.uniform(0.3, 0.5), (draw.uniform(2.5, 5), draw.uniform(2.5, 5))
        spot = _ellipse(dx - reach * np.cos(side), dy - reach * np.sin(side), half)
        spot = np.minimum(np.where(height < 0.75, spot, -100), inner)
        canvas.paint(spot, tissue.myocardium * draw.uniform(1.0, 1.3))
    return label


def _left_ventricle(heart: _Heart, height: Floats, dx: Floats, dy: Floats) -> tuple[Floats, Floats]:
    """Signed distances in mm, positive inside, to the outer and inner surface of the left ventricle."""
    cos, sin = np.cos(heart.angle), np.sin(heart.angle)
    u = (cos * dx + sin * dy) / np.sqrt(heart.stretch)
    v = (cos * dy - sin * dx) * np.sqrt(heart.stretch)
    theta = np.arctan2(v, u)
    orders = enumerate(heart.ripple, start=2)
    ripple = sum(a * np.cos(order * theta) + b * np.sin(order * theta) for order, (a, b) in orders)
    profile = np.sqrt(np.maximum(1 - (1 - np.clip(height, 0, 1)) ** 2.4, 0))
    outer = heart.radius * profile * (1 + ripple) - np.hypot(u, v)
    wall = heart.wall * (1 + heart.wall_swing * np.cos(theta - heart.wall_side))
    wall = np.where(height > 1, _RING_MM, wall)  # the wall of an atrium is thin
    return np.where(height < 0, -100, outer), np.where(height < 0, -100, outer - wall)


def _right_ventricle(heart: _Heart, height: Floats, dx: Floats, dy: Floats) -> Floats:
    """Signed distance in mm, positive inside, to an ellipse that the left ventricle will cover in part."""
    cos, sin = np.cos(heart.septum), np.sin(heart.septum)
    size = np.sqrt(np.clip((height - heart.rv_apex) / (1 - heart.rv_apex), 0, 1)) * heart.radius
    offset = heart.rv_offset * heart.radius * (0.5 + 0.5 * np.clip(height, 0, 1))
    half = (heart.rv_reach * size, heart.rv_height * size)
    inside = _ellipse(cos * dx + sin * dy - offset, cos * dy - sin * dx, half)
    return np.where(size > 0, inside, -100)


def _degrade(canvas: _Canvas) -> Array:
    """Texture, bias field, contrast curve, point spread, Rician noise and an arbitrary scale."""
    draw = canvas.draw
    fine, coarse = draw.uniform(0.03, 0.07) * canvas.noise(1.8), draw.uniform(0.03, 0.08) * canvas.noise(7)
    x, y, z = canvas.x / 75, canvas.y / 75, 2 * canvas.z - 1  # -1 to 1
    basis = (x, y, 0.6 * z, x * y, x * x - 0.3, y * y - 0.3)
    bias = np.exp(sum(weight * term for weight, term in zip(draw.normal(0, 0.22, 6), basis, strict=True)))
    image = np.maximum(canvas.image * (1 + fine + coarse) * bias, 0) ** draw.uniform(0.7, 1.5)
    blur = draw.uniform(0.3, 0.7)  # in pixels of the plane, and the same length across slices
    pixel, distance = EXTENT_MM[1] / image.shape[1], EXTENT_MM[0] / image.shape[0]
    image = ndimage.gaussian_filter(image, (blur * pixel / distance, blur, blur))
    noise = draw.uniform(0.02, 0.18) * canvas.texture.standard_normal((2, *image.shape), np.float32)
    degraded: Array = (np.hypot(image + noise[0], noise[1]) * draw.uniform(150, 900)).astype(np.float32)
    return degraded
