import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scantly.data.plan import Plan
from scantly.data.prepare import prepare, restore, restore_map
from scantly.imaging import Geometry, Image, grid
from scantly.inference.original import class_maps, label_on_original_grid, largest_components, most_probable
from scantly.inference.windows import entropy


def case(interpolation="linear", **values):
    """A scan that is turned, cropped and resampled, and probabilities of four classes in prepared space."""
    given = {
        "spatial_dims": 3,
        "normalization": [{"scheme": "zscore"}],
        "patch_size": (16, 16, 16),
        "labeled_batch_size": 1,
        "unlabeled_batch_size": 1,
        "interpolation": interpolation,
        "crop_fraction": 0.8,
        **values,
    }
    plan = Plan.model_validate(given)
    rng = np.random.default_rng(0)
    affine = grid((2.0, 1.0, 1.5)) @ np.diag([-1.0, 1.0, 1.0, 1.0])
    image = Image(rng.normal(size=(1, 12, 20, 17)).astype(np.float32), Geometry((12, 20, 17), affine))
    prepared, record = prepare(image, plan)
    probs = rng.dirichlet(np.ones(4), prepared.shape[1:]).astype(np.float32)
    return np.moveaxis(probs, -1, 0), record, plan


@pytest.mark.parametrize("values", [{"spacing": (1.5, 1.5, 1.5)}, {"size": (16, 16, 16)}, {}])
def test_class_by_class_equals_all_classes_at_once(values):
    probs, record, plan = case(**values)
    together = restore(probs, record, plan)
    assert together.shape == (4, 12, 20, 17)
    np.testing.assert_allclose(np.stack(list(class_maps(probs, record, plan))), together, atol=1e-6)
    np.testing.assert_array_equal(label_on_original_grid(probs, record, plan), together.argmax(0))
    np.testing.assert_allclose(entropy(class_maps(probs, record, plan)), entropy(together), atol=1e-5)


def test_logits_are_resampled_where_they_are_asked_for():
    """The most probable class is that of interpolated logits, whatever number is added to those of a voxel."""
    probs, record, plan = case(size=(16, 16, 16))
    by_probability = label_on_original_grid(probs, record, plan)
    by_logit = label_on_original_grid(probs, record, plan, resample="logits")
    logits = np.log(np.maximum(probs, np.finfo(np.float32).tiny))
    logits = logits + np.random.default_rng(1).normal(size=logits.shape[1:]).astype(np.float32)
    expected = np.stack([restore_map(each, record, plan, outside=0.0) for each in logits])[:, :, 2:18, 2:15].argmax(0)
    np.testing.assert_array_equal(by_logit[:, 2:18, 2:15], expected)
    assert (by_logit != by_probability).any()
    assert (by_logit[:, :2] == 0).all() and (by_logit[:, :, :2] == 0).all()  # outside the crop: background


def test_nearest_plans_take_the_class_first():
    probs, record, plan = case("nearest", size=(16, 16, 16))
    labels = label_on_original_grid(probs, record, plan)
    assert labels.dtype == np.uint8
    turned = np.unique(labels[:, 2:18, 2:15])
    assert set(turned) <= {0, 1, 2, 3} and len(turned) == 4


@given(hnp.arrays(np.float32, (5, 3, 4), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
def test_most_probable_is_argmax_with_the_first_of_equals(maps):
    labels = most_probable(iter(maps))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, maps.argmax(0))


def test_more_classes_than_a_byte_counts():
    maps = np.eye(300, dtype=np.float32)
    np.testing.assert_array_equal(most_probable(maps), np.arange(300))
    with pytest.raises(ValueError, match="no maps"):
        most_probable([])


def test_largest_component_by_hand():
    labels = np.zeros((3, 6, 6), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = labels[2, 2, 2] = 1  # one component: corners touch
    labels[0, 4, 4:6] = 1  # smaller
    labels[0, 2, 4] = 2
    labels[2, 4:6, 0] = 2  # larger
    kept = largest_components(labels)
    expected = np.zeros_like(labels)
    expected[0, 0, 0] = expected[1, 1, 1] = expected[2, 2, 2] = 1
    expected[2, 4:6, 0] = 2
    np.testing.assert_array_equal(kept, expected)
    assert labels[0, 4, 4] == 1
    assert not largest_components(np.zeros((2, 3, 3), np.uint8)).any()


def flood(mask):
    """Components by walking from voxel to voxel."""
    left, found = set(map(tuple, np.argwhere(mask))), []
    while left:
        reached, edge = set(), [min(left)]
        left.discard(edge[0])
        while edge:
            voxel = edge.pop()
            reached.add(voxel)
            near = {tuple(np.add(voxel, step) - 1) for step in np.ndindex(3, 3, 3)} & left
            left -= near
            edge += near
        found.append(reached)
    return found


@given(hnp.arrays(np.uint8, (3, 5, 5), elements=st.sampled_from([0, 0, 0, 0, 1, 2])))
def test_largest_component_equals_walking(labels):
    kept = largest_components(labels)
    for value in (1, 2):
        components = flood(labels == value)
        ours = set(map(tuple, np.argwhere(kept == value)))
        if not components:
            assert not ours
            continue
        assert ours in components
        assert len(ours) == max(map(len, components))
    again = largest_components(kept)
    np.testing.assert_array_equal(again, kept)
