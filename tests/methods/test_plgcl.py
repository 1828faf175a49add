"""PLGCL: the worked numbers of its specification that concern the step, and what the step does."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from scantly.errors import ConfigError
from scantly.losses.patch_contrastive import binary_entropy
from scantly.methods.base import Batch, Progress, Stage, Task
from scantly.methods.parts.ema import update_teacher
from scantly.methods.parts.patch_contrast import Guide, embed
from scantly.methods.parts.patch_views import crop
from scantly.methods.parts.patches import Boxes
from scantly.methods.plgcl import PLGCL
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

CLASSES = ("background", "a", "b")
STEPS = 10


def task(dims=2, network="unet", size=16, classes=CLASSES):
    arguments = {"widths": [4, 8], **({"dropout": [0.0, 0.0]} if network == "unet" else {})}
    return Task(1, classes, dims, (size,) * dims, network, arguments)


def make(dims=2, network="unet", size=16, classes=CLASSES, **settings):
    torch.manual_seed(0)
    method = PLGCL(task(dims, network, size, classes), PLGCL.Config(**{"queue": 256, **settings})).train()
    method.generator.manual_seed(0)
    return method


def make_batch(dims=2, rows=2, unlabeled=2, size=16, labels=(1, 2), seed=0):
    """Two boxes of the given labels in each image, noise on top."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.zeros(rows + unlabeled, *(size,) * dims, dtype=torch.long)
    half = size // 2
    y[(slice(None), *(slice(1, half - 1),) * dims)] = labels[0]
    y[(slice(None), *(slice(half + 1, size - 1),) * dims)] = labels[1]
    x = y[:, None] / 2 + 0.1 * torch.randn(len(y), 1, *y.shape[1:], generator=generator)
    return Batch(x[:rows], y[:rows], x[rows:], x[:rows], y[:rows], x[rows:])


def at(stage="joint", iteration=0):
    return Progress(iteration, STEPS, stage, iteration, STEPS)


def train(method, batch, stage, steps, bf16=False):
    handles = TrainingHandles(method, stage, TrainingSection(lr=0.05), STEPS)
    history = []
    for iteration in range(steps):
        handles.set_iteration(iteration)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            terms = method.step(batch, at(stage.name, iteration), handles)
        method.after_step(at(stage.name, iteration))
        history.append({name: value.item() for name, value in terms.items()})
    return history


class Fixed(nn.Module):
    """The same probabilities everywhere."""

    def __init__(self, probs):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probs).log())

    def forward(self, images):
        shape = (1, -1, *[1] * (images.ndim - 2))
        return self.logits.view(shape).expand(len(images), -1, *images.shape[2:])


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
