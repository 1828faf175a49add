"""Class-wise patches, against loops, and the worked numbers of PLGCL's specification."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scantly.errors import ConfigError
from scantly.methods.parts.batch_norm import without_statistics
from scantly.methods.parts.class_queues import ClassQueues
from scantly.methods.parts.patch_views import augment, box_means, crop, resample, select
from scantly.methods.parts.patches import (
    Boxes,
    HostCopy,
    class_boxes,
    filter_coverage,
    fitting_patch,
    suppress,
    tile_starts,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(dims, images=3, classes=3, size=24, seed=0):
    """Label maps with a few boxes per image."""
    random = np.random.default_rng(seed)
    labels = np.zeros((images, *(size,) * dims), np.int16)
    for image, label in itertools.product(range(images), range(1, classes)):
        start = random.integers(0, size - 8, dims)
        length = random.integers(4, 8, dims)
        labels[(image, *(slice(s, s + n) for s, n in zip(start, length, strict=True)))] = label
    return labels


def cut(array, box, row):
    """The patch ``row`` of ``array`` ``(B, ..., *spatial)`` by slicing."""
    places = tuple(slice(s, s + n) for s, n in zip(box.start[row].tolist(), box.sides, strict=True))
    return array[(int(box.image[row]), ..., *places)]


# tiling


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(100, 300, [100, 144]), (20, 50, [0]), (450, 40, [256]), (0, 512, [0, 256])],
)
def test_tiling_of_one_axis(start, length, expected):
    assert tile_starts(start, length, 256, 512) == expected


def test_tiling_of_the_background():
    assert tile_starts(0, 512, 256, 512) == [0, 256]
    assert tile_starts(0, 256, 64, 256) == [0, 64, 128, 192]
    boxes, coverage = class_boxes(np.zeros((1, 256, 256), np.int16), 2, 64)
    starts = [0, 64, 128, 192]
    assert boxes.start.tolist() == [list(each) for each in itertools.product(starts, starts)]
    assert boxes.counts == (16, 0)
    assert (coverage == 1).all()


@given(st.data())
def test_tiles_lie_inside_the_image_and_cover_the_stretch(data):
    size = data.draw(st.integers(1, 60))
    side = data.draw(st.integers(1, size))
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    starts = tile_starts(start, length, side, size)
    assert all(0 <= s <= size - side for s in starts)
    assert set(range(start, start + length)) <= {s + i for s in starts for i in range(side)}
    assert len(starts) == max(-(-length // side), 1)


# components and non-maximum suppression


def test_boxes_of_ten_voxels_are_dropped_and_of_eleven_kept():
    labels = np.zeros((1, 32, 32), np.int16)
    labels[0, 2:4, 2:7] = 1  # 2 x 5
    labels[0, 20, 10:21] = 2  # 1 x 11
    boxes, _ = class_boxes(labels, 3, 8)
    assert boxes.counts[1:] == (0, 2)


def test_components_touch_by_corners_and_are_tiled_by_their_own_bounding_box():
    labels = np.zeros((1, 40, 40), np.int16)
    labels[0, 4:8, 4:8] = labels[0, 8:12, 8:12] = 1  # one component by a corner, 8 x 8
    labels[0, 30:36, 20:24] = 1
    boxes, _ = class_boxes(labels, 2, 8)
    assert boxes.start[boxes.label == 1].tolist() == [[4, 4], [29, 18]]


def test_components_in_a_hole_of_another_count():
    labels = np.zeros((1, 32, 32), np.int16)
    labels[0, 2:30, 2:30] = 1
    labels[0, 6:26, 6:26] = 0
    labels[0, 12:20, 12:20] = 1
    boxes, _ = class_boxes(labels, 2, 8)
    assert [12, 12] in boxes.start[boxes.label == 1].tolist()


def test_suppression_of_the_worked_row():
    starts = np.array([[0, 0], [0, 10], [0, 20]])
    assert suppress(starts, (64, 64)) == [0, 2]  # 20 kept, 10 dropped (54/64), 0 kept (44/64)


def test_suppression_drops_equal_boxes_but_the_last_and_none_far_away():
    starts = np.array([[5, 5], [5, 5], [30, 30]])
    assert suppress(starts, (16, 16)) == [1, 2]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_suppression_agrees_with_a_loop(tiles):
    remaining, kept, side = list(range(len(tiles))), [], 10
    while remaining:
        best = max(remaining, key=lambda i: (tiles[i][1], i))
        kept.append(best)

        def overlap(i, best=best):
            return np.prod([max(0, side - abs(a - b)) for a, b in zip(tiles[i], tiles[best], strict=True)]) / side**2

        remaining = [i for i in remaining if i != best and overlap(i) <= 0.8]
    assert suppress(np.array(tiles), (side, side)) == sorted(kept)


def test_suppression_is_per_image_and_not_for_the_background():
    labels = np.zeros((2, 32, 32), np.int16)
    labels[:, 8:16, 8:16] = 1  # the same place in two images
    boxes, _ = class_boxes(labels, 2, 8)
    assert boxes.image[boxes.label == 1].tolist() == [0, 1]
    boxes, _ = class_boxes(np.zeros((1, 9, 9), np.int16), 2, 8)  # tiles at 0 and 1 overlap by 7/8
    assert boxes.counts == (4, 0)


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_are_in_order_of_class_image_and_place_and_hold_their_class(dims):
    labels = blobs(dims)
    boxes, coverage = class_boxes(labels, 3, 8)
    order = [(int(a), int(b)) for a, b in zip(boxes.label, boxes.image, strict=True)]
    assert order == sorted(order)
    assert sum(boxes.counts) == len(boxes.label) == len(coverage)
    assert boxes.present == [0, 1, 2]
    assert [int((boxes.label == k).sum()) for k in range(3)] == list(boxes.counts)
    for row in range(len(order)):
        inside = cut(labels, boxes, row) == int(boxes.label[row])
        assert inside.shape == (8,) * dims
        assert coverage[row] == pytest.approx(inside.mean())
        assert inside.any()


def test_a_tile_without_its_class_and_an_absent_class_are_left_out():
    labels = np.ones((1, 16, 16), np.int16)
    labels[0, :8, :8] = 0
    boxes, _ = class_boxes(labels, 4, 8)
    assert boxes.start[boxes.label == 0].tolist() == [[0, 0]]
    assert boxes.counts == (1, 3, 0, 0)
    assert boxes.present == [0, 1]


def test_an_axis_shorter_than_a_patch_gives_its_whole_length():
    boxes, _ = class_boxes(blobs(3, size=24)[:, :10], 3, 16)
    assert boxes.sides == (10, 16, 16)
    assert not boxes.start[:, 0].any()


def test_no_image_at_all_gives_no_patch():
    boxes, coverage = class_boxes(np.zeros((0, 16, 16), np.int16), 3, 8)
    assert boxes.counts == (0, 0, 0)
    assert boxes.present == []
    assert boxes.start.shape == (0, 2)
    assert len(coverage) == 0


def test_host_copies_are_copies():
    tensors = torch.arange(4), torch.rand(3)
    first, second = HostCopy(*tensors).wait()
    assert first.tolist() == [0, 1, 2, 3]
    assert second.tolist() == tensors[1].tolist()


# coverage filter


def three_classes(kept):
    """Ten patches of one class of which ``kept`` pass a threshold of 0.5 from below."""
    coverage = np.array([0.2] * kept + [0.9] * (10 - kept))
    zero = torch.zeros(10, dtype=torch.long)
    return Boxes(zero, zero, torch.zeros(10, 2, dtype=torch.long), (8, 8), (10,)), coverage


def test_the_published_coverage_rule():
    threshold, seen = 0.5, []
    for update, kept in enumerate((6, 9, 8)):
        remaining, (threshold,) = filter_coverage(*three_classes(kept), np.array([threshold]), update, published=True)
        assert remaining.counts == (kept,)
        seen.append(threshold)
    assert seen == pytest.approx([0.52, 0.51, 0.51])


def test_the_steps_of_the_coverage_threshold():
    def moved(updates):  # kept 9 of 10: one more than 0.8
        return 0.5 - filter_coverage(*three_classes(9), np.array([0.5]), updates, published=True)[1][0]

    assert [moved(updates) for updates in (0, 1, 2, 10)] == pytest.approx([0.01, 0.01, 0.005, 0.001])


def test_the_repaired_coverage_rule_keeps_full_patches_and_tends_to_four_in_five():
    boxes, coverage = three_classes(6)
    remaining, (threshold,) = filter_coverage(boxes, coverage, np.array([0.5]), 0, published=False)
    assert remaining.counts == (4,)
    assert threshold == pytest.approx(0.5 - 0.01 * (8 - 4))
    assert filter_coverage(boxes, coverage, np.array([0.001]), 0, published=False)[1][0] == pytest.approx(0.021)
    assert filter_coverage(boxes, coverage, np.array([1.0]), 0, published=False)[1][0] == pytest.approx(0.92)
    assert filter_coverage(boxes, coverage, np.array([0.0]), 0, published=True)[1][0] == pytest.approx(0.08)


def test_the_coverage_threshold_stays_a_share_and_is_per_class():
    label = torch.tensor([0, 0, 1, 1])
    boxes = Boxes(label, label, torch.zeros(4, 2, dtype=torch.long), (8, 8), (2, 2))
    coverage = np.array([0.3, 0.6, 0.3, 0.6])
    remaining, following = filter_coverage(boxes, coverage, np.array([0.5, 0.1]), 0, published=False)
    assert remaining.counts == (1, 2)
    assert remaining.label.tolist() == [0, 1, 1]
    assert following == pytest.approx([0.494, 0.104])
    assert filter_coverage(boxes, coverage, np.array([0.0, 1.0]), 0, published=True)[1] == pytest.approx([0.016, 0.996])
    assert filter_coverage(boxes, coverage, np.array([1.0, 0.0]), 0, published=True)[1][0] <= 1


# side of patches


@pytest.mark.parametrize(
    ("image", "factors", "expected"),
    [
        ((256, 256), (16, 16), 64),
        ((512, 512), (16, 16), 128),
        ((96, 96), (16, 16), 32),
        ((64, 64), (16, 16), 32),
        ((16, 16), (16, 16), 16),
        ((256, 192), (16, 16), 48),
        ((80, 112, 112), (16, 16, 16), 32),
        ((16, 16, 16), (2, 2, 2), 16),
        ((10, 192, 192), (1, 32, 32), 64),
    ],
)
def test_default_side(image, factors, expected):
    assert fitting_patch(None, image, factors, one_voxel=True) == expected


def test_a_side_that_does_not_fit_is_refused():
    assert fitting_patch(48, (96, 96), (16, 16), one_voxel=True) == 48
    with pytest.raises(ConfigError, match=r"method.patch_size is 40, .* multiples of 16.* choose 32"):
        fitting_patch(40, (96, 96), (16, 16), one_voxel=True)
    with pytest.raises(ConfigError, match=r"method.patch_size is 128, training images are 96 x 96; choose at most 96"):
        fitting_patch(128, (96, 96), (16, 16), one_voxel=True)
    assert fitting_patch(16, (96, 96), (16, 16), one_voxel=True) == 16
    with pytest.raises(ConfigError, match="at least 32; choose 32"):
        fitting_patch(16, (96, 96), (16, 16), one_voxel=False)


# contents


@pytest.mark.parametrize("dims", [2, 3])
def test_contents_are_the_images_inside_the_class_and_exactly_zero_outside(dims):
    labels = blobs(dims)
    images = 1 + torch.rand(3, 2, *labels.shape[1:], generator=rng())
    boxes, _ = class_boxes(labels, 3, 8)
    patches = crop(images, torch.from_numpy(labels), boxes)
    assert patches.shape == (len(boxes.label), 2, *(8,) * dims)
    for row, patch in enumerate(patches):
        inside = torch.from_numpy(cut(labels, boxes, row) == int(boxes.label[row]))
        assert torch.equal(patch, cut(images, boxes, row) * inside)
        assert not patch[:, ~inside].any()
        assert (patch[:, inside] >= 1).all()


@pytest.mark.parametrize("dims", [2, 3])
def test_means_over_boxes_agree_with_slicing_and_equal_contents_tie(dims):
    labels = blobs(dims)
    boxes, _ = class_boxes(labels, 3, 8)
    maps = torch.rand(3, 3, *labels.shape[1:], generator=rng())
    expected = [cut(maps, boxes, row)[int(label)].mean() for row, label in enumerate(boxes.label)]
    torch.testing.assert_close(box_means(maps, boxes), torch.stack(expected))
    tiled = torch.rand(1, 1, *(8,) * dims, generator=rng()).repeat(3, 3, *(3,) * dims)
    grid = class_boxes(np.zeros_like(labels), 3, 8)[0]
    assert len(box_means(tiled, grid).unique()) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_means_do_not_depend_on_the_memory_layout(layout):
    labels = blobs(2)
    boxes, _ = class_boxes(labels, 3, 8)
    maps = torch.rand(3, 3, 24, 24, generator=rng())
    assert torch.equal(box_means(maps.to(memory_format=layout), boxes), box_means(maps, boxes))


# selection


def test_the_best_of_each_class_are_taken_and_ties_in_order():
    scores = torch.tensor([0.5, 0.9, 0.9, 0.1, 0.2, 0.7, 0.7, 0.7])
    index, counts = select(scores, (4, 0, 1, 3), (2, 2, 2, 2), weighted=False, generator=rng())
    assert index.tolist() == [1, 2, 4, 5, 6]
    assert counts == [2, 0, 1, 2]
    index, counts = select(scores, (4, 0, 1, 3), (3, 0, 0, 1), weighted=False, generator=rng())
    assert index.tolist() == [1, 2, 0, 5]
    assert counts == [3, 0, 0, 1]


def test_a_weighted_draw_takes_each_patch_as_often_as_its_weight_says():
    scores = torch.tensor([0.209531, 0.824244])
    generator = rng()
    first = sum(select(scores, (2,), (1,), weighted=True, generator=generator)[0][0].item() == 0 for _ in range(2000))
    assert first / 2000 == pytest.approx(0.202686, abs=0.03)


def test_a_weighted_draw_is_without_replacement_and_takes_a_score_of_zero_last():
    scores = torch.tensor([0.0, 0.5, 0.5, 0.5])
    generator = rng()
    draws = [select(scores, (4,), (3,), weighted=True, generator=generator)[0].tolist() for _ in range(200)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert sum(0 in draw for draw in draws) < 10


def test_resampling_draws_without_replacement_or_takes_all_and_repeats():
    index = resample((5, 0, 2), 4, generator=rng())
    many, few = index.split(4)
    assert len(set(many.tolist())) == 4
    assert set(many.tolist()) <= set(range(5))
    assert set(few[:2].tolist()) == {5, 6}
    assert set(few[2:].tolist()) <= {5, 6}


@pytest.mark.parametrize(("present", "expected"), [(3, 43), (4, 32)])
def test_views_of_a_budget_of_128(present, expected):
    number = -(-128 // present)
    assert number == expected
    assert len(resample((50,) * present, number, generator=rng())) == expected * present


# augmentation


@pytest.mark.parametrize("dims", [2, 3])
def test_views_differ_from_their_patches_and_follow_the_generator(dims):
    patches = torch.rand(40, 2, *(8,) * dims, generator=rng())
    view, same, other = (augment(patches, generator=rng(seed)) for seed in (1, 1, 2))
    assert view.shape == patches.shape
    assert view.isfinite().all()
    assert torch.equal(view, same)
    assert not torch.equal(view, other)
    assert all(not torch.equal(a, b) for a, b in zip(view, patches, strict=True))


def test_views_are_mirrored_and_cropped_as_often_as_published(monkeypatch):
    monkeypatch.setattr("scantly.methods.parts.patch_views.apply_jitter", lambda x, params: x)
    monkeypatch.setattr("scantly.methods.parts.patch_views.apply_noise", lambda x, params: x)
    patches = torch.arange(16.0).view(1, 1, 1, 16).expand(4000, 1, 16, 16).contiguous()
    views = augment(patches, generator=rng())
    rising = views[:, 0, 8, 12] > views[:, 0, 8, 4]
    assert (~rising).float().mean().item() == pytest.approx(0.7, abs=0.03)
    whole = torch.stack([(v == p).all() | (v == p.flip(-1)).all() for v, p in zip(views, patches, strict=True)])
    assert whole.float().mean().item() == pytest.approx(0.5, abs=0.03)
    # at most a fifth is cut off each side, and the rest stretched over the patch
    middle = views[:, 0, 4:12]
    assert middle.amax() <= 15
    step = (middle[..., 9] - middle[..., 6]).abs() / 3
    assert step.min() > 0.6 - 1e-4
    assert step.max() <= 1 + 1e-4


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_cropped_lies_inside_the_patch(dims, monkeypatch):
    monkeypatch.setattr("scantly.methods.parts.patch_views.apply_jitter", lambda x, params: x)
    monkeypatch.setattr("scantly.methods.parts.patch_views.apply_noise", lambda x, params: x)
    views = augment(torch.ones(300, 1, *(16,) * dims), generator=rng())
    inner = views[(..., *(slice(1, -1),) * dims)]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_intensity_changes_stay_within_the_published_factors(monkeypatch):
    monkeypatch.setattr("scantly.methods.parts.patch_views.apply_orthogonal", lambda x, params: x)
    monkeypatch.setattr("scantly.methods.parts.patch_views.apply_affine", lambda x, params: x)
    patches = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(3000, 1, 1, 1)
    views = augment(patches, generator=rng()).flatten(1)
    # each is a line a + b x plus noise of at most 0.05
    x = patches[0].flatten()
    slope = ((views - views.mean(1, keepdim=True)) * (x - x.mean())).sum(1) / (x - x.mean()).square().sum()
    assert slope.min() > 0.2
    assert slope.max() < 1.5**2 + 0.2
    residual = (views - views.mean(1, keepdim=True) - slope[:, None] * (x - x.mean())).std(1)
    assert residual.max() < 0.08
    # one, two or three of the changes, each count with probability 1/3: noise in 2/3 of the views
    assert (residual > 1e-5).float().mean().item() == pytest.approx(2 / 3, abs=0.04)
    assert (slope.sub(1).abs() > 0.03).float().mean() < 0.95


# batch norm and queues


def test_a_pass_without_statistics_normalizes_by_the_batch_and_changes_nothing():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    x = 5 + torch.randn(8, 1, 8, 8, generator=rng())
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with without_statistics(network):
        silent = network(x)
        network.eval()
        evaluated = network(x)
        network.train()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert torch.equal(silent, network(x))
    assert network[1].num_batches_tracked == 1  # and afterwards they are updated again
    assert not torch.equal(evaluated, silent)


def test_queues_never_exceed_their_capacity_and_keep_the_newest():
    queues = ClassQueues(3, 4096, 2)
    for step in range(100):
        queues.push([0, 2], torch.full((2 * 43, 2), float(step)))
    assert queues[0].values.shape == (4096, 2)
    assert queues[0].fill == queues[2].fill == 1
    assert queues[1].fill == 0
    assert queues.fill.item() == pytest.approx(2 / 3)
    assert queues[0].values.min() == 100 - 1 - 4096 // 43
    assert queues[0].values.max() == 99


@settings(max_examples=30)
@given(pushes=st.lists(st.integers(1, 12), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_statistics_follow_the_rows_that_are_held(pushes, seed):
    queues, generator = ClassQueues(2, 7, 3), rng(seed)
    for number in pushes:
        queues.push([1], torch.randn(number, 3, generator=generator))
    held = queues[1].values[queues[1].valid]
    means, covariances = queues.statistics([0, 1])
    torch.testing.assert_close(means[1], held.mean(0), rtol=0, atol=1e-6)
    if len(held) > 1:
        torch.testing.assert_close(covariances[1], torch.cov(held.T, correction=0), rtol=0, atol=1e-5)
    assert not means[0].any()
    assert not covariances[0].any()


def test_statistics_do_not_drift_and_stay_exact_under_autocast():
    queues, generator = ClassQueues(1, 64, 16), rng()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2000):
            queues.push([0], torch.nn.functional.normalize(torch.randn(43, 16, generator=generator), dim=1))
    exact = torch.cov(queues[0].values.double().T, correction=0).float()
    torch.testing.assert_close(queues.statistics([0])[1][0], exact, rtol=0, atol=1e-7)
    queues.push([0], torch.ones(64, 16) / 4)
    torch.testing.assert_close(queues.statistics([0])[1], torch.zeros(1, 16, 16), rtol=0, atol=1e-10)


def test_queues_give_statistics_and_keys_of_the_classes_asked_for():
    queues = ClassQueues(3, 5, 2)
    queues.push([0, 2], torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]))
    means, covariances = queues.statistics([2, 0])
    torch.testing.assert_close(means, torch.tensor([[-0.3, 0.9], [0.9, 0.3]]))
    expected = torch.tensor([[[0.09, 0.03], [0.03, 0.01]], [[0.01, -0.03], [-0.03, 0.09]]])
    torch.testing.assert_close(covariances, expected, rtol=0, atol=1e-7)
    values, groups, valid = queues.keys([2, 0])
    assert groups.tolist() == [0] * 5 + [1] * 5
    assert valid.tolist() == [True, True, False, False, False] * 2
    assert values[5:7].tolist() == queues[0].values[:2].tolist()
    assert not list(queues.parameters())
