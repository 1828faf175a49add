import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from scantly import views
from scantly.errors import ConfigError
from scantly.settings import parse
from scantly.views import CutMixConfig

ALWAYS = CutMixConfig(probability=1.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def edges_of(mask: torch.Tensor) -> torch.Tensor:
    """Edge lengths ``(B, n)`` of the boxes; fails if a mask is not one full box."""
    spatial = range(2, mask.ndim)
    edges = []
    for axis in spatial:
        line = mask.any(dim=tuple(each for each in (1, *spatial) if each != axis))
        steps = line.int().diff(prepend=torch.zeros(len(line), 1), append=torch.zeros(len(line), 1)).abs().sum(1)
        assert (steps == 2).all(), "the box is in more than one piece"
        edges.append(line.sum(1))
    lengths = torch.stack(edges, dim=1)
    assert torch.equal(mask.flatten(1).sum(1), lengths.prod(1))
    return lengths


def test_area_and_aspect_are_those_of_unimatch() -> None:
    mask = views.sample_cutmix(ALWAYS, 4000, (100, 100), generator=generator()).mask
    edges = edges_of(mask)
    share = edges.prod(1) / 10_000
    aspect = edges[:, 0] / edges[:, 1]
    assert 0.016 < share.min() < 0.025 and 0.38 < share.max() <= 0.4
    assert abs(share.mean() - 0.21) < 0.01
    assert 0.27 < aspect.min() < 0.34 and 3.0 < aspect.max() < 3.7
    assert (aspect > 1).double().mean() > 0.65  # the ratio is uniform, not its logarithm


def test_boxes_reach_every_voxel() -> None:
    mask = views.sample_cutmix(ALWAYS, 3000, (16, 20), generator=generator()).mask
    assert mask.any(0).all()
    assert mask[:, 0, 0].any() and mask[:, 0, -1, -1].any()


def test_cubes_have_the_proportions_of_the_patch() -> None:
    mask = views.sample_cutmix(ALWAYS, 300, (20, 40, 60), generator=generator()).mask
    edges = edges_of(mask)
    assert ((edges / torch.tensor([20, 40, 60]) - edges[:, 2:] / 60).abs() < 0.04).all()
    share = edges.prod(1) / (20 * 40 * 60)
    assert 0.015 < share.min() < 0.05 and 0.36 < share.max() < 0.43


def test_half_area_boxes() -> None:
    config = CutMixConfig(probability=1.0, area=(0.5, 0.5))
    edges = edges_of(views.sample_cutmix(config, 500, (64, 64), generator=generator()).mask)
    share = edges.prod(1) / 4096
    assert (share <= 0.5).all() and (share > 0.5 - 2 * 64 / 4096).all()  # edges are rounded down
    assert edges.min() >= 31 and edges[:, 1].unique().numel() > 20


@settings(max_examples=50)
@given(
    size=st.one_of(
        st.tuples(st.integers(1, 40), st.integers(1, 40)),
        st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    ),
    low=st.floats(0.01, 1),
    high=st.floats(0.01, 1),
    seed=st.integers(0, 10_000),
)
def test_a_box_of_any_share_lies_within_a_patch_of_any_size(size, low, high, seed) -> None:
    config = CutMixConfig(probability=1.0, area=(min(low, high), max(low, high)), aspect=(0.1, 8.0))
    mask = views.sample_cutmix(config, 5, size, generator=generator(seed)).mask
    assert mask.shape == (5, 1, *size)
    edges = edges_of(mask)
    assert (edges >= 1).all() and (edges <= torch.tensor(size)).all()


def test_probability_per_image() -> None:
    mixed = views.sample_cutmix(CutMixConfig(), 3000, (16, 16), generator=generator()).mask.flatten(1).any(1)
    assert abs(mixed.double().mean() - 0.5) < 0.03
    never = views.sample_cutmix(CutMixConfig(probability=0.0), 50, (16, 16), generator=generator())
    x = torch.randn(50, 1, 16, 16)
    assert torch.equal(views.apply_cutmix(x, never), x)


@pytest.mark.parametrize("size", [(12, 12), (6, 8, 10)])
def test_pixels_labels_and_confidences_come_from_the_same_image(size: tuple[int, ...]) -> None:
    rows = torch.arange(4).view(4, *[1] * len(size)).expand(4, *size)
    params = views.sample_cutmix(ALWAYS, 4, size, generator=generator())
    labels = views.apply_cutmix(rows, params)
    assert labels.dtype == torch.int64
    inside = params.mask[:, 0]
    for row in range(4):
        assert labels[row][~inside[row]].unique().tolist() == [row]
        assert labels[row][inside[row]].unique().tolist() == [(row + 1) % 4]
    images = views.apply_cutmix(rows[:, None].expand(4, 3, *size).bfloat16(), params)
    assert images.dtype == torch.bfloat16
    assert torch.equal(images[:, 2].long(), labels)
    assert torch.equal(views.apply_cutmix(rows == 1, params), labels == 1)


def test_content_from_a_second_batch() -> None:
    here, there = torch.zeros(3, 1, 8, 8), torch.ones(3, 1, 8, 8)
    params = views.sample_cutmix(ALWAYS, 3, (8, 8), partner=torch.tensor([2, 0, 1]), generator=generator())
    assert params.partner.tolist() == [2, 0, 1]
    assert torch.equal(views.apply_cutmix(here, params, source=there), params.mask.float())


def test_a_batch_of_one_is_mixed_with_itself() -> None:
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(views.apply_cutmix(x, views.sample_cutmix(ALWAYS, 1, (8, 8), generator=generator())), x)


def test_box_mask_by_hand() -> None:
    mask = views.box_mask(torch.tensor([[0, 1, 2], [1, 0, 0]]), torch.tensor([[1, 2, 2], [1, 0, 3]]), (2, 3, 4))
    expected = torch.zeros(2, 1, 2, 3, 4, dtype=torch.bool)
    expected[0, 0, 0, 1:3, 2:4] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"area": [0.4, 0.02]}, r"setting 'cutmix.area' is \[0.4, 0.02\]: give two shares"),
        ({"area": [0.0, 0.4]}, "give two shares"),
        ({"aspect": [-1.0, 2.0]}, "setting 'cutmix.aspect' .* two positive ratios"),
        ({"probability": 1.5}, "setting 'cutmix.probability' is 1.5"),
        ({"areas": [0.1, 0.2]}, "did you mean 'cutmix.area'"),
    ],
)
def test_bad_settings_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(CutMixConfig, values, where="cutmix")


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (25, 31)])
def test_rectangles_of_arco_cover_half_of_the_plane(size: tuple[int, int]) -> None:
    """Up to half the rectangle's width, since its height is a whole number."""
    edges = edges_of(views.sample_half_area(4000, size, generator=generator()).mask)
    height, width = size
    assert edges[:, 1].unique().tolist() == list(range(width // 2 + 1, width))
    assert ((edges.prod(1) - height * width / 2).abs() <= edges[:, 1] / 2).all()
    counts = edges[:, 1].bincount()[width // 2 + 1 :]
    expected = 4000 / len(counts)
    assert ((counts - expected).square() / expected).sum() < len(counts) + 6 * (2 * len(counts)) ** 0.5


def test_corners_of_arcos_rectangles_are_uniform_among_those_that_fit() -> None:
    mask = views.sample_half_area(20_000, (6, 4), generator=generator()).mask[:, 0]  # width 3, height 4
    corners = mask.flatten(1).int().argmax(1)
    assert corners.unique().tolist() == [row * 4 + column for row in range(3) for column in range(2)]
    assert (corners.unique(return_counts=True)[1] / 20_000 - 1 / 6).abs().max() < 0.01


@pytest.mark.parametrize(("depth", "slices", "starts"), [(80, 10, 61), (20, 10, 1), (12, 10, 3), (7, 7, 1)])
def test_boxes_of_arco_in_volumes_are_ten_slices_deep(depth: int, slices: int, starts: int) -> None:
    mask = views.sample_half_area(2000, (depth, 8, 8), generator=generator()).mask
    edges = edges_of(mask)
    assert (edges[:, 0] == slices).all()
    assert ((edges[:, 1:].prod(1) - 32).abs() <= edges[:, 2] / 2).all()
    first = mask[:, 0].any(dim=(2, 3)).int().argmax(1)
    assert first.unique().tolist() == list(range(starts))


def test_pixels_labels_and_confidences_of_arcos_rectangles_come_from_the_next_image() -> None:
    rows = torch.arange(4).view(4, 1, 1).expand(4, 12, 12)
    params = views.sample_half_area(4, (12, 12), generator=generator())
    labels = views.apply_cutmix(rows, params)
    assert torch.equal(labels, torch.where(params.mask[:, 0], (rows + 1) % 4, rows))
    assert torch.equal(views.apply_cutmix(rows[:, None].float(), params)[:, 0].long(), labels)
    assert torch.equal(views.apply_cutmix(rows / 4, params), labels / 4)


def boxes_by_redrawing(count: int, side: int, aspect: tuple[float, float], seed: int) -> np.ndarray:
    """Edges and corners (h, w, y, x) as UniMatch's code draws them: the area once, the rest until the box fits."""
    rng = np.random.default_rng(seed)
    found = []
    while len(found) < count:
        area = rng.uniform(0.02, 0.4) * side * side
        while True:
            ratio = rng.uniform(*aspect)
            w, h = int((area / ratio) ** 0.5), int((area * ratio) ** 0.5)
            x, y = rng.integers(0, side, 2)
            if x + w <= side and y + h <= side:
                break
        found.append((h, w, y, x))
    return np.array(found)


def test_boxes_are_distributed_as_in_the_public_code() -> None:
    """Two-sample Kolmogorov-Smirnov distances of area, aspect, edges and corners below the bound of p = 0.001."""
    side, count = 64, 4000
    mask = views.sample_cutmix(ALWAYS, count, (side, side), generator=generator()).mask
    edges = edges_of(mask).double().numpy()
    corners = np.stack([mask[:, 0].any(axis).int().argmax(1).numpy() for axis in (2, 1)], axis=1)
    ours = np.concatenate([edges, corners], axis=1)
    theirs = boxes_by_redrawing(count, side, (0.3, 1 / 0.3), seed=0)
    bound = 1.95 * (2 / count) ** 0.5
    for name, of in {
        "area": lambda b: b[:, 0] * b[:, 1],
        "aspect": lambda b: b[:, 0] / b[:, 1],
        "height": lambda b: b[:, 0],
        "width": lambda b: b[:, 1],
        "top": lambda b: b[:, 2],
        "left": lambda b: b[:, 3],
    }.items():
        assert ks_2samp(of(ours), of(theirs)).statistic < bound, name
