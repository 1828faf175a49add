import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scantly.errors import ConfigError
from scantly.losses import unit
from scantly.methods.base import Task
from scantly.methods.parts import arco_contrast
from scantly.methods.parts.arco_contrast import ContrastConfig, Seen, VoxelContrast
from scantly.methods.parts.arco_instance import (
    CropPooling,
    GlobalHead,
    InstanceConfig,
    InstanceDiscrimination,
    LocalHead,
    crop_geometry,
    instance_terms,
)
from scantly.methods.parts.arco_sets import (
    class_sets,
    complement_negatives,
    rank_bounds,
    rank_negatives,
    released_negatives,
)
from scantly.methods.parts.samplers import grid_order


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def task(classes=3, dims=2, side=16):
    return Task(1, tuple(f"class{c}" for c in range(classes)), dims, (side,) * dims)


# Crops


def test_numbers_of_crops_of_the_paper():
    assert math.prod(crop_geometry((256, 256), 64, 32)[2]) == 49
    assert crop_geometry((256, 256), None, None) == ((64, 64), (32, 32), (7, 7))
    assert math.prod(crop_geometry((80, 112, 112), 20, 10)[2]) == 700
    assert crop_geometry((80, 112, 112), None, None) == ((20, 20, 20), (10, 10, 10), (7, 10, 10))


def test_crops_of_small_and_flat_patches_stay_inside():
    assert crop_geometry((16, 16, 16), None, None) == ((4, 4, 4), (2, 2, 2), (7, 7, 7))
    assert crop_geometry((8, 128, 128), None, None)[0] == (8, 23, 23)


def test_a_crop_larger_than_the_patch_is_refused():
    with pytest.raises(ConfigError, match=r"method.crop_size is 20, and the patch is 16 x 32; choose at most 16\."):
        crop_geometry((16, 32), 20, None)


@pytest.mark.parametrize(
    ("size", "crop", "stride"),
    [((20, 17), 9, 4), ((24, 24), None, None), ((11, 11), 5, 3), ((9, 12, 10), 6, 3), ((8, 10, 12), 9 - 1, 2)],
)
def test_crops_are_pooled_as_one_by_one(size, crop, stride):
    pooling = CropPooling(size, crop, stride)
    sides, steps, counts = crop_geometry(size, crop, stride)
    maps = torch.randn(2, 3, *size, generator=generator())
    pool = F.adaptive_avg_pool2d if len(size) == 2 else F.adaptive_avg_pool3d
    bins = tuple(min(8, side) for side in sides)
    expected = []
    for place in torch.cartesian_prod(*(torch.arange(count) for count in counts)):
        box = [slice(int(i) * step, int(i) * step + side) for i, step, side in zip(place, steps, sides, strict=True)]
        expected.append(pool(maps[(slice(None), slice(None), *box)], bins).flatten(2).transpose(1, 2))
    torch.testing.assert_close(pooling(maps), torch.stack(expected, dim=1))
    assert pooling(maps).shape == (2, pooling.crops, pooling.cells, 3)


def test_a_place_sees_the_voxels_of_its_own_crop_alone():
    head = LocalHead(2, CropPooling((16, 16), 8, 4), activation=True)
    logits = torch.randn(1, 2, 16, 16, generator=generator())
    changed = logits.clone()
    changed[..., 8:, 8:] += 1  # of the 3 x 3 places those at 0 do not reach to 8
    same = (head(logits) == head(changed)).flatten(2).all(2)[0].view(3, 3)
    assert same.tolist() == [[True, True, True], [True, False, False], [True, False, False]]


# Instance discrimination


def instance(places=5, length=6, queue=36, seed=0):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Linear(3, 3))
    return InstanceDiscrimination(head, nn.Linear(3, 3), places=places, length=length, queue_length=queue)


def test_instance_term_is_that_of_slow_loops():
    term = instance(queue=7)
    with torch.no_grad():
        term.teacher_head[0].weight.add_(0.3)
    seen, target = torch.randn(2, 4, 5, 2, 3, generator=generator())
    loss, agreement = term(seen, target, student_temperature=0.1, teacher_temperature=0.01)
    student, teacher = term.predictor(term.head(seen)), term.teacher_head(target)
    total, agree = 0.0, 0
    for image in range(4):
        for place in range(5):
            s, t = [], []
            for stored in term.queue.values[:, place]:
                s.append(F.cosine_similarity(student[image, place].flatten(), stored, dim=0) / 0.1)
                t.append(F.cosine_similarity(teacher[image, place].flatten(), stored, dim=0) / 0.01)
            log_s, log_t = torch.stack(s).log_softmax(0), torch.stack(t).log_softmax(0)
            total += float((log_t.exp() * (log_t - log_s)).sum().detach())
            agree += int(torch.stack(s).argmax() == torch.stack(t).argmax())
    assert loss.item() == pytest.approx(total / 20, rel=1e-4)
    assert agreement.item() == pytest.approx(agree / 20)


def test_the_queue_is_first_in_first_out_and_holds_unit_vectors():
    """36 places in a queue, 4 images a step: after 9 steps every one is replaced once."""
    term = instance()
    before, arrived = term.queue.values.clone(), []
    for step in range(9):
        target = torch.randn(4, 5, 2, 3, generator=generator(step))
        loss, _ = term(target, target, student_temperature=0.1, teacher_temperature=0.01)
        assert torch.equal(term.queue.values[4 * step :], before[4 * step :])
        loss.backward()
        arrived.append(unit(term.teacher_head(target).flatten(2)).detach())
        term.after_step(1.0)
    assert term.queue.pointer == 0
    torch.testing.assert_close(term.queue.values, torch.cat(arrived))
    torch.testing.assert_close(term.queue.values.norm(dim=-1), torch.ones(36, 5))
    assert not term.queue.values.requires_grad
    term(target[:1], target[:1], student_temperature=0.1, teacher_temperature=0.01)
    term.after_step(1.0)
    torch.testing.assert_close(term.queue.values[1:], torch.cat(arrived)[1:])  # the oldest left first


def test_gradient_reaches_head_and_predictor_not_the_teacher():
    term = instance()
    seen, target = torch.randn(2, 4, 5, 2, 3, generator=generator()).requires_grad_()
    term(seen, target, student_temperature=0.1, teacher_temperature=0.01)[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in [*term.head.parameters(), *term.predictor.parameters()])
    assert all(p.grad is None for p in term.teacher_head.parameters())


def test_the_teachers_head_is_a_copy_that_follows():
    term = instance()
    ours, theirs = term.head[0].weight, term.teacher_head[0].weight
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        ours.zero_()
        theirs.fill_(1.0)
    term.after_step(0.99)
    assert theirs.unique().tolist() == pytest.approx([0.99])
    term.after_step(0.99)
    assert theirs.unique().tolist() == pytest.approx([0.9801])


def test_heads_have_the_published_layers():
    linear = GlobalHead(256, 512, activation=False).projector
    assert [tuple(layer.weight.shape) for layer in linear] == [(256, 256), (512, 256)]
    assert len(GlobalHead(256, 512, activation=True).projector) == 3
    terms = instance_terms(InstanceConfig(), Task(1, tuple("abcd"), 2, (256, 256)), 256)
    assert terms["local"].queue.values.shape == (36, 49, 4 * 64)
    assert terms["global"].queue.values.shape == (36, 1, 512)
    assert [tuple(p.shape) for p in terms["local"].head.parameters()] == [(8, 4), (8,), (4, 8), (4,)]
    assert list(instance_terms(InstanceConfig(instance_local_weight=0), task(), 8)) == ["global"]


# Sets of voxels


def seen_voxels(classes, size=(6, 7), labeled=2, unlabeled=3, seed=0):
    g = generator(seed)
    labels = torch.randint(0, classes, (labeled + unlabeled, *size), generator=g)
    probs = (3 * torch.randn(labeled + unlabeled, classes, *size, generator=g)).softmax(1)
    flags = torch.rand(2, labeled + unlabeled, *size, generator=g) < 0.5
    flags[:, :labeled] = True
    return labels, probs, *flags


@pytest.mark.parametrize("classes", [2, 3, 4, 6])
@pytest.mark.parametrize("size", [(6, 7), (3, 4, 5)])
def test_sets_are_those_of_slow_loops(classes, size):
    labels, probs, certain, trusted = seen_voxels(classes, size)
    labels[3, 0] = -1
    uncertain = torch.rand(labels.shape, generator=generator(9)) < 0.5
    sets = class_sets(labels, certain, probs, anchor_probability=0.3)
    low, high = rank_bounds(classes, None, None)
    found = rank_negatives(sets, labels, probs, uncertain, 2, low=low, high=high, largest_probability=0.9)
    complement = complement_negatives(sets, trusted)
    voxels = labels[0].numel()
    for image in range(len(labels)):
        for voxel in range(voxels):
            at = image * voxels + voxel
            label, p = int(labels[image].flatten()[voxel]), probs[image].flatten(1)[:, voxel]
            order = sorted(range(classes), key=lambda c: -float(p[c]))
            for c in range(classes):
                valid = label == c and bool(certain[image].flatten()[voxel])
                assert sets.valid[c, at] == valid
                assert sets.anchors[c, at] == (valid and bool(p[c] > 0.3))
                trust = bool(trusted[image].flatten()[voxel])
                assert complement[c, at] == (label not in (c, -1) and trust)
                rank = order.index(c)
                confused = low <= rank < high and bool(uncertain[image].flatten()[voxel])
                admitted = (rank < low if image < 2 else confused) and bool(p[c] < 0.9)
                assert found[c, at] == (label not in (c, -1) and admitted)


@pytest.mark.parametrize("classes", [3, 4, 6])
def test_the_released_bank_holds_unlabeled_voxels_of_the_class_itself(classes):
    labels, probs, certain, _ = seen_voxels(classes)
    labels[3, 0] = -1
    uncertain = torch.rand(labels.shape, generator=generator(9)) < 0.5
    sets = class_sets(labels, certain, probs, anchor_probability=0.3)
    found = released_negatives(sets, labels, probs, uncertain, 2, low=3, high=20, largest_probability=0.9)
    voxels, hits = labels[0].numel(), 0
    for image in range(len(labels)):
        for voxel in range(voxels):
            label, p = int(labels[image].flatten()[voxel]), probs[image].flatten(1)[:, voxel]
            order = sorted(range(classes), key=lambda c: -float(p[c]))
            for c in range(classes):
                unsure = bool(uncertain[image].flatten()[voxel])
                expected = image >= 2 and label == c and order.index(c) >= 3 and unsure and bool(p[c] < 0.9)
                assert found[c, image * voxels + voxel] == expected
                hits += expected
    assert (hits > 0) == (classes > 3)


@pytest.mark.parametrize("dims", [2, 3])
def test_with_the_released_bank_anchors_are_repelled_by_its_first_vector(dims):
    """With two classes nothing enters the bank: of zeros in 2D, where -log(e^(s/t) / (e^(s/t) + m)) is left."""
    config = ContrastConfig(anchors=8, negatives_per_anchor=16, negatives="released")
    whole = Task(1, ("background", "a"), dims, (8,) * dims)
    torch.manual_seed(0)
    module = VoxelContrast(config, whole, 5)
    g, size = generator(), (8,) * dims
    labels = torch.randint(0, 2, (3, *size), generator=g)
    probs = torch.rand(3, 2, *size, generator=g).softmax(1)
    teacher, student = torch.randn(2, 3, 5, *size, generator=g)
    seen = Seen(labels, torch.ones_like(labels, dtype=torch.bool), probs[1:], probs, teacher)

    def features_at(index):
        return student.movedim(1, -1).flatten(0, -2)[index]

    term, watched = module(features_at, seen, 0.2, g)
    assert [bank.filled.item() for bank in module.banks] == [1, 1]
    assert watched["contrast_classes"] == 2
    assert all((bank.values[0].abs().sum() == 0) == (dims == 2) for bank in module.banks)
    if dims == 2:
        assert watched["negative_similarity"] == 0
    assert term.item() > 0


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
def test_negatives_never_have_the_label_of_their_class(classes):
    labels, probs, certain, trusted = seen_voxels(classes)
    sets = class_sets(labels, certain, probs, anchor_probability=0.3)
    low, high = rank_bounds(classes, None, None)
    everywhere = torch.ones_like(certain)
    ranked = rank_negatives(sets, labels, probs, everywhere, 2, low=low, high=high, largest_probability=0.97)
    for negatives in (complement_negatives(sets, trusted), ranked):
        assert negatives.any()
        for c in range(classes):
            assert not (labels.flatten()[negatives[c]] == c).any()


def test_two_classes_have_unlabeled_negatives_in_rank_mode():
    """With the published ranks, 3 to 20, they cannot."""
    labels, probs, certain, _ = seen_voxels(2, labeled=0)
    sets = class_sets(labels, certain, probs, anchor_probability=0.3)
    everywhere = torch.ones_like(certain)
    counts = [
        int(rank_negatives(sets, labels, probs, everywhere, 0, low=a, high=b, largest_probability=0.97).sum())
        for a, b in (rank_bounds(2, None, None), rank_bounds(2, 3, 20))
    ]
    assert counts[0] > 0
    assert counts[1] == 0


# The contrast


def images(classes, dims=2, side=8, labeled=1, unlabeled=2, channels=5, seed=0):
    """Certain predictions; the features of a voxel are those of its class, of any length."""
    g = generator(seed)
    labels = torch.randint(0, classes, (labeled + unlabeled, *(side,) * dims), generator=g)
    one_hot = F.one_hot(labels, classes).movedim(-1, 1).float()
    probs = 0.9 * one_hot + 0.1 / classes
    centers = torch.randn(2, classes, channels, generator=g)
    length = 0.5 + torch.rand(labels.shape, generator=g)[..., None]
    student, teacher = (each[labels] * length for each in centers)
    return labels, Seen(labels, labels >= 0, probs[labeled:], probs, teacher.movedim(-1, 1)), student, centers


def contrast(classes, seen, student, dims=2, **settings):
    config = ContrastConfig(anchors=8, negatives_per_anchor=16, **settings)
    flat = student.flatten(0, -2)
    module = VoxelContrast(config, task(classes, dims), student.shape[-1])
    return module(lambda index: flat[index], seen, 0.5, generator())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("sampler", ["naive", "sg", "sag"])
def test_contrast_of_voxels_that_are_alike_within_their_class(sampler, dims):
    """Two classes: every positive is the own center, every negative the other one, whatever is drawn."""
    _, seen, student, (mine, yours) = images(2, dims)
    loss, watched = contrast(2, seen, student, dims, sampler=sampler)
    expected = 0.0
    for c in range(2):
        near, far = (F.cosine_similarity(mine[c], yours[k], dim=0) for k in (c, 1 - c))
        logits = torch.stack([near, *[far] * 16]) / 0.5
        expected += float(logits.logsumexp(0) - logits[0]) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert watched["contrast_classes"] == 2
    assert watched["anchors"].tolist() == (seen.labels.flatten() == torch.arange(2)[:, None]).sum(1).tolist()


def test_contrast_is_that_of_slow_loops(monkeypatch):
    labels, seen, student, _ = images(3)
    noise = torch.randn(seen.teacher_features.shape, generator=generator(5))
    probs = seen.teacher_probs.clone()
    probs[..., :3] = torch.tensor([0.2, 0.2, 0.6]).view(3, 1, 1)  # no anchors of class 0 and 1, but in prototypes
    seen = Seen(labels, seen.trusted, seen.probs, probs, seen.teacher_features + noise)
    student = student + torch.randn(student.shape, generator=generator(6))
    drawn = []

    def spy(*args, **kwargs):
        drawn.append(original(*args, **kwargs)[0])
        return drawn[-1], args[1].sum(1)

    original = arco_contrast.sample
    monkeypatch.setattr(arco_contrast, "sample", spy)
    loss, watched = contrast(3, seen, student)
    rows, mine = seen.teacher_features.movedim(1, -1).flatten(0, -2), student.flatten(0, -2)
    flat, total, positive = labels.flatten(), 0.0, 0.0
    for c in range(3):
        prototype = rows[flat == c].mean(0)
        for anchor, places in zip(drawn[0][c], drawn[1][c].view(8, 16), strict=True):
            assert flat[anchor] == c and probs.movedim(1, -1).flatten(0, -2)[anchor, c] > 0.3
            assert (flat[places] != c).all()
            scores = [F.cosine_similarity(mine[anchor], other, dim=0) for other in (prototype, *rows[places])]
            logits = torch.stack(scores) / 0.5
            total += float(logits.logsumexp(0) - logits[0]) / 8 / 3
            positive += float(scores[0]) / 8 / 3
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert watched["positive_similarity"].item() == pytest.approx(positive, rel=1e-4)


@pytest.mark.parametrize("negatives", ["complement", "rank"])
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_an_absent_class_leaves_the_loss_of_the_others(absent, negatives):
    _, seen, student, _ = images(2)
    there = [c for c in range(3) if c != absent]
    labels = torch.tensor(there)[seen.labels]

    def spread(probs):
        wider = torch.full((len(probs), 3, *probs.shape[2:]), 1e-4)
        wider[:, there] = probs
        return wider

    wider = Seen(labels, seen.trusted, spread(seen.probs), spread(seen.teacher_probs), seen.teacher_features)
    settings = {"negatives": negatives} | ({"rank_low": 1, "rank_high": 2} if negatives == "rank" else {})
    loss, watched = contrast(3, wider, student, **settings)
    others, alone = contrast(2, seen, student, **settings)
    assert watched["contrast_classes"] == alone["contrast_classes"] > 0
    assert watched["anchors"][absent] == 0
    assert loss.item() == pytest.approx(others.item(), rel=1e-5)


@pytest.mark.parametrize("negatives", ["complement", "rank"])
def test_a_single_class_costs_exactly_nothing_and_can_be_differentiated(negatives):
    _, seen, student, _ = images(3)
    one = Seen(torch.ones_like(seen.labels), *(getattr(seen, name) for name in list(vars(seen))[1:]))
    student = student.requires_grad_()
    loss, watched = contrast(3, one, student, negatives=negatives)
    loss.backward()
    assert loss.item() == 0
    assert watched["contrast_classes"] == 0
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_one_class_with_certain_voxels_is_not_enough_even_if_there_are_negatives():
    _, seen, student, _ = images(2, labeled=0)
    probs = torch.where((seen.labels == 1)[:, None], 0.5, seen.probs)  # class 1 is uncertain everywhere
    one = Seen(seen.labels, seen.trusted, probs, seen.teacher_probs, seen.teacher_features)
    config = ContrastConfig(anchors=8, negatives_per_anchor=16)
    flat = student.flatten(0, -2)
    loss, watched = VoxelContrast(config, task(2), 5)(lambda index: flat[index], one, 0.1, generator())
    assert watched["anchors"][0] > 0 and watched["negatives"][0] > 0 and watched["anchors"][1] == 0
    assert loss.item() == 0 and watched["contrast_classes"] == 0


def test_gradient_reaches_the_drawn_anchors_alone(monkeypatch):
    labels, seen, student, _ = images(3)
    drawn = []
    original = arco_contrast.sample

    def spy(*args, **kwargs):
        drawn.append(original(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(arco_contrast, "sample", spy)
    student = (student + torch.randn(student.shape, generator=generator(3))).requires_grad_()
    others = [each.clone().requires_grad_() for each in (seen.probs, seen.teacher_probs, seen.teacher_features)]
    contrast(3, Seen(labels, seen.trusted, *others), student)[0].backward()
    touched = student.grad.flatten(0, -2).abs().sum(1) > 0
    anchors = torch.zeros_like(touched).index_fill(0, drawn[0][0].flatten(), True)
    assert torch.equal(touched, anchors)
    assert [each.grad for each in others] == [None] * 3


@pytest.mark.parametrize("negatives", ["complement", "rank"])
@pytest.mark.parametrize("ordering", ["grid", "scan"])
@pytest.mark.parametrize("sampler", ["naive", "sg", "sag"])
@pytest.mark.parametrize("dims", [2, 3])
def test_anchors_and_negatives_are_drawn_as_the_settings_say(dims, sampler, ordering, negatives, monkeypatch):
    _, seen, student, _ = images(3, dims)
    calls = []

    def record(name):
        original = getattr(arco_contrast, name)

        def spy(kind, sets, draws, groups, source, *, order=None, permute=False):
            calls.append((name, kind, draws, groups, permute, order))
            given = {} if order is None else {"order": order}
            return original(kind, sets, draws, groups, source, permute=permute, **given)

        monkeypatch.setattr(arco_contrast, name, spy)

    record("sample")
    record("draw_ranks")
    contrast(3, seen, student, dims, sampler=sampler, ordering=ordering, negatives=negatives, groups_per_axis=3)
    source = {"complement": "sample", "rank": "draw_ranks"}[negatives]
    assert [call[:5] for call in calls] == [
        ("sample", sampler, 8, 3**dims, False),
        (source, sampler, 8 * 16, 3**dims, True),
    ]
    expected = grid_order(3, (8,) * dims, 3, torch.device("cpu"))
    for name, *_, order in calls:
        if ordering == "grid" and name == "sample":
            assert torch.equal(order, expected)
        else:
            assert order is None


@pytest.mark.parametrize("share", [0.2, 0.05])
def test_confusions_are_sought_where_the_student_is_uncertain(share, monkeypatch):
    labels, seen, student, _ = images(3, unlabeled=3)
    probs = torch.randn(seen.probs.shape, generator=generator(4)).softmax(1)
    labels[2, :2] = -1  # an ignored voxel is none of those whose quantile it is
    given = {}
    original = arco_contrast.rank_negatives

    def spy(*args, **kwargs):
        given.update(uncertain=args[3], labeled=args[4], **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(arco_contrast, "rank_negatives", spy)
    config = ContrastConfig(anchors=8, negatives_per_anchor=16, negatives="rank", negative_probability=0.6)
    flat = student.flatten(0, -2)
    seen = Seen(labels, seen.trusted, probs, seen.teacher_probs, seen.teacher_features)
    VoxelContrast(config, task(3), 5)(lambda index: flat[index], seen, share, generator())
    h = -(probs * probs.log()).sum(1)
    limit = torch.quantile(h[labels[1:] >= 0], 1 - share)
    assert torch.equal(given["uncertain"][1:], h >= limit)
    assert given["uncertain"][:1].all()
    assert (given["labeled"], given["low"], given["high"], given["largest_probability"]) == (1, 2, 3, 0.6)


@pytest.mark.parametrize(
    ("classes", "low", "high"), [(2, 2, None), (2, 0, None), (3, 3, 20), (4, None, 3), (4, None, 2), (8, 8, 9)]
)
def test_ranks_that_no_class_has_are_refused_in_rank_mode_alone(classes, low, high):
    given = {"rank_low": low, "rank_high": high}
    bounds = rank_bounds(classes, low, high)
    message = (
        rf"method\.rank_low is {bounds[0]} and method\.rank_high {bounds[1]}, and with {classes} classes .* must hold; "
        r"change them or leave both out\.$"
    )
    with pytest.raises(ConfigError, match=message):
        VoxelContrast(ContrastConfig(negatives="rank", **given), task(classes), 5)
    assert not VoxelContrast(ContrastConfig(**given), task(classes), 5).banks


@pytest.mark.parametrize(("classes", "low", "high"), [(2, None, None), (3, None, None), (21, None, None), (8, 7, 20)])
def test_ranks_that_classes_have_are_taken(classes, low, high):
    module = VoxelContrast(ContrastConfig(negatives="rank", rank_low=low, rank_high=high), task(classes), 5)
    assert len(module.banks) == classes


def test_unlabeled_voxels_of_high_entropy_are_no_anchors():
    labels, seen, student, _ = images(2, labeled=0, unlabeled=2)
    probs = seen.probs.clone()
    probs[1] = 0.5
    _, watched = contrast(2, Seen(labels, seen.trusted, probs, seen.teacher_probs, seen.teacher_features), student)
    assert watched["anchors"].tolist() == [int((labels[0] == c).sum()) for c in range(2)]


def test_the_bank_of_confusions_fills_and_keeps_unit_vectors():
    _, seen, student, _ = images(3, labeled=2)
    config = ContrastConfig(anchors=8, negatives_per_anchor=4, negatives="rank", bank_size=50, bank_size_background=70)
    module = VoxelContrast(config, task(3), student.shape[-1])
    flat = student.flatten(0, -2)
    assert [len(bank.values) for bank in module.banks] == [70, 50, 50]
    for _ in range(4):
        loss, watched = module(lambda index: flat[index], seen, 0.5, generator())
    assert loss.isfinite() and loss > 0
    for bank, count in zip(module.banks, watched["negatives"], strict=True):
        assert bank.filled == count > 0
        torch.testing.assert_close(bank.values[bank.valid].norm(dim=1), torch.ones(int(bank.filled)))
