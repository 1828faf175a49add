import math

import numpy as np
import pytest
import torch
from torch import nn

from scantly.inference.windows import entropy, predict_array


class Pointwise(nn.Module):
    """Logits that depend on the voxel alone, so that any tiling must give the same."""

    def forward(self, x):
        return torch.cat([x[:, :1], 2 * x[:, :1] - 1, -x[:, :1]], dim=1)


def expected(array):
    logits = np.stack([array[0], 2 * array[0] - 1, -array[0]])
    shifted = np.exp(logits - logits.max(0))
    return shifted / shifted.sum(0)


@pytest.mark.parametrize(
    ("dims", "shape", "patch"),
    [
        (2, (5, 32, 32), (32, 32)),  # one window
        (2, (20, 16, 16), (16, 16)),  # more slices than one forward takes
        (2, (3, 20, 31), (32, 32)),  # smaller than the patch, odd padding
        (2, (2, 50, 40), (32, 32)),  # windows
        (3, (16, 16, 16), (16, 16, 16)),
        (3, (9, 20, 40), (16, 16, 16)),  # smaller along one axis, larger along others
    ],
)
def test_every_tiling_equals_the_voxelwise_result(dims, shape, patch):
    array = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    probs = predict_array(Pointwise(), array, spatial_dims=dims, patch_size=patch, device=torch.device("cpu"))
    assert probs.shape == (3, *shape)
    np.testing.assert_allclose(probs, expected(array), atol=1e-5)


def test_entropy_of_worked_numbers():
    probs = np.array([[1.0, 0.25, 0.7], [0.0, 0.25, 0.1], [0.0, 0.25, 0.1], [0.0, 0.25, 0.1]])
    by_hand = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)
    np.testing.assert_allclose(entropy(probs), [0.0, 1.0, by_hand], atol=1e-6)
