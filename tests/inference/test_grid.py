import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices

from scantly.errors import ConfigError
from scantly.inference.grid import gaussian_weights, tile, window_starts
from scantly.inference.settings import InferenceSettings

LITERATURE = InferenceSettings(window="uniform", stride=(4, 18, 18))
SIXTEENS = (16, 16, 16)


def test_the_literatures_grid_on_an_atrium():
    """160 x 150 x 88 (x, y, z) with patch 112 x 112 x 80 and stride 18 x 18 x 4: 4 x 4 x 3 windows."""
    tiling = tile((88, 150, 160), (80, 112, 112), LITERATURE, SIXTEENS)
    assert tiling.starts == ((0, 4, 8), (0, 18, 36, 38), (0, 18, 36, 48))
    assert len(tiling.windows) == 4 * 4 * 3
    assert tiling.windows[1] == (slice(0, 80), slice(0, 112), slice(18, 130))


def test_half_overlap_takes_a_sixth_of_the_windows():
    volume, patch = (88, 160, 160), (80, 112, 112)
    assert len(tile(volume, patch, LITERATURE, SIXTEENS).windows) == 48
    assert len(tile(volume, patch, InferenceSettings(), SIXTEENS).windows) == 8
    assert len(tile(volume, patch, InferenceSettings(window="whole"), SIXTEENS).windows) == 1


def test_a_share_of_overlap_is_not_rounded_down_by_its_last_binary_digit():
    """MONAI makes a stride of 15 from this."""
    settings = InferenceSettings(overlap=1 - 16 / 96)
    assert tile((192, 96), (96, 96), settings, (16, 16)).starts == ((0, 16, 32, 48, 64, 80, 96), (0,))


@given(st.integers(1, 60), st.integers(0, 90), st.integers(1, 60))
def test_windows_cover_the_axis_as_the_formula_says(window, more, stride):
    side = window + more
    stride = min(stride, window)
    starts = window_starts(side, window, stride)
    assert len(starts) == math.ceil((side - window) / stride) + 1
    assert starts[0] == 0 and starts[-1] == side - window
    assert all(0 < b - a <= stride for a, b in itertools.pairwise(starts))
    assert [(a, a + window) for a in starts] == [w[0] for w in dense_patch_slices((side,), (window,), (stride,), False)]


def test_padding_has_its_smaller_half_in_front():
    tiling = tile((10, 20, 33), (16, 25, 32), InferenceSettings(), SIXTEENS)
    assert tiling.padded == (16, 25, 33)
    assert tiling.inside == (slice(3, 13), slice(2, 22), slice(0, 33))
    images = torch.ones(1, 1, 10, 20, 33)
    padded = tiling.pad(images)
    assert padded.shape == (1, 1, 16, 25, 33)
    assert padded.sum() == images.sum()
    assert torch.equal(tiling.crop(padded), images)


def test_the_whole_is_padded_to_what_the_network_divides_by():
    tiling = tile((10, 40, 50), (16, 32, 32), InferenceSettings(window="whole"), (4, 16, 16))
    assert tiling.padded == tiling.window == (16, 48, 64)


def test_weights_fall_from_the_center_and_are_never_zero():
    weights = gaussian_weights((16, 112, 8), torch.device("cpu"))
    assert weights.shape == (16, 112, 8)
    assert weights.min().item() == pytest.approx(1e-3)
    assert weights.argmax() == weights[7, 55, 3:4].argmax() + (7 * 112 + 55) * 8 + 3
    by_hand = math.exp(-(0.5**2) / (2 * 2**2)) * math.exp(-(0.5**2) / (2 * 14**2)) * math.exp(-(0.5**2) / 2)
    assert weights[7, 55, 3].item() == pytest.approx(by_hand, rel=1e-6)
    assert weights is gaussian_weights((16, 112, 8), torch.device("cpu"))


@pytest.mark.parametrize("window", [(80, 112, 112), (33, 20), (1, 16, 5)])
def test_weights_are_monais_to_the_last_bit(window):
    theirs = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
    assert torch.equal(gaussian_weights(window, torch.device("cpu")), torch.as_tensor(theirs))


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"stride is 4 x 18 x 18, but the model is 2D; give 2 numbers"):
        tile((64, 64), (32, 32), LITERATURE, (16, 16))
    with pytest.raises(ConfigError, match=r"stride 4 x 40 x 8 is larger than the window 32 x 32 x 32"):
        tile((64, 64, 64), (32, 32, 32), InferenceSettings(stride=(4, 40, 8)), SIXTEENS)
