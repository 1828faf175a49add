"""PLGCL: embeddings, queues, gradients, what is missing, and training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from plgcl_steps import CLASSES, STEPS, at, make, make_batch, train
from torch import nn

from scantly.errors import ConfigError
from scantly.methods.base import Stage, Task
from scantly.methods.parts.patch_contrast import embed
from scantly.methods.plgcl import PLGCL

# embeddings, queues, gradients


@pytest.mark.parametrize("dims", [2, 3])
def test_embeddings_are_of_unit_length_and_leave_running_statistics_alone(dims):
    method = make(dims)
    before = copy.deepcopy(method.student.state_dict())
    vectors = embed(method.student, method.contrast.head, torch.rand(5, 1, *(8,) * dims))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    assert vectors.shape == (5, 128)
    assert all(torch.equal(value, before[key]) for key, value in method.student.state_dict().items())


@pytest.mark.parametrize("dims", [2, 3])
def test_the_contrast_reaches_encoder_and_head_of_the_student_only(dims):
    method = make(dims)
    method.losses(make_batch(dims), at("warmup"))["contrast"].backward()

    def touched(module):
        return [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]

    assert any(touched(method.student.encoder))
    assert any(touched(method.contrast.head))
    assert not any(touched(method.student.decoder))
    assert not any(touched(method.student.head))
    assert all(p.grad is None for p in [*method.teacher.parameters(), *method.contrast.teacher_head.parameters()])
    assert not any(value.requires_grad for value in method.contrast.queues.buffers())


def test_consistency_reaches_the_student_only():
    method = make(contrast_weight=0.0)
    method.losses(make_batch(), at())["consistency"].backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_the_queues_take_the_teachers_views_of_every_class_before_the_loss():
    method = make(patch_budget=10)
    method.losses(make_batch(), at("warmup"))
    assert [method.contrast.queues[k].filled.item() for k in range(3)] == [4, 4, 4]  # ceil(10 / 3)
    logged = method.pop_logged()
    assert logged["bank_fill"].item() == pytest.approx(4 / 256)
    assert logged["positive_similarity"].abs() <= 1
    torch.testing.assert_close(method.contrast.queues[1].values[:4].norm(dim=1), torch.ones(4))


def test_the_teacher_embeds_what_the_queues_take_and_the_student_the_anchors(monkeypatch):
    calls = []

    def spy(network, head, patches):
        calls.append((network, head, embed(network, head, patches)))
        return calls[-1][2]

    monkeypatch.setattr("scantly.methods.parts.patch_contrast.embed", spy)
    method = make(patch_budget=10)
    contrast = method.contrast
    method.losses(make_batch(), at("warmup"))
    (teacher, teacher_head, views), (student, head, anchors) = calls
    assert (teacher is method.teacher, teacher_head is contrast.teacher_head) == (True, True)
    assert (student is method.student, head is contrast.head) == (True, True)
    assert (views.requires_grad, anchors.requires_grad) == (False, True)
    for label, expected in enumerate(views.split(4)):
        assert torch.equal(contrast.queues[label].values[:4], expected)


STAGE_WEIGHTS = {
    "warmup_temperature": 0.3,
    "temperature": 0.7,
    "warmup_covariance_weight": 2.0,
    "covariance_weight": 3.0,
    "warmup_negative_weight": 5.0,
    "negative_weight": 7.0,
}


@pytest.mark.parametrize(
    ("stage", "kind", "expected"),
    [
        ("warmup", "closed", {"temperature": 0.3, "covariance_weight": 2.0, "negative_weight": 5.0}),
        ("joint", "closed", {"temperature": 0.7, "covariance_weight": 3.0, "negative_weight": 7.0}),
        ("warmup", "discrete", {"temperature": 0.3}),
        ("joint", "discrete", {"temperature": 0.7}),
    ],
)
def test_the_weights_of_the_stage_reach_the_contrast(stage, kind, expected, monkeypatch):
    seen = []

    def spy(anchors, *_, valid=None, **weights):
        seen.append(weights)
        return anchors.sum()

    name = {"closed": "closed_form_contrast", "discrete": "discrete_contrast"}[kind]
    monkeypatch.setattr(f"scantly.methods.parts.patch_contrast.{name}", spy)
    make(contrast=kind, **STAGE_WEIGHTS).losses(make_batch(), at(stage))
    assert seen == [expected]


def test_a_strong_view_goes_to_the_student_and_the_weak_one_to_the_teacher():
    method, batch, seen = make(contrast_weight=0.0), make_batch(), {"student": [], "teacher": []}
    method.student.register_forward_hook(lambda module, args, output: seen["student"].append(args[0]))
    method.teacher.register_forward_hook(lambda module, args, output: seen["teacher"].append(args[0]))
    method.losses(batch, at(iteration=1))
    (weak,), (labeled, views) = seen["teacher"], seen["student"]
    assert torch.equal(weak, batch.unlabeled)
    assert torch.equal(labeled, batch.labeled)
    assert views.shape == batch.unlabeled.shape
    assert not torch.equal(views, batch.unlabeled)


def test_strong_views_and_patches_leave_the_students_statistics_alone():
    method, batch = make(), make_batch()
    alone = copy.deepcopy(method.student)
    method.losses(batch, at())
    alone(batch.labeled)
    norms = [m for m in method.student.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    expected = [m for m in alone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    for norm, other in zip(norms, expected, strict=True):
        torch.testing.assert_close(norm.running_mean, other.running_mean)
        torch.testing.assert_close(norm.running_var, other.running_var)


def test_the_discrete_contrast_trains_too():
    method = make(contrast="discrete", ema_rampup=False)
    history = train(method, make_batch(), method.stages()[0], STEPS)
    assert history[-1]["contrast"] < history[0]["contrast"]
    assert all(math.isfinite(term) for step in history for term in step.values())


def test_without_its_contrast_the_term_is_absent_and_nothing_is_embedded(monkeypatch):
    method = make(contrast_weight=0.0)
    monkeypatch.setattr("scantly.methods.parts.patch_contrast.embed", lambda *_: pytest.fail("embedded"))
    monkeypatch.setattr("scantly.methods.parts.patch_contrast.HostCopy", lambda *_: pytest.fail("copied"))
    assert list(method.losses(make_batch(), at())) == ["supervised", "consistency"]
    assert not any(p.requires_grad for p in method.contrast.head.parameters())


# what is missing


def test_one_class_alone_gives_no_contrast_but_is_remembered_and_counted():
    method = make()
    terms = method.losses(make_batch(labels=(0, 0), unlabeled=0), at("warmup"))
    assert terms["contrast"] == 0
    terms["contrast"].backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.contrast.head.parameters())
    assert method.contrast.contrast_empty == method.pop_logged()["contrast_empty"] == 1
    assert method.contrast.queues[0].filled == 128
    assert method.contrast.queues[1].filled == 0
    method.losses(make_batch(unlabeled=0), at("warmup"))
    assert method.contrast.contrast_empty == 1


@pytest.mark.parametrize("contrast", ["closed", "discrete"])
def test_an_absent_class_is_skipped_whatever_its_queue_holds(contrast):
    found = []
    for overwritten in (False, True):
        method = make(patch_budget=4, contrast=contrast)
        method.losses(make_batch(), at("warmup"))
        queues = method.contrast.queues
        if overwritten:
            queues.push([2], nn.functional.one_hot(torch.arange(300) % 2, 128).float())
        before = queues[2].values.clone()
        terms = method.losses(make_batch(labels=(1, 1), seed=1), at("warmup"))
        assert method.pop_logged()["patches/b"] == 0
        assert torch.equal(queues[2].values, before)
        assert method.contrast.contrast_empty == 0
        found.append(terms["contrast"].item())
    assert math.isfinite(found[0])
    assert found[0] == found[1]


def test_a_single_labeled_image_and_a_single_foreground_class():
    method = make(classes=("background", "a"))
    batch = make_batch(rows=1, unlabeled=1, labels=(1, 1))
    for stage in method.stages():
        history = train(method, batch, stage, 3)
        assert all(math.isfinite(term) for step in history for term in step.values())
    assert method.contrast.contrast_empty == 0


def test_without_unlabeled_images_the_consistency_is_zero_and_counted():
    method = make()
    terms = method.losses(make_batch(unlabeled=0), at("joint"))
    assert terms["consistency"] == 0
    assert terms["consistency"].requires_grad
    assert method.consistency_empty == 1


# training


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dims", [2, 3])
def test_both_stages_learn_and_stay_finite(dims, bf16):
    method = make(dims, patch_size=8, optimizer="recipe", ema_rampup=False)
    batch = make_batch(dims)
    for stage in method.stages():
        history = train(method, batch, stage, STEPS, bf16=bf16)
        assert all(math.isfinite(term) for step in history for term in step.values())
        assert sum(history[-1].values()) < sum(history[0].values())
    assert all(value.isfinite().all() for value in method.state_dict().values())


def test_embeddings_of_the_classes_part_in_the_warm_up():
    method = make(patch_size=8)
    train(method, make_batch(), method.stages()[0], 30)
    logged = method.pop_logged()
    assert logged["positive_similarity"] > logged["negative_similarity"] + 0.2


@pytest.mark.parametrize("network", ["unet3d", "vnet"])
def test_other_networks(network):
    method = make(network=network)
    history = train(method, make_batch(), Stage("joint"), 2)
    assert all(math.isfinite(term) for term in history[-1].values())


def test_a_saved_method_goes_on_the_same():
    method, batch = make(coverage_filter="repaired"), make_batch()
    train(method, batch, method.stages()[1], 3)
    other = make(coverage_filter="repaired")
    other.load_state_dict(method.state_dict(), strict=True)
    other.generator.set_state(method.generator.get_state())
    for one, two in zip(*(each.losses(batch, at()).values() for each in (method, other)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("buffers", ["student", "predicting"])
def test_the_teachers_statistics(buffers):
    method = make(teacher_buffers=buffers, ema_decay=0.9)
    train(method, make_batch(), Stage("joint"), 3)
    norms = [
        [m.running_mean for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for network in (method.student, method.teacher)
    ]
    equal = [torch.equal(ours, theirs) for ours, theirs in zip(*norms, strict=True)]
    assert all(equal) if buffers == "student" else not any(equal)


def test_clean_passes_see_the_images_of_the_stage():
    method, batch, seen = make(teacher_buffers="predicting", predict_with="teacher"), make_batch(), []
    method.teacher.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    method.losses(batch, at("warmup"))
    assert [torch.equal(images, batch.labeled) for images in seen] == [True]
    method.losses(batch, at("joint"))
    assert [torch.equal(images, batch.unlabeled) for images in seen[1:]] == [True, True]
    method.losses(batch, at("joint", 1))
    assert len(seen) == 4  # every other iteration


def test_at_the_published_constant_decay_the_teacher_keeps_its_start():
    method = make(ema_rampup=False)
    start = [p.clone() for p in method.teacher.parameters()]
    train(method, make_batch(), Stage("joint"), 1)
    for before, after, student in zip(start, method.teacher.parameters(), method.student.parameters(), strict=True):
        torch.testing.assert_close(after, 0.999 * before + 0.001 * student)


def test_the_ramp_of_the_decay_copies_the_student_first():
    method = make(ema_rampup=True)
    train(method, make_batch(), Stage("joint"), 1)
    for ours, theirs in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(method.contrast.head.parameters(), method.contrast.teacher_head.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_supervised_loss_is_cross_entropy_alone_unless_asked_for():
    batch = make_batch()
    values = {}
    for kind in ("ce", "ce_dice"):
        method = make(supervised=kind, contrast_weight=0.0)
        values[kind] = method.losses(batch, at("warmup"))["supervised"].item()
        with torch.no_grad():
            logits = make().student(batch.labeled)
        if kind == "ce":
            expected = nn.functional.cross_entropy(logits, batch.labels).item()
            assert values[kind] == pytest.approx(expected, rel=1e-5)
    assert values["ce"] != pytest.approx(values["ce_dice"])


def test_who_predicts():
    assert (method := make()).predictor is method.student
    assert (method := make(predict_with="teacher")).predictor is method.teacher


def test_networks_and_patches_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="gives logits only"):
        PLGCL(Task(1, CLASSES, 2, (32, 32), "AttentionUnet", {"channels": [4, 8], "strides": [2]}), PLGCL.Config())
    with pytest.raises(ConfigError, match="at least 4; choose 4"):
        make(network="unet3d", patch_size=2)
