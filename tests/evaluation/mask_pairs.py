"""Pairs of masks, none empty, of many sizes, shapes and spacings."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.ndimage import gaussian_filter

Pair = tuple[str, np.ndarray, np.ndarray, tuple[float, ...] | None]
SPACINGS = {
    2: (None, (1.0, 1.0), (0.7, 0.7), (1.5, 0.4)),
    3: (None, (1.0, 1.0, 1.0), (0.625, 0.625, 0.625), (10.0, 1.5625, 1.5625), (0.9, 3.0, 1.7)),
}


@cache
def random_pairs() -> list[Pair]:
    rng = np.random.default_rng(20)
    pairs = [_blobs(rng, index) for index in range(180)] + [_noise(rng, index) for index in range(15)]
    return pairs + [_special(rng, kind, ndim) for kind in _SPECIAL for ndim in (2, 3)]


def _spacing(rng: np.random.Generator, ndim: int) -> tuple[float, ...] | None:
    return SPACINGS[ndim][rng.integers(len(SPACINGS[ndim]))]


def _shape(rng: np.random.Generator, ndim: int) -> tuple[int, ...]:
    # volumes of one slice are another matter (measured as 2D, where medpy sees surface only)
    return tuple(int(n) for n in rng.integers(2, 60 if ndim == 2 else 36, size=ndim))


def _blobs(rng: np.random.Generator, index: int) -> Pair:
    """Thresholded smooth noise, the second mask a changed version of the first; many touch the borders."""
    ndim = 2 + index % 2
    shape = _shape(rng, ndim)
    sigma = rng.uniform(0.5, 5)
    field, change = (gaussian_filter(rng.normal(size=shape), sigma) for _ in range(2))
    masks = []
    for values in (field, field + rng.uniform(0, 1.5) * change):
        mask = values > np.quantile(values, rng.uniform(0.3, 0.97))
        mask.flat[np.argmax(values)] = True
        masks.append(mask.astype(np.uint8))
    return f"blob-{index}", masks[0], masks[1], _spacing(rng, ndim)


def _noise(rng: np.random.Generator, index: int) -> Pair:
    ndim = 2 + index % 2
    prediction, reference = rng.random((2, *_shape(rng, ndim))) < rng.uniform(0.005, 0.9)
    prediction.flat[0] = reference.flat[-1] = True
    return f"noise-{index}", prediction, reference, _spacing(rng, ndim)


_SPECIAL = ("single", "same", "far", "nested", "full", "corner", "line")


def _special(rng: np.random.Generator, kind: str, ndim: int) -> Pair:
    prediction, reference = np.zeros((2, *[30] * ndim), bool)
    inner, outer = (slice(10, 14),) * ndim, (slice(3, 26),) * ndim
    if kind == "single":
        prediction[(4,) * ndim] = reference[(9,) * ndim] = True
    elif kind == "same":
        prediction[outer] = reference[outer] = True
    elif kind == "far":
        prediction[(slice(0, 4),) * ndim] = reference[(slice(25, 30),) * ndim] = True
    elif kind == "nested":
        prediction[inner] = reference[outer] = True
    elif kind == "full":
        prediction[...] = reference[inner] = True
    elif kind == "corner":
        prediction[(slice(0, 9),) * ndim] = reference[(slice(0, 12),) * ndim] = True
    else:
        prediction[3] = reference[:, 5] = True
    return f"{kind}-{ndim}d", prediction, reference, _spacing(rng, ndim)
