"""The random field: its kernels, a slow second implementation, and what it does to labels."""

import math

import numpy as np
import pytest
import torch

from scantly.methods.parts.label_smoothing import _filter, smooth_labels


def slow(probs: np.ndarray, sigma: float, weight: float, own: float, steps: int) -> np.ndarray:
    """Mean field over one slice ``(C, H, W)``, by the sum over all pairs of pixels."""
    classes, height, width = probs.shape
    rows, columns = (x.ravel() for x in np.indices((height, width)))
    dy, dx = rows[:, None] - rows, columns[:, None] - columns
    kernel = np.exp(-(dy**2 + dx**2) / (2 * sigma**2)) * (np.maximum(abs(dy), abs(dx)) <= 4 * sigma)
    d = kernel.sum(1) ** -0.5
    unary = -np.log(np.maximum(probs.reshape(classes, -1), 1e-5))

    def softmax(x):
        e = np.exp(x - x.max(0))
        return e / e.sum(0)

    q = softmax(-unary)
    for _ in range(steps):
        q = softmax(-unary + weight * ((q * d) @ kernel * d) + own * q)
    return q.argmax(0).reshape(height, width)


def random_probs(slices: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return (2 * torch.randn(3, slices, height, width, generator=torch.Generator().manual_seed(seed))).softmax(0)


@pytest.mark.parametrize(("sigma", "steps"), [(0.7, 1), (0.7, 30), (1.5, 5), (10.0, 30)])
def test_it_equals_the_sum_over_all_pairs(sigma, steps):
    probs = random_probs(2, 9, 12)
    found = smooth_labels(probs, sigma=sigma, spatial_weight=3.0, self_weight=1.0, iterations=steps)
    expected = np.stack([slow(probs[:, i].double().numpy(), sigma, 3.0, 1.0, steps) for i in range(2)])
    assert found.dtype == torch.int64
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(("sigma", "neighbor"), [(10.0, 0.995012), (5.0, 0.980199)])
def test_kernel_between_neighbors(sigma, neighbor):
    matrix = _filter(200, sigma, torch.device("cpu"))
    # Far from the border the normalization is the same everywhere.
    assert (matrix[100, 101] / matrix[100, 100]).item() == pytest.approx(neighbor, abs=1e-6)
    assert matrix[100, 100 + int(4 * sigma) + 1] == 0
    assert matrix[100].sum().item() == pytest.approx(1.0, abs=1e-5)


def test_the_bilateral_kernel_of_the_public_code_is_zero_between_neighbors():
    assert math.exp(-0.5 * 100**2) == 0.0


def test_the_filter_is_symmetric_and_loses_no_weight_inside():
    matrix = _filter(60, 5.0, torch.device("cpu"))
    torch.testing.assert_close(matrix, matrix.T)
    assert matrix.min() >= 0


def test_specks_vanish_and_large_regions_stay():
    probs = torch.full((2, 1, 64, 64), 0.9)
    probs[1] = 0.1
    for region in ((slice(30, 32), slice(10, 12)), (slice(20, 60), slice(24, 60))):
        probs[(0, 0, *region)], probs[(1, 0, *region)] = 0.3, 0.7
    labels = smooth_labels(probs, sigma=5.0)[0]
    assert labels[30:32, 10:12].sum() == 0
    assert labels[30:50, 34:50].all()


def test_without_pairwise_terms_it_is_the_most_probable_class():
    probs = random_probs(3, 8, 8)
    assert torch.equal(smooth_labels(probs, spatial_weight=0.0, self_weight=0.0), probs.argmax(0))


def test_slices_do_not_touch():
    probs = random_probs(3, 16, 16)
    together = smooth_labels(probs, sigma=2.0)
    assert torch.equal(together, torch.cat([smooth_labels(probs[:, [i]], sigma=2.0) for i in range(3)]))


def test_certain_probabilities_stay_finite():
    probs = torch.zeros(2, 1, 8, 8)
    probs[0] = 1.0
    assert smooth_labels(probs).sum() == 0


def test_mixed_precision_does_not_reach_it():
    probs = random_probs(2, 20, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = smooth_labels(probs, sigma=2.0)
    assert torch.equal(found, smooth_labels(probs, sigma=2.0))
