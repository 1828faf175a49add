import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from scantly.inference.settings import InferenceSettings
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


class Context(nn.Module):
    """Logits that depend on the neighborhood and on the window's border, as a real network's do."""

    factors = (4, 4, 4)

    def __init__(self, dims, classes=3):
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(conv(1, 4, 5, padding=2), nn.ReLU(), conv(4, classes, 3, padding=1))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        self.factors = self.factors[:dims]
        self.batches = []

    def forward(self, x):
        self.batches.append(tuple(x.shape))
        return self.layers(x)


def volume(*shape):
    return np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)


def predict(network, array, patch, dims=3, **values):
    settings = InferenceSettings(**values)
    device = torch.device("cpu")
    return predict_array(network, array, spatial_dims=dims, patch_size=patch, device=device, settings=settings)


def literature_loop(network, array, patch, stride):
    """The published procedure, one window after the other, with NumPy sums."""
    volume = array[0]
    missing = [max(p - n, 0) for p, n in zip(patch, volume.shape, strict=True)]
    volume = np.pad(volume, [(m // 2, m - m // 2) for m in missing])
    counts = [math.ceil((n - p) / s) + 1 for n, p, s in zip(volume.shape, patch, stride, strict=True)]
    total, visits = None, np.zeros(volume.shape)
    for place in np.ndindex(*counts):
        start = [min(s * i, n - p) for s, i, n, p in zip(stride, place, volume.shape, patch, strict=True)]
        index = tuple(slice(a, a + p) for a, p in zip(start, patch, strict=True))
        with torch.no_grad():
            probs = network(torch.from_numpy(volume[index])[None, None]).softmax(1)[0].numpy()
        total = np.zeros((len(probs), *volume.shape)) if total is None else total
        total[(slice(None), *index)] += probs
        visits[index] += 1
    inside = tuple(slice(m // 2, m // 2 + n) for m, n in zip(missing, array.shape[1:], strict=True))
    return (total / visits)[(slice(None), *inside)]


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("shape", [(13, 22, 30), (9, 20, 12)])
def test_uniform_windows_equal_the_literatures_loop(shape, batch):
    network, patch, stride = Context(3), (12, 16, 16), (2, 5, 7)
    array = volume(*shape)
    probs = predict(network, array, patch, window="uniform", stride=stride, batch=batch)
    assert max(rows for rows, *_ in network.batches) <= batch
    np.testing.assert_allclose(probs, literature_loop(network, array, patch, stride), atol=1e-6)


@pytest.mark.parametrize("mode", ["gaussian", "uniform"])
@pytest.mark.parametrize(
    ("dims", "shape", "patch", "overlap"),
    [(3, (20, 24, 33), (16, 16, 16), 0.5), (3, (10, 40, 30), (16, 16, 16), 0.25), (2, (19, 40, 37), (32, 16), 0.5)],
)
def test_parity_with_monai_where_the_grids_agree(mode, dims, shape, patch, overlap):
    network, array = Context(dims), volume(*shape)
    images = torch.from_numpy(array)
    images = images.movedim(1, 0) if dims == 2 else images[None]
    with torch.no_grad():
        theirs = sliding_window_inference(
            images,
            patch,
            4,
            lambda windows: network(windows).softmax(1),
            overlap=overlap,
            mode="constant" if mode == "uniform" else mode,
        )
    theirs = theirs.movedim(0, 1) if dims == 2 else theirs[0]
    ours = predict(network, array, patch, dims, window=mode, overlap=overlap)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)
    assert not np.allclose(ours, predict(network, array, patch, dims, window=mode, overlap=0), atol=1e-3)


@pytest.mark.parametrize(("dims", "shape", "padded"), [(3, (9, 20, 17), (12, 20, 20)), (2, (3, 20, 17), (20, 20))])
def test_the_whole_is_one_pass_with_zeros_around(dims, shape, padded):
    network, array = Context(dims), volume(*shape)
    ours = predict(network, array, (8,) * dims, dims, window="whole")
    assert [seen[2:] for seen in network.batches] == [padded]
    sides = shape[3 - dims :]
    pads = [
        ((total - side) // 2, total - side - (total - side) // 2) for side, total in zip(sides, padded, strict=True)
    ]
    wide = np.pad(array[0], [(0, 0)] * (3 - dims) + pads)
    with torch.no_grad():
        rows = torch.from_numpy(wide)[:, None] if dims == 2 else torch.from_numpy(wide)[None, None]
        probs = network(rows).softmax(1)
    probs = (probs.movedim(0, 1) if dims == 2 else probs[0]).numpy()
    inside = [slice(left, left + side) for (left, _), side in zip(pads, sides, strict=True)]
    np.testing.assert_allclose(ours, probs[(..., *inside)], atol=1e-6)


@pytest.mark.parametrize(("dims", "shape", "passes"), [(2, (2, 16, 16), 4), (3, (8, 8, 8), 8)])
def test_flips_average_over_every_mirror_image(dims, shape, passes):
    network, array = Context(dims), volume(*shape)
    axes = tuple(range(4 - dims, 4))
    ours = predict(network, array, shape[3 - dims :], dims, flips=True)
    assert len(network.batches) == passes
    plain = [
        np.flip(predict(network, np.flip(array, chosen), shape[3 - dims :], dims), chosen)
        for count in range(dims + 1)
        for chosen in itertools.combinations(axes, count)
    ]
    np.testing.assert_allclose(ours, np.mean(plain, axis=0), atol=1e-6)
    np.testing.assert_allclose(ours.sum(0), 1, atol=1e-5)
    mirrored = predict(network, np.flip(array, axes), shape[3 - dims :], dims, flips=True)
    np.testing.assert_allclose(np.flip(mirrored, axes), ours, atol=1e-6)


def test_a_window_of_its_own_size_replaces_the_training_patch():
    network, array = Context(3), volume(16, 16, 16)
    predict(network, array, (16, 16, 16), patch_size=(8, 16, 16))
    assert {seen[2:] for seen in network.batches} == {(8, 16, 16)}


class Counting(nn.Module):
    """Remembers how many of its outputs are alive when the next one is made."""

    def __init__(self):
        super().__init__()
        self.alive, self.most = weakref.WeakSet(), 0

    def forward(self, x):
        self.most = max(self.most, len(self.alive))
        logits = torch.cat([x, -x], dim=1)
        self.alive.add(logits)
        return logits


def test_outputs_of_windows_are_not_collected():
    network = Counting()
    predict(network, volume(16, 16, 16), (8, 8, 8), window="uniform", stride=(4, 4, 4))
    assert network.most <= 1
