import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly.losses import (
    contrastive,
    cosine_similarities,
    info_nce,
    label_propagation,
    nearest_neighbor_loss,
    sampled_similarities,
    similarity_divergence,
    unit,
)


def naive_info_nce(anchors, positive, negatives, temperature):
    """One anchor and one negative at a time, in double precision."""
    losses = []
    for anchor, keys in zip(anchors, negatives, strict=True):
        scores = [
            float(np.dot(anchor, key) / np.linalg.norm(anchor) / np.linalg.norm(key)) for key in [positive, *keys]
        ]
        weights = [math.exp(score / temperature) for score in scores]
        losses.append(-math.log(weights[0] / sum(weights)))
    return sum(losses) / len(losses)


def contrast(anchors, positive, negatives, temperature=0.5):
    anchors, positive, negatives = (
        torch.as_tensor(each, dtype=torch.float64) for each in (anchors, positive, negatives)
    )
    similar = cosine_similarities(anchors, unit(positive[None]))[:, 0]
    return info_nce(similar, cosine_similarities(anchors[:, None], unit(negatives))[:, 0], temperature=temperature)


def test_worked_number_of_the_contrast():
    assert contrast([[1.0, 0]], [1.0, 1], [[[0.0, 1], [-1, 0]]]).item() == pytest.approx(0.243745, abs=1e-6)


def test_worked_number_of_a_perfect_positive_among_512_orthogonal_negatives():
    loss = contrast([[1.0, 0]], [2.0, 0], [[[0.0, 1]] * 512])
    assert loss.item() == pytest.approx(math.log(math.exp(2) + 512) - 2, abs=1e-9)
    assert loss.item() == pytest.approx(4.252653, abs=1e-6)


@pytest.mark.parametrize("negatives", [1, 7, 512])
@pytest.mark.parametrize("similarity", [-1.0, 0.0, 0.3])
def test_equal_similarities_cost_the_logarithm_of_their_number(negatives, similarity):
    loss = info_nce(torch.full((3,), similarity), torch.full((3, negatives), similarity), temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + negatives), rel=1e-6)


def test_contrast_is_that_of_slow_loops():
    rng = np.random.default_rng(0)
    anchors, positive, negatives = rng.normal(size=(5, 6)), rng.normal(size=6), rng.normal(size=(5, 9, 6))
    assert contrast(anchors, positive, negatives).item() == pytest.approx(
        naive_info_nce(anchors, positive, negatives, 0.5), abs=1e-12
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), factors=st.tuples(*[st.floats(1e-3, 1e3)] * 3))
def test_contrast_does_not_see_the_length_of_a_vector(seed, factors):
    rng = np.random.default_rng(seed)
    anchors, positive, negatives = rng.normal(size=(3, 4)), rng.normal(size=4), rng.normal(size=(3, 5, 4))
    scaled = contrast(*(each * factor for each, factor in zip((anchors, positive, negatives), factors, strict=True)))
    assert scaled.item() == pytest.approx(contrast(anchors, positive, negatives).item(), abs=1e-9)


def test_a_zero_vector_is_similar_to_nothing_and_has_a_finite_gradient():
    vectors = torch.zeros(2, 4, requires_grad=True)
    similarities = cosine_similarities(vectors, unit(torch.ones(3, 4)))
    assert torch.equal(similarities, torch.zeros(2, 3))
    similarities.sum().backward()
    assert vectors.grad.isfinite().all()


def test_worked_numbers_of_the_instance_divergence():
    student, teacher = torch.tensor([[0.5, 0.1, -0.2]]), torch.tensor([[0.4, 0.3, 0.0]])
    expected = torch.tensor([[0.981135, 0.017970, 0.000895]])
    torch.testing.assert_close((student / 0.1).softmax(1), expected, atol=1e-6, rtol=0)
    target = (teacher / 0.01).softmax(1)[0]
    assert target.tolist() == pytest.approx([0.999955, 4.54e-5, 4.2e-18], rel=1e-2)
    loss = similarity_divergence(student, teacher, student_temperature=0.1, teacher_temperature=0.01)
    assert loss.item() == pytest.approx(0.018727, abs=1e-6)


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), ratio=st.floats(0.1, 10))
def test_divergence_is_at_least_zero_and_zero_where_the_logits_coincide(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.rand(2, 3, 4, 6, generator=generator, dtype=torch.float64)
    temperatures = {"student_temperature": 0.5, "teacher_temperature": 0.5 * ratio}
    assert similarity_divergence(student, teacher, **temperatures) >= 0
    assert similarity_divergence(student, student * ratio, **temperatures).item() == pytest.approx(0, abs=1e-12)


def test_divergence_teaches_the_student_alone():
    student, teacher = torch.rand(2, 3, 6).requires_grad_(), torch.rand(2, 3, 6).requires_grad_()
    similarity_divergence(student, teacher, student_temperature=0.1, teacher_temperature=0.01).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_worked_number_of_the_nearest_neighbors():
    teacher, student = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    pool = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    assert (2 - 2 * cosine_similarities(teacher, pool)).flatten().tolist() == pytest.approx([0, 2, 4])
    assert (2 - 2 * cosine_similarities(student, pool)).flatten().tolist() == pytest.approx([0.8, 0.4, 3.2])
    teacher, student = teacher.requires_grad_(), student.requires_grad_()
    loss = nearest_neighbor_loss(student, teacher, pool, neighbors=2)
    assert loss.item() == pytest.approx(0.6, abs=1e-6)
    loss.backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_the_teacher_chooses_the_neighbors():
    """The student is nearest to the second row; the distance to the teacher's choice, the first, counts."""
    pool = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    student, teacher = torch.tensor([[0.0, 3.0]]), torch.tensor([[5.0, 0.1]])
    assert nearest_neighbor_loss(student, teacher, pool, neighbors=1).item() == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_neighbors_are_those_of_slow_loops(dtype):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 4, 7, generator=generator, dtype=dtype)
    pool = unit(torch.randn(9, 7, generator=generator, dtype=dtype))
    total = 0.0
    for z, t in zip(student, teacher, strict=True):
        nearest = sorted(range(9), key=lambda k: float((unit(t) - pool[k]).square().sum()))[:3]
        total += sum(float((unit(z) - pool[k]).square().sum()) for k in nearest) / 3
    loss = nearest_neighbor_loss(student, teacher, pool, neighbors=3)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(total / 4, abs=1e-5)


def test_under_autocast_the_similarities_are_those_of_single_precision():
    generator = torch.Generator().manual_seed(0)
    vectors, units = torch.randn(5, 64, generator=generator), unit(torch.randn(7, 64, generator=generator))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cosine_similarities(vectors, units)
    assert torch.equal(mixed, cosine_similarities(vectors, units))
    assert cosine_similarities(vectors.bfloat16(), units).dtype == torch.float32


@pytest.mark.parametrize("block", [1, 2**20])
def test_similarities_with_drawn_rows_and_their_gradient_are_those_of_gathered_ones(block, monkeypatch):
    monkeypatch.setattr(contrastive, "_CPU_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    vectors, weights = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    units = unit(torch.randn(20, 6, generator=generator, dtype=torch.float64))
    index = torch.randint(20, (5, 6), generator=generator)
    gradients = []
    for similarities in (
        lambda v: sampled_similarities(v, units, index),
        lambda v: cosine_similarities(v[:, None], units[index])[:, 0],
    ):
        leaf = vectors.clone().requires_grad_()
        found = similarities(leaf)
        (weights * found).sum().backward()
        gradients.append((found.detach(), leaf.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_drawn_rows_under_autocast_are_those_of_single_precision():
    generator = torch.Generator().manual_seed(0)
    vectors, units = torch.randn(3, 64, generator=generator), unit(torch.randn(9, 64, generator=generator))
    index = torch.randint(9, (3, 4), generator=generator)
    grads = []
    for mixed in (False, True):
        leaf = vectors.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            found = sampled_similarities(leaf, units, index)
            found.square().sum().backward()
        grads.append((found.detach(), leaf.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_units_in_place():
    vectors = torch.randn(4, 5)
    expected, place = unit(vectors), vectors.data_ptr()
    found = unit(vectors, in_place=True)
    assert found.data_ptr() == place
    assert torch.equal(found, expected)


ANCHORS = torch.tensor([[[1.0, 0.0], [0.8, 0.6]]])
VOXELS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])


def propagation(anchors, candidates, used=(True,), *, positives=1, negatives=2, temperature=0.1, level="class"):
    return label_propagation(
        anchors,
        candidates,
        torch.tensor(used),
        positives=positives,
        negatives=negatives,
        temperature=temperature,
        level=level,
    )


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 0.063487), (0.5, 0.340029)])
def test_worked_numbers_of_label_propagation(temperature, expected):
    """Mean similarities 0.9, 0.78, 0.3, -0.9: the first voxel is pulled, the last two are pushed away."""
    assert cosine_similarities(ANCHORS, VOXELS)[0].mean(0).tolist() == pytest.approx([0.9, 0.78, 0.3, -0.9])
    loss, near, far = propagation(ANCHORS, VOXELS, temperature=temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert near.item() == pytest.approx(0.9)
    assert far.item() == pytest.approx((0.3 - 0.9) / 2)


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 0.013501), (0.5, 0.279619)])
def test_worked_numbers_of_ranking_by_each_anchor(temperature, expected):
    """The second anchor's similarities are 0.8, 0.96, 0.6, -0.8: it pulls the second voxel."""
    loss, near, far = propagation(ANCHORS, VOXELS, temperature=temperature, level="anchor")
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert near.item() == pytest.approx((1 + 0.96) / 2)
    assert far.item() == pytest.approx((0 - 1 + 0.6 - 0.8) / 4)


def slow_label_propagation(anchors, candidates, used, positives, negatives, temperature, level):
    """Class by class, anchor by anchor, positive by positive, in double precision."""
    losses = []
    for group, counts in zip(anchors.tolist(), used, strict=True):
        if not counts:
            continue
        table = [[sum(a * b for a, b in zip(anchor, voxel, strict=True)) for voxel in candidates.tolist()]
                 for anchor in group]  # fmt: skip
        means = [sum(column) / len(column) for column in zip(*table, strict=True)]
        for row in table:
            keys = means if level == "class" else row
            ranked = sorted(range(len(keys)), key=lambda j: -keys[j])
            far = sum(math.exp(row[j] / temperature) for j in ranked[len(ranked) - negatives :])
            for j in ranked[:positives]:
                near = math.exp(row[j] / temperature)
                losses.append(-math.log(near / (near + far)))
    return sum(losses) / len(losses) if losses else 0.0


@pytest.mark.parametrize("level", ["class", "anchor"])
@settings(max_examples=25)
@given(
    seed=st.integers(0, 1000),
    used=st.lists(st.booleans(), min_size=1, max_size=3),
    positives=st.integers(1, 4),
    negatives=st.integers(1, 5),
)
def test_label_propagation_is_that_of_slow_loops_in_any_order(level, seed, used, positives, negatives):
    generator = torch.Generator().manual_seed(seed)
    anchors = unit(torch.randn(len(used), 4, 6, generator=generator, dtype=torch.float64))
    candidates = unit(torch.randn(9, 6, generator=generator, dtype=torch.float64))
    options = {"positives": positives, "negatives": negatives, "temperature": 0.3, "level": level}
    loss, near, far = propagation(anchors, candidates, used, **options)
    expected = slow_label_propagation(anchors, candidates, used, positives, negatives, 0.3, level)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert far.item() <= near.item() + 1e-12
    order = torch.randperm(9, generator=generator)
    assert propagation(anchors, candidates[order], used, **options)[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("level", ["class", "anchor"])
def test_only_chosen_voxels_of_counted_classes_take_the_gradient(level):
    """The second class pulls and pushes others, but does not count."""
    anchors = torch.stack([ANCHORS[0], torch.tensor([[0.0, 1.0], [0.0, 1.0]])])
    voxels = VOXELS.clone().requires_grad_()
    loss = propagation(anchors, voxels, (True, False), negatives=1, level=level)[0]
    loss.backward()
    chosen = {"class": [True, False, False, True], "anchor": [True, True, False, True]}[level]
    assert voxels.grad.abs().sum(1).gt(0).tolist() == chosen
    assert loss.item() == pytest.approx(propagation(ANCHORS, VOXELS, negatives=1, level=level)[0].item())


def test_voxels_of_the_own_class_are_no_negatives():
    """The least similar voxel is of class 0 itself; with one negative left the loss is softplus((0 - 1) / 0.5)."""
    anchors = torch.tensor([[[1.0, 0.0]]])
    voxels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    others = torch.tensor([[False, True, False]])
    options = {"positives": 1, "negatives": 2, "temperature": 0.5}
    loss, near, far = label_propagation(anchors, voxels, torch.tensor([True]), allowed=others, **options)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)), abs=1e-6)
    assert (near.item(), far.item()) == (1.0, 0.0)


def test_a_class_without_a_negative_does_not_count():
    anchors = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    voxels = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], requires_grad=True)
    options = {"positives": 1, "negatives": 2, "temperature": 0.5}
    allowed = torch.tensor([[False, False, False], [True, False, True]])
    both = label_propagation(anchors, voxels, torch.tensor([True, True]), allowed=allowed, **options)
    alone = label_propagation(anchors[1:], voxels, torch.tensor([True]), allowed=allowed[1:], **options)
    for ours, expected in zip(both, alone, strict=True):
        torch.testing.assert_close(ours, expected)
    both[0].backward()
    assert torch.isfinite(voxels.grad).all()


def test_without_a_class_label_propagation_is_zero_and_so_is_its_gradient():
    voxels = VOXELS.clone().requires_grad_()
    loss, near, far = propagation(torch.zeros(2, 3, 2), voxels, (False, False))
    loss.backward()
    assert (loss.item(), near.item(), far.item()) == (0, 0, 0)
    assert torch.equal(voxels.grad, torch.zeros(4, 2))


def test_label_propagation_under_autocast_is_that_of_single_precision():
    generator = torch.Generator().manual_seed(0)
    anchors, voxels = unit(torch.randn(2, 8, 16, generator=generator)), torch.randn(40, 16, generator=generator)
    plain = propagation(anchors, unit(voxels), (True, True), positives=4, negatives=9)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = propagation(anchors, unit(voxels), (True, True), positives=4, negatives=9)[0]
    assert torch.equal(mixed, plain)


def test_opposite_voxels_at_a_small_temperature_stay_finite():
    loss = propagation(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[-1.0, 0.0]] * 4), temperature=1e-3)[0]
    assert loss.item() == pytest.approx(math.log(3), abs=1e-4)
    worst = propagation(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]]), VOXELS, temperature=1e-3, negatives=1)[0]
    assert worst.isfinite()
