"""PLGCL: worked numbers, stages, and what guides the contrast."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from plgcl_steps import CLASSES, Fixed, at, make, make_batch, train
from torch import nn

from scantly.losses.patch_contrastive import binary_entropy
from scantly.methods.parts.ema import update_teacher
from scantly.methods.parts.patch_contrast import Guide
from scantly.methods.parts.patch_views import crop
from scantly.methods.parts.patches import Boxes
from scantly.methods.plgcl import PLGCL
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

# worked numbers


def test_the_total_of_the_worked_terms(monkeypatch):
    """Sup 0.6, Reg 0.2, PLGCL 1.1 (each the mean over its images or anchors), beta 4 and gamma 0.5: 1.95."""
    method = make()
    supervised, consistency = torch.tensor([0.5, 0.7]), torch.tensor([0.2, 0.1, 0.3])
    anchors = torch.tensor([1.0, 1.2, 0.8, 1.0, 1.5])
    monkeypatch.setattr(method, "_supervised", lambda logits, labels: supervised.mean())
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, targets: consistency.mean())
    monkeypatch.setattr(method.contrast, "loss", lambda *arguments: anchors.mean())
    terms = method.losses(make_batch(), at())
    assert {name: round(value.item(), 6) for name, value in terms.items()} == {
        "supervised": 0.6,
        "consistency": 0.8,
        "contrast": 0.55,
    }
    assert sum(terms.values()).item() == pytest.approx(1.95)


def test_positive_and_negative_score_of_the_worked_anchor():
    """Temperature 0.2, covariance weight 4, w = 2: pos 5.0, neg 3.0, loss 0.739545; mean of the four 1.550770.

    ``exp(loss + f.mu / tau) = exp(pos) + w exp(neg)``, so two values of w give both scores.
    """
    a, b = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[0.0, 1.0], [-0.6, 0.8]])
    vectors = torch.cat([nn.functional.pad(each, (0, 126)) for each in (a, b)])
    label = torch.tensor([0, 0, 1, 1])

    def loss(w, rows):
        method = make(classes=("background", "a"), warmup_negative_weight=2 * w)
        method.contrast.queues.push([0, 1], vectors)
        counts = tuple(int((label[rows] == k).sum()) for k in range(2))
        boxes = Boxes(label[rows], label[rows], torch.zeros(len(label[rows]), 2).long(), (4, 4), counts)
        return method.contrast._compare(vectors[rows], boxes, joint=False).item()

    # b2 mirrors a1, so both have the loss of a1
    first = {w: loss(w, [0, 3]) for w in (2.0, 4.0)}
    assert first[2.0] == pytest.approx(0.739545, abs=2e-5)
    total = {w: math.exp(each + 0.9 / 0.2) for w, each in first.items()}
    negative = (total[4.0] - total[2.0]) / 2
    assert math.log(negative) == pytest.approx(3.0, abs=1e-3)
    assert math.log(total[2.0] - 2 * negative) == pytest.approx(5.0, abs=1e-3)
    assert loss(2.0, [0, 1, 2, 3]) == pytest.approx(1.550770, abs=2e-5)


def test_consistency_is_the_mean_over_unlabeled_images():
    method, batch = make(contrast_weight=0.0, strong={"p_jitter": 0.0, "p_blur": 0.0}).eval(), make_batch(unlabeled=3)
    ours = method.losses(batch, at())["consistency"].item()
    with torch.no_grad():
        logits = method.student(batch.unlabeled)
        expected = -(method.teacher(batch.unlabeled).softmax(1) * logits.log_softmax(1)).sum(1).mean().item()
    assert ours == pytest.approx(4 * expected, rel=1e-5)


@pytest.mark.parametrize(("hard", "expected"), [(False, 0.828631), (True, 0.510826)])
def test_consistency_of_the_worked_probabilities(hard, expected):
    method = make(hard_targets=hard, contrast_weight=0.0)
    method.student, method.teacher = Fixed([0.6, 0.3, 0.1]), Fixed([0.7, 0.2, 0.1])
    terms = method.losses(make_batch(), at())
    assert terms["consistency"].item() / 4 == pytest.approx(expected, abs=1e-6)


def test_the_teacher_after_one_and_two_updates():
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.zeros_(teacher.weight)
    nn.init.ones_(student.weight)
    seen = []
    for _ in range(2):
        update_teacher(teacher, student, PLGCL.Config().ema_decay)
        seen.append(teacher.weight.item())
    assert seen == pytest.approx([0.001, 0.001999], abs=1e-7)


def test_the_learning_rate_of_the_joint_stage():
    method = make()
    handles = TrainingHandles(method, method.stages()[1], TrainingSection(), 200)
    rates = {}
    for epoch in (0, 50, 100, 200):
        handles.set_iteration(epoch + (epoch > 0))  # the engine's step t runs at the rate of t - 1
        rates[epoch] = handles.rates()["main"]
    assert rates == pytest.approx({0: 0.007, 50: 0.00398125, 100: 0.001825, 200: 0.0001})


def test_the_optimizers_of_both_stages():
    method = make()
    warmup, joint = method.stages()
    adam = TrainingHandles(method, warmup, TrainingSection(weight_decay=0.1), 100)._optimizers["main"]
    sgd = TrainingHandles(method, joint, TrainingSection(weight_decay=0.1), 100)._optimizers["main"]
    assert isinstance(adam, torch.optim.Adam)
    assert isinstance(sgd, torch.optim.SGD)
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["weight_decay"]) == (1e-3, 0)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["weight_decay"]) == (0, 0)
    recipe = TrainingHandles(make(optimizer="recipe"), joint, TrainingSection(lr=0.3), 100)
    assert recipe.rates() == {"main": 0.3}


def test_published_settings_are_the_defaults():
    config = PLGCL.Config()
    assert (config.consistency_weight, config.contrast_weight, config.patch_budget, config.queue) == (4, 0.5, 128, 4096)
    assert (config.warmup_temperature, config.warmup_covariance_weight) == (0.2, 4)
    assert (config.temperature, config.covariance_weight) == (1, 10)
    assert config.warmup_negative_weight == config.negative_weight == 4096


# stages


def test_the_stages_and_the_ablation_without_warm_up():
    warmup, joint = make().stages()
    assert (warmup.name, warmup.unlabeled.count, joint.name, joint.unlabeled.count) == ("warmup", 0, "joint", None)
    assert warmup.share == pytest.approx(joint.share / 2)
    (only,) = make(warmup_share=0.0).stages()
    assert (only.name, only.share) == ("joint", 1)


def test_the_warm_up_uses_labels_only():
    method = make()
    method.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher predicts nothing in the warm-up"))
    terms = method.losses(make_batch(unlabeled=0), at("warmup"))
    assert list(terms) == ["supervised", "contrast"]


def test_every_patch_is_an_anchor_in_the_warm_up_and_few_per_class_in_the_joint_stage():
    method = make(patch_size=4, patch_budget=6)
    batch = make_batch()
    method.losses(batch, at("warmup"))
    all_of_them = method.pop_logged()["patches/background"]
    method.teacher = Fixed([0.8, 0.1, 0.1])
    method.teacher.encode = make().teacher.encode
    method.teacher.widths = (4, 8)
    method.losses(batch, at("joint"))
    assert all_of_them > 2
    assert method.pop_logged()["patches/background"] == 2


# guidance


def guide(batch, probs, joint=True):
    labels = torch.cat([batch.labels, probs[len(batch.labels) :].argmax(1)])
    return Guide(batch.images, labels, probs, len(batch.labels), joint)


def one_hot(labels):
    return nn.functional.one_hot(labels, 3).movedim(-1, 1).float()


def spied_scores(method, monkeypatch):
    """The boxes and scores of the step's selection."""
    seen = {}
    original = method.contrast._scores

    def scores(boxes, *rest):
        seen["boxes"], seen["scores"] = boxes, original(boxes, *rest)
        return seen["scores"]

    monkeypatch.setattr(method.contrast, "_scores", scores)
    return seen


def test_pseudo_labels_are_the_teachers_in_evaluation_mode():
    method = make(teacher_buffers="student")
    batch, modes = make_batch(), []
    method.teacher.register_forward_hook(lambda module, *_: modes.append(module.training))
    drawn = method._guide(batch, joint=True)
    assert modes == [False]
    assert method.teacher.training
    expected = copy.deepcopy(method.teacher).eval()(batch.unlabeled).softmax(1)
    torch.testing.assert_close(drawn.probs[2:], expected)
    assert torch.equal(drawn.labels[2:], expected.argmax(1))
    assert torch.equal(drawn.labels[:2], batch.labels)
    assert torch.equal(drawn.probs[:2].argmax(1), batch.labels)


def test_the_student_can_label_the_patches_while_the_teacher_stays_the_target():
    method = make(pseudo_labels_by="student")
    method.student, method.teacher = Fixed([0.1, 0.1, 0.8]), Fixed([0.8, 0.1, 0.1])
    drawn = method._guide(make_batch(), joint=True)
    assert (drawn.labels[2:] == 2).all()
    torch.testing.assert_close(drawn.probs[2:, 0], torch.full((2, 16, 16), 0.8))


def test_the_patches_of_least_entropy_are_taken_and_labeled_ones_first(monkeypatch):
    method = make(patch_size=4, patch_budget=9)
    batch, seen = make_batch(), spied_scores(method, monkeypatch)
    unlabeled = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).add(0.1)
    probs = torch.cat([one_hot(batch.labels), unlabeled / unlabeled.sum(1, keepdim=True)])
    drawn = guide(batch, probs)
    boxes = method.contrast._boxes(method.contrast.copy(drawn), drawn)
    selected = method.contrast._selected(boxes, 3, method.teacher, drawn, method.generator)
    for k in range(3):
        scores, images = seen["scores"][boxes.label == k], boxes.image[boxes.label == k]
        # independent: the mean entropy by slicing
        for score, image, start in zip(scores, images, boxes.start[boxes.label == k], strict=True):
            i, j = start.tolist()
            expected = 1 - binary_entropy(probs[image, k, i : i + 4, j : j + 4]).mean()
            assert score.item() == pytest.approx(expected.item(), abs=1e-6)
        assert set(scores[images < 2].tolist()) == {max(scores.tolist())}
        chosen = selected.image[selected.label == k]
        if (images < 2).sum() >= 3:
            assert chosen.tolist() == images[:3].tolist()
    assert max(selected.counts) <= 3


@pytest.mark.parametrize("metric", ["entropy", "confidence", "cosine", "random"])
@pytest.mark.parametrize("sampling", ["lowest", "weighted"])
def test_every_metric_and_sampling_trains(metric, sampling, monkeypatch):
    method = make(patch_size=4, patch_budget=6, sampling_metric=metric, sampling=sampling)
    seen = spied_scores(method, monkeypatch)
    batch = make_batch()
    method.losses(batch, at("warmup"))
    train(method, batch, method.stages()[1], 2)
    assert (seen["scores"] >= 0).all()
    assert (seen["scores"] <= 1).all()
    logged = method.pop_logged()
    assert logged["score_of_accepted_patches"].isfinite()
    if sampling == "lowest":
        assert logged["score_of_accepted_patches"] >= logged["score_of_patches"] - 1e-6


def test_confidence_is_the_mean_probability_and_cosine_the_likeness_to_the_queues_mean(monkeypatch):
    batch = make_batch()
    probs = torch.cat([one_hot(batch.labels), torch.full((2, 3, 16, 16), 0.1)])
    probs[2:, 1] = 0.8
    drawn = guide(batch, probs)
    method = make(patch_size=4, sampling_metric="confidence")
    boxes = method.contrast._boxes(method.contrast.copy(drawn), drawn)
    scores = method.contrast._scores(boxes, method.teacher, drawn, method.generator)
    torch.testing.assert_close(scores[boxes.image >= 2], torch.full_like(scores[boxes.image >= 2], 0.8))

    method = make(patch_size=4, sampling_metric="cosine")
    monkeypatch.setattr(
        "scantly.methods.parts.patch_contrast.embed",
        lambda network, head, patches: nn.functional.one_hot(torch.zeros(len(patches)).long(), 128).float(),
    )
    method.contrast.queues.push([0], nn.functional.one_hot(torch.tensor([0, 0]), 128).float())
    method.contrast.queues.push([1], -nn.functional.one_hot(torch.tensor([0, 0]), 128).float())
    scores = method.contrast._scores(boxes, method.teacher, drawn, method.generator)
    expected = torch.tensor([1.0, 0.0, 0.5])[boxes.label]  # like, opposite, and an empty queue
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("candidates", "budget", "sizes"),
    [
        (2, 8, [2]),
        (8, 8, [8]),
        (9, 8, [5, 4]),
        (17, 8, [6, 6, 5]),
        (3, 2, [3]),
        (5, 2, [3, 2]),
        (4, 3, [2, 2]),
    ],
)
def test_cosine_embeds_the_candidates_in_passes_of_at_most_the_budget(candidates, budget, sizes, monkeypatch):
    method = make(patch_size=4, patch_budget=budget, sampling_metric="cosine")
    seen = []

    def spy(network, head, patches):
        assert (network, head) == (method.teacher, method.contrast.teacher_head)
        seen.append(len(patches))
        return patches.mean((1, 2, 3))[:, None] * nn.functional.one_hot(torch.tensor([0]), 128)

    monkeypatch.setattr("scantly.methods.parts.patch_contrast.embed", spy)
    for k, sign in enumerate((1, -1, 1)):
        method.contrast.queues.push([k], sign * nn.functional.one_hot(torch.tensor([0, 0]), 128).float())
    images = torch.arange(candidates).view(-1, 1, 1, 1).expand(-1, 1, 16, 16) / candidates
    label = torch.arange(candidates) * 3 // candidates
    rows = torch.arange(candidates)
    counts = tuple(int((label == k).sum()) for k in range(3))
    boxes = Boxes(label, rows, torch.zeros(candidates, 2).long(), (4, 4), counts)
    maps = label[:, None, None].expand(-1, 16, 16)
    scores = method.contrast._scores(
        boxes, method.teacher, Guide(images, maps, one_hot(maps), candidates, True), method.generator
    )
    assert seen == sizes
    sign = torch.tensor([1.0, -1.0, 1.0])[label]
    torch.testing.assert_close(scores, (1 + sign * rows / candidates) / 2)  # each candidate has its own


def test_no_pass_of_cosine_is_of_one_class_where_there_are_more(monkeypatch):
    method = make(patch_size=4, patch_budget=8, sampling_metric="cosine")
    seen = []

    def spy(boxes):
        seen.append(set(boxes.label.tolist()))

    original = crop
    monkeypatch.setattr(
        "scantly.methods.parts.patch_contrast.crop",
        lambda images, labels, boxes: spy(boxes) or original(images, labels, boxes),
    )
    batch = make_batch()
    drawn = guide(batch, one_hot(torch.cat([batch.labels, batch.labels])))
    boxes = method.contrast._boxes(method.contrast.copy(drawn), drawn)
    method.contrast._scores(boxes, method.teacher, drawn, method.generator)
    assert len(seen) > 3
    assert all(each == {0, 1, 2} for each in seen)


def test_a_single_candidate_has_half_a_score_and_trains():
    method = make(patch_size=16, sampling_metric="cosine")
    batch = make_batch(rows=1, unlabeled=0, labels=(0, 0))
    terms = method.losses(batch, at("joint"))
    logged = method.pop_logged()
    assert logged["patches/background"] == 1
    assert logged["score_of_patches"] == logged["score_of_accepted_patches"] == 0.5
    assert terms["contrast"] == 0
    assert method.contrast.queues[0].filled == 128


def test_entropy_of_intensities_is_taken_inside_the_class(monkeypatch):
    method = make(patch_size=4, entropy_source="intensity")
    batch = make_batch()
    probs = torch.cat([one_hot(batch.labels), one_hot(batch.labels)])
    drawn = guide(batch, probs)
    boxes = method.contrast._boxes(method.contrast.copy(drawn), drawn)
    scores = method.contrast._scores(boxes, method.teacher, drawn, method.generator)
    row = int((boxes.label == 1).nonzero()[0])
    image, (i, j) = batch.images[int(boxes.image[row]), 0], boxes.start[row].tolist()
    unit = (image - image.min()) / (image.max() - image.min())
    inside = (unit * (drawn.labels[int(boxes.image[row])] == 1))[i : i + 4, j : j + 4]
    assert scores[row].item() == pytest.approx(1 - binary_entropy(inside).mean().item(), abs=1e-5)


def test_the_coverage_filter_moves_its_thresholds_in_the_joint_stage_only():
    method = make(patch_size=4, coverage_filter="repaired")
    batch = make_batch()
    method.losses(batch, at("warmup"))
    assert (method.contrast.coverage == 0.5).all()
    method.losses(batch, at("joint"))
    assert method.contrast.coverage_updates == 1


@pytest.mark.parametrize(
    ("rule", "kept", "thresholds"),
    [("repaired", [16, 8, 8], [0.404, 0.516, 0.516]), ("published", [16, 0, 0], [0.596, 0.564, 0.564])],
)
def test_the_coverage_of_the_patches_moves_the_thresholds(rule, kept, thresholds):
    """Two images of 16 x 16 with two boxes of 6 x 6, patches of 4 x 4.

    Of the 32 of the background 16 are full and 16 cover 7/16; all of the 8 of each box are full. The thresholds move
    by 0.01 (0.8 * 32 - 16) = 0.096 and 0.01 (0.8 * 8 - 8) = -0.016, or where none is kept 0.01 * 0.8 * 8 = 0.064.
    """
    method = make(patch_size=4, patch_budget=128, coverage_filter=rule)
    method.losses(make_batch(unlabeled=0), at("joint"))
    assert method.contrast.coverage.tolist() == pytest.approx(thresholds, abs=1e-6)
    logged = method.pop_logged()
    assert [logged[f"patches/{name}"] for name in CLASSES] == kept


@pytest.mark.parametrize(("share", "kept"), [(0.5, 0.5), (0.25, 0.25), (1.0, 1.0)])
def test_a_budget_above_the_supply_still_selects_among_guessed_patches(share, kept, monkeypatch):
    """All patches of labeled images, and of the others the share of least entropy, whatever the budget."""
    method, batch = make(patch_size=4, patch_budget=3000, guessed_share=share), make_batch()
    taken, original = {}, method.contrast._selected

    def spy(boxes, number, teacher, guide, generator):
        selected = original(boxes, number, teacher, guide, generator)
        for name, part in (("before", boxes), ("after", selected)):
            taken[name] = [
                [int(((part.label == k) & ((part.image >= 2) == guessed)).sum()) for guessed in (False, True)]
                for k in range(3)
            ]
        return selected

    monkeypatch.setattr(method.contrast, "_selected", spy)
    method.teacher = Fixed([0.2, 0.7, 0.1])
    monkeypatch.setattr("scantly.methods.parts.patch_contrast.embed", lambda n, h, p: torch.ones(len(p), 128))
    method.losses(batch, at("joint"))
    logged = method.pop_logged()
    for k, name in enumerate(CLASSES):
        (given, guessed), (given_kept, guessed_kept) = taken["before"][k], taken["after"][k]
        assert given_kept == given
        assert guessed_kept == math.ceil(kept * guessed)
        assert logged[f"kept_patches/{name}"].item() == pytest.approx(
            (given_kept + guessed_kept) / max(given + guessed, 1)
        )
    assert sum(guessed for _, guessed in taken["before"]) > 3
