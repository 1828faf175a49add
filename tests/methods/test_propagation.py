"""Contrastive label propagation: what enters the banks, what is drawn, and what the loss makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from scantly.errors import ConfigError
from scantly.losses import label_propagation, unit
from scantly.methods.base import Task
from scantly.methods.parts.propagation import LabelPropagation, PropagationConfig

CLASSES = ("background", "a", "b")
WIDTH = 16  # enough that no two voxels are embedded alike behind the rectifier
SMALL = {"queue": 32, "pushed": 8, "anchors": 4, "candidates": 40, "positives": 3, "negatives": 6, "embedding": 5}


def make(dims=2, classes=CLASSES, **settings):
    torch.manual_seed(0)
    task = Task(1, classes, dims, (8,) * dims)
    return LabelPropagation(PropagationConfig(**{**SMALL, **settings}), task, WIDTH).train()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(*size, rows=2, seed=0):
    return torch.randn(rows, WIDTH, *size, generator=generator(seed))


def labels(*size, rows=2, classes=3, seed=0):
    return torch.randint(classes, (rows, *size), generator=generator(seed))


def embedded(head, features):
    """Unit embeddings of all voxels by a head in evaluation mode, ``(voxels, D)``."""
    with torch.no_grad():
        return unit(copy.deepcopy(head).eval()(features).movedim(1, -1).flatten(0, -2))


def held(part, k):
    """What the bank of a class holds."""
    bank = part.banks[k]
    return bank.values[: int(bank.filled)]


def distances(these, those):
    return (these[:, None] - those).norm(dim=2)


def origins(part, k, vectors):
    """From which voxel each stored vector is."""
    apart = distances(held(part, k), vectors)
    assert (apart.min(1).values < 1e-5).all()
    return apart.argmin(1)


def fill(part, count=None, seed=0):
    """Random unit vectors in every bank."""
    for k, bank in enumerate(part.banks):
        rows = torch.randn(count or bank.capacity, bank.values.shape[1], generator=generator(seed + k))
        bank.push(unit(rows))
    return part


# the banks


@pytest.mark.parametrize("dims", [2, 3])
def test_stored_vectors_are_those_of_drawn_voxels_class_by_class(dims):
    part, features, y = make(dims), maps(*(6,) * dims), labels(*(6,) * dims)
    with torch.no_grad():
        part.head(features)  # so that its averages are not those it began with
    part.store(features, y, y, generator())
    everything = embedded(part.head, features)
    for k in range(3):
        assert int(part.banks[k].filled) == 8
        places = origins(part, k, everything)
        assert len(set(places.tolist())) == 8
        assert (y.flatten()[places] == k).all()
        torch.testing.assert_close(held(part, k).norm(dim=1), torch.ones(8))


def test_a_class_stores_no_more_voxels_than_there_are():
    part, y = make(), torch.zeros(2, 6, 6, dtype=torch.long)
    y[1, 2, :3] = 2
    part.store(maps(6, 6), y, y, generator())
    assert [int(bank.filled) for bank in part.banks] == [8, 0, 3]
    part.store(maps(2, 2), y[:, :2, :2], y[:, :2, :2], generator())
    assert [int(bank.filled) for bank in part.banks] == [16, 0, 3]  # 8 voxels in all, all of them background
    crowded = make(pushed=100)
    crowded.store(maps(6, 6), y, y, generator())
    assert [int(bank.filled) for bank in crowded.banks] == [32, 0, 3]


@pytest.mark.parametrize("correct_only", [True, False])
def test_only_voxels_that_are_predicted_correctly_are_stored_if_so_set(correct_only):
    part, features, y = make(correct_only=correct_only, pushed=72, queue=72), maps(6, 6), labels(6, 6)
    predicted = labels(6, 6, seed=1)
    part.store(features, y, predicted, generator())
    everything = embedded(part.head, features)
    for k in range(3):
        stored = set(origins(part, k, everything).tolist())
        wanted = (y == k) & (predicted == k) if correct_only else y == k
        assert stored == set(wanted.flatten().nonzero()[:, 0].tolist())


def test_after_three_vectors_more_than_a_queue_holds_the_three_oldest_are_gone():
    """One vector per class and step: every step has a feature of its own, the same everywhere."""
    part = make(queue=4, anchors=2, pushed=1)
    y = labels(4, 4, rows=1)
    steps = [torch.full((1, WIDTH, 4, 4), 0.0) + torch.randn(WIDTH, generator=generator(s))[:, None, None]
             for s in range(7)]  # fmt: skip
    for features in steps:
        part.store(features, y, y, generator())
    expected = torch.cat([embedded(part.head, features)[:1] for features in steps])
    for k in range(3):
        assert part.banks[k].fill == 1
        torch.testing.assert_close(part.banks[k].values, expected[[4, 5, 6, 3]])
        torch.testing.assert_close(part.banks[k].values.norm(dim=1), torch.ones(4))
    assert part.fill.item() == 1


def test_storing_leaves_the_head_as_it_was_and_keeps_no_gradient():
    part = make()
    before = copy.deepcopy(part.head.state_dict())
    features = maps(6, 6).requires_grad_()
    part.store(features, labels(6, 6), labels(6, 6), generator())
    assert all(module.training for module in part.head.modules())
    for name, value in part.head.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(bank.values.requires_grad for bank in part.banks)
    part.head.eval()
    part.store(features, labels(6, 6), labels(6, 6), generator())
    assert not any(module.training for module in part.head.modules())


@pytest.mark.parametrize(("dims", "size"), [(2, (8, 8)), (2, (9, 7)), (3, (4, 6, 5))])
def test_with_a_stride_boxes_are_averaged_and_take_the_label_of_their_first_voxel(dims, size):
    part, features, y = make(dims, proj_stride=2, pushed=100, queue=100), maps(*size), labels(*size)
    part.store(features, y, y, generator())
    pool = functional.avg_pool2d if dims == 2 else functional.avg_pool3d
    boxes = embedded(part.head, pool(features, 2))
    first = y[(slice(None), *(slice(0, side - side % 2, 2) for side in size))].flatten()
    assert len(first) == len(boxes)
    for k in range(3):
        assert sorted(origins(part, k, boxes).tolist()) == (first == k).nonzero()[:, 0].tolist()


def test_an_embedding_of_its_own_for_the_banks_stays_as_it_was_drawn():
    part, features, y = make(share_head=False), maps(6, 6), labels(6, 6)
    before = {name: value.clone() for name, value in part.bank_head.state_dict().items()}
    assert not any(p.requires_grad for p in part.bank_head.parameters())
    part.store(features, y, y, generator())
    origins(part, 0, embedded(part.bank_head, features))
    assert (distances(held(part, 0), embedded(part.head, features)).min(1).values > 1e-3).any()
    loss, _ = fill(part).loss(features.requires_grad_(), y, generator())
    loss.backward()
    assert all(p.grad is not None for p in part.head.parameters())
    assert all(p.grad is None for p in part.bank_head.parameters())
    for name, value in part.bank_head.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not hasattr(make(), "bank_head")


def test_the_banks_are_saved():
    part, other = fill(make(), 7), make()
    other.load_state_dict(part.state_dict())
    for bank, same in zip(part.banks, other.banks, strict=True):
        assert torch.equal(bank.values, same.values)
        assert int(same.filled) == 7


# the loss


@pytest.mark.parametrize("level", ["class", "anchor"])
@pytest.mark.parametrize("dims", [2, 3])
def test_with_all_stored_and_all_unlabeled_voxels_drawn_the_loss_is_known(dims, level):
    """The loss does not depend on the order of either, so that only the sets matter."""
    size = (4,) * dims
    part = fill(make(dims, queue=4, candidates=1000, pair_level=level))
    features = maps(*size)
    expected_head = copy.deepcopy(part.head)
    loss, watched = part.loss(features, labels(*size), generator())
    voxels = unit(expected_head(features).movedim(1, -1).flatten(0, -2))
    expected, near, far = label_propagation(
        torch.stack([bank.values for bank in part.banks]),
        voxels,
        torch.tensor([True] * 3),
        positives=3,
        negatives=6,
        temperature=0.1,
        level=level,
        allowed=labels(*size).flatten() != torch.arange(3)[:, None],
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert watched["positive_similarity"].item() == pytest.approx(near.item(), rel=1e-4)
    assert watched["negative_similarity"].item() == pytest.approx(far.item(), rel=1e-4)
    assert watched["contrast_classes"] == 3


def test_the_candidates_embedding_is_in_train_mode_and_learns_its_averages():
    part = fill(make())
    part.loss(maps(6, 6), labels(6, 6), generator())
    assert int(part.head[1].num_batches_tracked) == 1


def test_anchors_are_different_stored_vectors_of_their_class(monkeypatch):
    part, seen = fill(make(anchors=20), 25), []

    def spy(anchors, candidates, used, **options):
        seen.append((anchors, candidates, used))
        return label_propagation(anchors, candidates, used, **options)

    monkeypatch.setattr("scantly.methods.parts.propagation.label_propagation", spy)
    part.loss(maps(6, 6), labels(6, 6), generator())
    ((anchors, candidates, used),) = seen
    assert anchors.shape == (3, 20, 5)
    assert used.all()
    assert not anchors.requires_grad
    assert candidates.requires_grad
    for k in range(3):
        places = distances(anchors[k], held(part, k)).argmin(1)
        assert torch.equal(anchors[k], held(part, k)[places])
        assert len(set(places.tolist())) == 20
    assert len(candidates.unique(dim=0)) == 40


def test_a_class_with_one_vector_too_few_does_not_count():
    part = make(anchors=4, queue=8)
    for bank, count in zip(part.banks, (4, 3, 0), strict=True):
        if count:
            bank.push(unit(torch.randn(count, 5, generator=generator(count))))
    _, watched = part.loss(maps(6, 6), labels(6, 6), generator())
    assert watched["contrast_classes"] == 1
    alone = make(anchors=4, queue=8)
    alone.banks[0].push(part.banks[0].values[:4])
    assert part.loss(maps(6, 6), labels(6, 6), generator(3))[0] == alone.loss(maps(6, 6), labels(6, 6), generator(3))[0]


def test_with_empty_banks_the_loss_is_zero_and_all_gradients_are_finite():
    part, features = make(), maps(6, 6).requires_grad_()
    loss, watched = part.loss(features, labels(6, 6), generator())
    assert loss.item() == 0
    assert watched["contrast_classes"] == 0
    loss.backward()
    for gradient in (features.grad, *(p.grad for p in part.parameters())):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_gradient_reaches_features_and_embedding():
    part, features = fill(make()), maps(6, 6).requires_grad_()
    part.loss(features, labels(6, 6), generator())[0].backward()
    assert features.grad.abs().sum() > 0
    for name, parameter in part.head.named_parameters():
        assert name == "0.bias" or parameter.grad.abs().sum() > 0, name  # a bias before a normalization has no effect


def test_equal_generators_give_equal_losses_and_take_as_many_numbers_whatever_the_data():
    states = []
    for filled in (0, 4, 32):
        part, source = make(), generator()
        if filled:
            fill(part, filled)
        first = part.loss(maps(6, 6), labels(6, 6), source)[0]
        part.store(maps(6, 6), labels(6, 6, classes=filled % 3 + 1), labels(6, 6), source)
        states.append(source.get_state())
        again = make()
        again.load_state_dict({**part.state_dict(), **(fill(make(), filled) if filled else make()).state_dict()})
        assert again.loss(maps(6, 6), labels(6, 6), generator())[0] == first
    assert all(torch.equal(state, states[0]) for state in states)


# which voxels


def test_uniform_candidates_are_all_different_and_no_more_than_there_are():
    part, predicted = make(), torch.zeros(72, dtype=torch.long)
    drawn = part._candidates(predicted, generator())
    assert len(set(drawn.tolist())) == len(drawn) == 40
    few = part._candidates(predicted[:20], generator())
    assert sorted(few.tolist()) == list(range(20))


def test_uniform_candidates_are_drawn_over_the_whole_batch_equally_often():
    part, source, predicted = make(candidates=12), generator(), torch.zeros(48, dtype=torch.long)
    hits = sum(torch.bincount(part._candidates(predicted, source), minlength=48) for _ in range(800))
    assert (hits - 200).abs().max() < 5 * 200**0.5


@pytest.mark.parametrize(
    ("counts", "taken"),
    [
        ([500, 400, 100], [20, 20, 20]),
        ([500, 495, 5], [None, None, 5]),  # 15 more of the others, at random
        ([1000, 0, 0], [60, 0, 0]),
        ([10, 10, 1000], [10, 10, 40]),
        ([20, 20, 20], [20, 20, 20]),
        ([30, 10, 5], [30, 10, 5]),  # fewer voxels than candidates: all
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_stratified_candidates_are_as_many_of_each_class_filled_up_from_the_others(counts, taken, seed):
    part = make(candidates=60, candidate_sampling="stratified")
    predicted = torch.arange(3).repeat_interleave(torch.tensor(counts))
    predicted = predicted[torch.randperm(len(predicted), generator=generator(seed))]
    drawn = part._candidates(predicted, generator(seed))
    assert len(set(drawn.tolist())) == len(drawn) == min(60, sum(counts))
    found = torch.bincount(predicted[drawn], minlength=3).tolist()
    for number, wanted in zip(found, taken, strict=True):
        assert number == wanted if wanted is not None else number >= 20


def test_the_stratified_filling_is_uniform_over_what_is_left():
    part, source = make(candidates=60, candidate_sampling="stratified"), generator()
    predicted = torch.tensor([0] * 300 + [1] * 100)  # no voxel of the third class: 20 more of 360
    more = [int((predicted[part._candidates(predicted, source)] == 1).sum()) - 20 for _ in range(400)]
    assert sum(more) / 400 == pytest.approx(20 * 80 / 360, abs=0.5)


def test_strata_are_the_predicted_classes_of_the_boxes():
    predicted = torch.zeros(2, 8, 8, dtype=torch.long)
    predicted[:, ::2, ::2][:, :2, :2] = 2  # of 32 boxes 8, although of 128 voxels only 8
    part, seen = make(proj_stride=2, candidate_sampling="stratified", candidates=24), []
    original = part._candidates
    part._candidates = lambda flat, source: seen.append(flat) or original(flat, source)
    part.loss(maps(8, 8), predicted, generator())
    assert torch.bincount(seen[0], minlength=3).tolist() == [24, 0, 8]


# refusals


def test_settings_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"is 41, and only 40 candidates are drawn; raise method\.candidates"):
        make(positives=1, negatives=40)
    make(positives=1, negatives=39)
    with pytest.raises(ConfigError, match=r"method\.anchors is 33, and a queue holds 32"):
        make(anchors=33)


def test_too_few_voxels_are_refused():
    part = fill(make(positives=3, negatives=6))
    with pytest.raises(ConfigError, match=r"have 8 voxels at method\.proj_stride=1.*negatives = 9; lower these"):
        part.check(maps(2, 2))
    part.check(maps(1, 9, rows=1))
    part.loss(maps(1, 9, rows=1), labels(1, 9, rows=1), generator())


def test_boxes_larger_than_the_images_are_refused_in_words_before_anything_is_stored():
    """The first step stores, long before the contrast begins."""
    with pytest.raises(ConfigError, match="proj_stride"):
        make(proj_stride=16).store(maps(8, 8), labels(8, 8), labels(8, 8), generator())
