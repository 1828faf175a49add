import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scantly.errors import ConfigError
from scantly.losses import unit
from scantly.methods import arco
from scantly.methods.arco import ARCO
from scantly.methods.base import Batch, Progress, Task
from scantly.networks import UNet, VNet
from scantly.networks.pyramid import PyramidHead
from scantly.settings import parse
from scantly.training.config import TrainingSection
from scantly.training.optimizers import learning_rate

ARGUMENTS = {"widths": [4, 8, 16]}
SMALL = {
    "dense_channels": 6,
    "anchors": 16,
    "negatives_per_anchor": 8,
    "queue_length": 8,
    "global_channels": 12,
    "nearest_neighbor_weight": 1.0,
}


def batch(dims=2, labeled=2, unlabeled=3, classes=3, seed=0):
    """Images whose classes can be read off the brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(classes, (labeled + unlabeled, *(4,) * dims), generator=generator)
    labels = F.interpolate(coarse[:, None].float(), size=(16,) * dims)[:, 0].long()
    images = labels[:, None] + 0.2 * torch.randn(labels[:, None].shape, generator=generator)
    x, u, y = images[:labeled], images[labeled:], labels[:labeled]
    return Batch(x, y, u, x, y, u)


def method(dims=2, classes=3, stage="contrast", network="unet", **settings):
    torch.manual_seed(0)
    task = Task(
        1,
        tuple("abcdefgh"[:classes]),
        dims,
        (16,) * dims,
        network,
        ARGUMENTS | ({"dropout": [0.0] * 3} if network == "unet" else {}),
    )
    made = ARCO(task, ARCO.Config(**{**SMALL, **settings})).train()
    made.generator.manual_seed(0)
    made.enter_stage(stage_of(made, stage), first=True)
    return made


def stage_of(made, name):
    return next(stage for stage in made.stages() if stage.name == name)


def train(made, stage, steps, data=None, lr=0.05, bf16=False):
    data = data or batch(made.task.spatial_dims)
    parameters = list(made.optimizers(stage_of(made, stage))["main"].parameters)
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    history = []
    for t in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
            terms = made.losses(data, Progress(t, steps, stage))
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        made.after_step(Progress(t, steps, stage))
        history.append({name: float(value.detach()) for name, value in terms.items()})
    return history


# Schedules


def test_the_share_of_low_entropy_falls_linearly_in_epochs():
    made = method(published_epochs=200)
    shares = {e: 100 * made.entropy_share(Progress(e * 150, 30_000)) for e in (0, 100, 199)}
    assert shares == pytest.approx({0: 20, 100: 10, 199: 0.1})
    assert made.entropy_share(Progress(30_000, 30_000)) == 0  # after the last step
    assert made.entropy_share(Progress(149, 30_000)) == made.entropy_share(Progress(0, 30_000))
    assert made.entropy_share(Progress(750, 1_500)) == pytest.approx(made.entropy_share(Progress(15_000, 30_000)))


def test_learning_rates_of_the_paper():
    """The engine sets them one step late, as the public code does."""
    settings, total = TrainingSection(lr=0.01, schedule="poly", power=0.9), 30_000
    rates = [0.01 * learning_rate("poly", t + 1, total, settings) for t in (0, total // 2, total - 1)]
    assert rates == pytest.approx([0.01, 0.00535887, 9.34525e-7], rel=1e-5)


def test_stages_and_what_they_train():
    made = method()
    assert [(stage.name, stage.share) for stage in made.stages()] == [("pretraining", 0.5), ("contrast", 0.5)]
    assert [stage.name for stage in method(pretraining_share=0).stages()] == ["contrast"]
    first, second = (made.optimizers(stage)["main"] for stage in made.stages())
    names = {id(p): name for name, p in made.named_parameters()}
    trained = [{names[id(p)].split(".")[0] for p in spec.parameters} for spec in (first, second)]
    assert trained == [{"student", "instance"}, {"student", "dense", "dense_predictor"}]
    assert (first.nesterov, second.nesterov) == (False, True)
    assert not any("teacher" in names[id(p)] for spec in (first, second) for p in spec.parameters)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("stage", ["pretraining", "contrast"])
def test_gradient_reaches_what_the_stage_trains_and_nothing_else(stage, dims):
    made = method(dims, stage=stage)
    terms = made.losses(batch(dims), Progress(0, 10, stage))
    sum(terms.values()).backward()
    trained = {id(p) for p in made.optimizers(stage_of(made, stage))["main"].parameters}
    for name, p in made.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (id(p) in trained), name
        # a bias before a normalization has no gradient but rounding
        assert p.grad is None or name.endswith("bias") or p.grad.abs().sum() > 0, name


# Teacher


@pytest.mark.parametrize(("settings", "decay"), [({}, 0.99), ({"ema_decay": 0.5}, 0.5)])
def test_the_teachers_average(settings, decay):
    made = method(**settings)
    heads = [(term.head, term.teacher_head) for term in made.instance.values()]
    for stage, pairs in {
        "pretraining": [(made.student, made.teacher), *heads],
        "contrast": [(made.student, made.teacher), (made.dense, made.teacher_dense)],
    }.items():
        with torch.no_grad():
            for student, teacher in pairs:
                for p, q in zip(student.parameters(), teacher.parameters(), strict=True):
                    p.zero_()
                    q.fill_(1.0)
        for expected in (decay, decay**2):
            made.after_step(Progress(0, 10, stage))
            for _, teacher in pairs:
                assert all(torch.allclose(q, torch.full_like(q, expected)) for q in teacher.parameters())


def test_the_second_stage_begins_with_the_student_as_teacher():
    made = method(stage="pretraining")
    train(made, "pretraining", 3)
    assert not all(torch.equal(p, q) for p, q in zip(made.student.parameters(), made.teacher.parameters(), strict=True))
    resumed = copy.deepcopy(made)
    resumed.enter_stage(stage_of(made, "contrast"), first=False)
    assert all(torch.equal(v, made.teacher.state_dict()[k]) for k, v in resumed.teacher.state_dict().items())
    made.enter_stage(stage_of(made, "contrast"), first=True)
    assert all(torch.equal(v, made.teacher.state_dict()[k]) for k, v in made.student.state_dict().items())
    assert all(torch.equal(p, q) for p, q in zip(made.dense.parameters(), made.teacher_dense.parameters(), strict=True))


def test_mode_and_statistics_of_the_teacher():
    own, students = method(), method(teacher_mode="eval")
    assert own.teacher.training
    assert not students.train().teacher.training and students.student.training
    for made, follows in ((own, False), (students, True)):
        train(made, "contrast", 2)
        pairs = list(zip(made.teacher.buffers(), made.student.buffers(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs) == follows


# Terms


def test_views_are_mixed_with_their_pseudo_labels_and_confidences():
    class Brightness(nn.Module):
        """Predicts class 0, 1 or 2 by the brightness, the more certain the brighter."""

        def forward(self, images):
            return F.one_hot(images[:, 0].round().long() % 3, 3).movedim(-1, 1) * (1 + images)

    made = method()
    made.teacher = Brightness()
    images = torch.tensor([0.0, 4.0, 2.0]).view(3, 1, 1, 1).expand(3, 1, 16, 16)
    mixed, pseudo_labels, confidence = made._mixed(images)
    assert (mixed[0] == 4).any() and (mixed[0] == 0).any()
    assert torch.equal(pseudo_labels, mixed[:, 0].long() % 3)
    assert torch.equal(confidence, made.teacher(mixed).softmax(1).max(1).values)
    made.config = made.config.model_copy(update={"mixing": "none"})
    assert made._mixed(images)[0] is images


@pytest.mark.parametrize("dims", [2, 3])
def test_nearest_neighbors_are_those_of_all_voxels_features(dims):
    """Pooling and prediction commute, so the pooled maps give what dense features would."""
    made = method(dims, nn_pool=5, neighbors=3)
    maps = [torch.randn(2, w, *(16 // 2**i,) * dims) for i, w in zip((2, 1, 0), (16, 8, 4), strict=True)]
    targets = [torch.randn_like(each) for each in maps]
    with torch.no_grad():
        made.teacher_dense.mixes[0].weight.add_(0.5)
    predict = lambda r: made.dense_predictor(r.movedim(1, -1)).movedim(-1, 1)  # noqa: E731
    pool = F.adaptive_avg_pool2d if dims == 2 else F.adaptive_avg_pool3d
    with torch.no_grad():
        z = unit(pool(predict(made.dense(maps)), (5,) * dims).flatten(1))
        t = unit(pool(made.teacher_dense(targets), (5,) * dims).movedim(1, -1).flatten(1))
        z = z.view(2, 6, -1).transpose(1, 2).flatten(1)  # stored vectors have the channels last
        distance = 2 - 2 * t @ made.pool.values.T
        nearest = distance.argsort(1)[:, :3]
        expected = (2 - 2 * z @ made.pool.values.T).gather(1, nearest).mean()
    found = made._nearest_neighbors(maps, targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    before = made.pool.values.clone()
    made.after_step(Progress(0, 10, "contrast"))
    torch.testing.assert_close(made.pool.values[:2], t)
    assert torch.equal(made.pool.values[2:], before[2:])


def test_what_the_contrast_sees():
    made, data, seen = method(mixed_jitter=0.0), batch(), {}
    forward = made.voxel_contrast.forward
    made.voxel_contrast.forward = lambda *args: seen.update(all=args) or forward(*args)
    pseudo_labels = torch.randint(3, (3, 16, 16), generator=torch.Generator().manual_seed(1))
    confidence = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(2))
    made._mixed = lambda images: (images, pseudo_labels, confidence)
    made.losses(data, Progress(50, 100, "contrast"))
    features_at, given, share, _ = seen["all"]
    assert share == pytest.approx(0.1)
    assert torch.equal(given.labels, torch.cat([data.labels, pseudo_labels]))
    assert torch.equal(given.trusted[2:], confidence >= 0.7) and given.trusted[:2].all()
    with torch.no_grad():
        for rows, images in ((slice(0, 2), data.labeled), (slice(2, 5), data.unlabeled)):
            maps = made.teacher.pyramid(made.teacher.encode(images))
            torch.testing.assert_close(given.teacher_features[rows], made.teacher_dense(maps))
            torch.testing.assert_close(given.teacher_probs[rows], made.teacher.head(maps[-1]).softmax(1))
            # the student is the teacher still
            torch.testing.assert_close(given.teacher_probs[rows], made.student(images).softmax(1))
            voxels = torch.arange(rows.start * 256, rows.stop * 256)
            features = made.dense_predictor(made.dense(maps).movedim(1, -1)).flatten(0, -2)
            torch.testing.assert_close(features_at(voxels), features, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(given.probs, made.student(data.unlabeled).softmax(1))
    assert not any(each.requires_grad for each in (given.probs, given.teacher_probs, given.teacher_features))


def test_equivariance_counts_trusted_foreground_alone(monkeypatch):
    seen = {}

    def spy(logits, target_logits, mask):
        seen.update(logits=logits, target=target_logits, mask=mask)
        return logits.sum() * 0

    monkeypatch.setattr(arco, "masked_divergence", spy)
    monkeypatch.setattr(arco, "apply_thin_plate", lambda x, warp: x)
    made, data = method(equivariance_weight=1.0, mixed_jitter=0.0), batch()
    pseudo_labels = torch.ones(3, 16, 16, dtype=torch.long)
    confidence = torch.linspace(0, 1, 3 * 256).view(3, 16, 16)
    made._mixed = lambda images: (images, pseudo_labels, confidence)
    made.losses(data, Progress(0, 10, "contrast"))
    assert torch.equal(seen["mask"], torch.cat([data.labels > 0, confidence >= 0.7]).float())
    assert seen["logits"].requires_grad and not seen["target"].requires_grad
    assert made.equivariance_empty == 0
    data.labels, pseudo_labels[:] = torch.zeros_like(data.labels), 0
    made.losses(data, Progress(0, 10, "contrast"))
    assert made.equivariance_empty == 1


def test_each_term_can_be_switched_off_and_then_costs_no_pass():
    every = {"supervised", "unsupervised", "contrast", "nearest_neighbor", "equivariance"}
    for off, passes in {
        "unsupervised": 3,
        "contrast": 2,  # the labeled images are not needed
        "nearest_neighbor": 3,
        "equivariance": 3,
        "contrast nearest_neighbor": 1,  # pseudo-labels alone
    }.items():
        made = method(**{"equivariance_weight": 1.0, **{f"{name}_weight": 0.0 for name in off.split()}})
        passes_of = {"teacher": made.teacher.encoder[0], "dense": made.teacher_dense}
        seen = []
        for name, network in passes_of.items():
            network.register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
        terms = made.losses(batch(), Progress(0, 10, "contrast"))
        assert set(terms) == every - set(off.split())
        assert seen.count("teacher") == passes
        assert seen.count("dense") == ("contrast" not in off)


def test_first_stage_terms_can_be_switched_off():
    every = {"supervised", "instance_global", "instance_local"}
    data = batch()
    assert set(method(stage="pretraining").losses(data, Progress(0, 10, "pretraining"))) == every
    for name in ("instance_global", "instance_local"):
        made = method(stage="pretraining", **{f"{name}_weight": 0.0})
        assert set(made.losses(data, Progress(0, 10, "pretraining"))) == every - {name}
    alone = method(stage="pretraining", instance_global_weight=0, instance_local_weight=0)
    alone.teacher = None
    assert set(alone.losses(data, Progress(0, 10, "pretraining"))) == {"supervised"}


def test_weights_scale_the_terms():
    data, progress = batch(), Progress(0, 10, "contrast")
    weights = {"contrast": 3.0, "unsupervised": 0.5, "nearest_neighbor": 2.0, "equivariance": 4.0}
    settings = {f"{name}_weight": weight for name, weight in weights.items()}
    confident = {"confidence_threshold": 0.0}
    one = method(**confident, **dict.fromkeys(settings, 1.0)).losses(data, progress)
    scaled = method(**confident, **settings, supervised_weight=7.0).losses(data, progress)
    for name, weight in {**weights, "supervised": 7.0}.items():
        assert one[name].item() > 0
        assert scaled[name].item() == pytest.approx(weight * one[name].item(), rel=1e-5)


def test_weights_scale_the_first_stages_terms():
    data, progress = batch(), Progress(0, 10, "pretraining")
    one = method(stage="pretraining").losses(data, progress)
    for name in ("instance_global", "instance_local"):
        scaled = method(stage="pretraining", **{f"{name}_weight": 2.0}).losses(data, progress)
        for term, value in one.items():
            assert value.item() > 0
            assert scaled[term].item() == pytest.approx((1 + (term == name)) * value.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.1, 0.01)),
        ({"student_temperature": 0.3}, (0.3, 0.01)),
        ({"teacher_temperature": 0.07}, (0.1, 0.07)),
    ],
)
def test_both_instance_terms_get_the_temperatures(settings, expected):
    made, seen = method(stage="pretraining", **settings), []
    for term in made.instance.values():
        term.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    made.losses(batch(), Progress(0, 10, "pretraining"))
    assert seen == [dict(zip(("student_temperature", "teacher_temperature"), expected, strict=True))] * 2


GLOBAL, LOCAL = ("pretraining", "instance_global"), ("pretraining", "instance_local")


def test_the_nearest_neighbor_term_is_off_unless_asked_for():
    assert ARCO.Config().nearest_neighbor_weight == 0
    made = method(nearest_neighbor_weight=ARCO.Config().nearest_neighbor_weight)
    assert "nearest_neighbor" not in made.losses(batch(), Progress(0, 10, "contrast"))
    assert not hasattr(made, "pool")


CONTRAST, NEIGHBOR = ("contrast", "contrast"), ("contrast", "nearest_neighbor")
PSEUDO, WARPED = ("contrast", "unsupervised"), ("contrast", "equivariance")
ALL = {"confidence_threshold": 0.0, "equivariance_weight": 1.0}
RANK = {**ALL, "negatives": "rank"}


@pytest.mark.parametrize(
    ("stage_and_term", "others", "setting", "value"),
    [
        (GLOBAL, {}, "student_temperature", 0.3),
        (LOCAL, {}, "student_temperature", 0.3),
        (GLOBAL, {}, "teacher_temperature", 0.1),
        (LOCAL, {}, "teacher_temperature", 0.1),
        (GLOBAL, {}, "head_activation", "none"),
        (LOCAL, {}, "head_activation", "none"),
        (GLOBAL, {}, "queue_length", 7),
        (GLOBAL, {}, "global_channels", 10),
        (LOCAL, {}, "crop_size", 8),
        (LOCAL, {}, "crop_stride", 4),
        (GLOBAL, {}, "student_jitter", 0.1),
        (LOCAL, {}, "teacher_jitter", 0.0),
        (LOCAL, {}, "jitter_probability", 1.0),
        (LOCAL, {"jitter_probability": 1.0}, "blur_sigma", (2.0, 3.0)),
        (LOCAL, {}, "teacher_mode", "eval"),
        (CONTRAST, ALL, "teacher_mode", "eval"),
        (CONTRAST, ALL, "sampler", "naive"),
        (CONTRAST, ALL, "sampler", "sag"),
        (CONTRAST, ALL, "groups_per_axis", 2),
        (CONTRAST, ALL, "ordering", "scan"),
        (CONTRAST, ALL, "temperature", 0.1),
        (CONTRAST, ALL, "anchors", 15),
        (CONTRAST, ALL, "negatives_per_anchor", 7),
        (CONTRAST, ALL, "anchor_probability", 0.4),
        (CONTRAST, ALL, "entropy_percent", 50.0),
        (CONTRAST, ALL, "published_epochs", 1),
        (CONTRAST, ALL, "negative_confidence", 0.0),
        (CONTRAST, ALL, "negatives", "rank"),
        (CONTRAST, RANK, "negative_probability", 0.35),
        (CONTRAST, RANK, "rank_low", 1),
        (CONTRAST, {**RANK, "rank_low": 1}, "rank_high", 2),
        (CONTRAST, RANK, "bank_size", 5),
        (CONTRAST, RANK, "bank_size_background", 5),
        (CONTRAST, ALL, "dense_channels", 7),
        (NEIGHBOR, ALL, "nn_pool", 4),
        (NEIGHBOR, ALL, "neighbors", 2),
        (PSEUDO, ALL, "confidence_threshold", 0.4),
        (PSEUDO, ALL, "mixing", "none"),
        (PSEUDO, ALL, "mixed_jitter", 0.0),
        (WARPED, ALL, "negative_confidence", 0.0),
    ],
)
def test_settings_act(stage_and_term, others, setting, value):
    """Under the same seed the term is another one, and only then."""
    (stage, term), data = stage_and_term, batch()

    def loss(**settings):
        value = method(stage=stage, **(others | settings)).losses(data, Progress(3, 10, stage))[term].item()
        assert 0 < value < 1e3
        return value

    assert loss() == loss()
    assert loss() != pytest.approx(loss(**{setting: value}), rel=1e-6)


def test_crops_and_shares_of_the_stages_are_those_asked_for():
    made = method(crop_size=8, crop_stride=2, queue_length=7, pretraining_share=0.25, nn_pool=4)
    assert made.instance["local"].head.pooling.crops == 5 * 5
    assert [len(term.queue.values) for term in made.instance.values()] == [7, 7]
    assert tuple(made.pool.values.shape) == (7, 6 * 4 * 4)
    assert [(stage.name, stage.share) for stage in made.stages()] == [("pretraining", 0.25), ("contrast", 0.75)]
    assert not method(nesterov=False).optimizers(stage_of(made, "contrast"))["main"].nesterov


def test_the_contrast_compares_student_and_teacher_on_the_same_view():
    made, seen = method(mixed_jitter=0.25, jitter_probability=1.0), {"student": [], "teacher": []}
    for name, inputs in seen.items():
        first = getattr(made, name).encoder[0]
        first.register_forward_hook(lambda module, args, output, inputs=inputs: inputs.append(args[0]))
    data = batch()
    made.losses(data, Progress(0, 10, "contrast"))
    assert torch.equal(seen["student"][0], data.labeled) and torch.equal(seen["teacher"][0], data.unlabeled)
    assert torch.equal(seen["student"][1], seen["teacher"][1])
    mixed = method(mixed_jitter=0.25, jitter_probability=1.0)._mixed(data.unlabeled)[0]
    assert not any(torch.equal(view, image) for view, image in zip(seen["student"][1], mixed, strict=True))
    assert torch.equal(seen["teacher"][2], data.labeled)


def test_the_teachers_view_alone_is_jittered_in_the_first_stage():
    made = method(stage="pretraining", jitter_probability=1.0)
    seen = {}
    made.student.encoder[0].register_forward_hook(lambda module, args, output: seen.update(student=args[0]))
    made.teacher.encoder[0].register_forward_hook(lambda module, args, output: seen.update(teacher=args[0]))
    data = batch()
    made.losses(data, Progress(0, 10, "pretraining"))
    assert torch.equal(seen["student"], data.images)
    assert not torch.equal(seen["teacher"], data.images)
    assert torch.equal(data.labeled, batch().labeled)


def test_mixed_images_are_jittered_in_2d_only():
    assert (method(2)._mixed_jitter, method(3)._mixed_jitter) == (0.25, 0.0)
    assert method(3, mixed_jitter=0.1)._mixed_jitter == 0.1


# Degenerate batches


@pytest.mark.parametrize("stage", ["pretraining", "contrast"])
def test_a_batch_without_unlabeled_rows_is_refused(stage):
    made = method(stage=stage)
    with pytest.raises(
        ConfigError, match=r"^method 'arco' needs unlabeled rows; set plan.unlabeled_batch_size to 1 or"
    ):
        made.losses(batch(unlabeled=0), Progress(0, 10, stage))


@pytest.mark.parametrize("negatives", ["complement", "rank"])
def test_a_batch_of_background_has_no_contrast_and_is_counted(negatives):
    made, data = method(negatives=negatives), batch()
    data.labels = torch.zeros_like(data.labels)
    made._mixed = lambda images: (images, torch.zeros_like(images[:, 0]).long(), torch.ones_like(images[:, 0]))
    for step in (1, 2):
        terms = made.losses(data, Progress(0, 10, "contrast"))
        terms["contrast"].backward()
        assert terms["contrast"].item() == 0
        assert made.contrast_empty == step == made.pop_logged()["contrast_empty"]
    assert made.unsupervised_empty == 0
    assert all(p.grad is None or not p.grad.any() for p in made.parameters())


def test_without_confident_voxels_the_terms_are_finite_and_counted():
    made = method(confidence_threshold=1.0, negative_confidence=1.0)
    terms = made.losses(batch(), Progress(0, 10, "contrast"))
    assert terms["unsupervised"].item() == 0
    assert made.unsupervised_empty == 1
    assert all(value.isfinite() for value in terms.values())
    logged = made.pop_logged()
    assert logged["confident"] == 0 and logged["trusted"] == 0 and logged["unsupervised_empty"] == 1


@pytest.mark.parametrize("labels", ["no foreground", "class 1 alone", "one row"])
@pytest.mark.parametrize("classes", [2, 3])
def test_poor_batches_train_without_nan(labels, classes):
    data = batch(labeled=1 if labels == "one row" else 2, unlabeled=1 if labels == "one row" else 3, classes=classes)
    if labels != "one row":
        data.labels = torch.full_like(data.labels, labels == "class 1 alone")
    made = method(classes=classes, stage="pretraining")
    first = train(made, "pretraining", 3, data)
    made.enter_stage(stage_of(made, "contrast"), first=True)
    for terms in first + train(made, "contrast", 3, data):
        assert all(value == value and abs(value) < 1e3 for value in terms.values()), terms


# Training


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sampler": "sag", "ordering": "scan", "head_activation": "none", "mixing": "none", "student_jitter": 0.02},
        {"sampler": "naive", "negatives": "rank", "equivariance_weight": 1.0, "teacher_mode": "eval"},
    ],
    ids=["default", "sag", "rank"],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_every_variant_trains(dims, settings, bf16):
    made = method(dims, stage="pretraining", **settings)
    first = train(made, "pretraining", 6, bf16=bf16)
    made.enter_stage(stage_of(made, "contrast"), first=True)
    second = train(made, "contrast", 6, bf16=bf16)
    for terms in first + second:
        assert all(value == value and abs(value) < 1e3 for value in terms.values()), terms
    assert second[-1]["supervised"] < first[0]["supervised"]
    assert made.contrast_empty == 0


def test_the_contrast_draws_classes_apart():
    """Trained by it alone, voxels come nearer to their own class and farther from the others."""
    made = method(
        pretraining_share=0.0, contrast_weight=1.0, unsupervised_weight=0, nearest_neighbor_weight=0, temperature=0.1
    )
    made._supervised = lambda logits, labels: 0 * logits.sum()
    gaps = []
    data = batch()
    parameters = [*made.student.parameters(), *made.dense.parameters(), *made.dense_predictor.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for t in range(25):
        sum(made.losses(data, Progress(t, 100, "contrast")).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        made.after_step(Progress(t, 100, "contrast"))
        logged = made.pop_logged()
        gaps.append(float(logged["positive_similarity"] - logged["negative_similarity"]))
    assert gaps[-1] > gaps[0] + 0.3


@pytest.mark.parametrize("network", ["vnet", "unet3d"])
def test_other_networks(network):
    made = method(2, stage="pretraining", network=network)
    assert made.instance["global"].head.projector[0].in_features == made.student.pyramid_widths[0]
    train(made, "pretraining", 1)
    made.enter_stage(stage_of(made, "contrast"), first=True)
    assert all(value == value for value in train(made, "contrast", 2)[-1].values())


# Shapes and inference


def test_dense_heads_have_the_published_widths():
    flat, volume = UNet(2, 1, 4), VNet(3, 1, 2)
    assert flat.pyramid_widths == (256, 128, 64, 32, 16) and sum(flat.pyramid_widths) == 496
    assert volume.pyramid_widths == (128, 64, 32, 16, 16) and sum(volume.pyramid_widths) == 256
    for network, dims, channels in ((flat, 2, 496), (volume, 3, 16)):
        head = PyramidHead(dims, network.pyramid_widths, arco._DENSE_CHANNELS[dims])
        assert tuple(head.mixes[-1].weight.shape[:2]) == (channels, sum(network.pyramid_widths))


def test_the_predictor_needs_no_head():
    made = method()
    train(made, "contrast", 2)
    images = batch().unlabeled
    expected = made.eval().predictor(images)
    alone = made.task.network()
    alone.load_state_dict(made.predictor.state_dict(), strict=True)
    assert torch.equal(alone.eval()(images), expected)
    assert not any("dense" in name or "project" in name for name in made.predictor.state_dict())


# Settings


def test_networks_without_features_and_deep_supervision_are_refused():
    with pytest.raises(ConfigError, match="gives logits only"):
        ARCO(Task(1, ("a", "b"), 2, (32, 32), "BasicUNet"), ARCO.Config())
    arguments = {
        "kernel_sizes": [[3, 3]] * 4,
        "strides": [[1, 1]] + [[2, 2]] * 3,
        "widths": [4, 8, 8, 8],
        "deep_supervision": True,
    }
    with pytest.raises(ConfigError, match="arco trains one resolution; remove deep_supervision"):
        ARCO(Task(1, ("a", "b"), 2, (32, 32), "dynunet", arguments), ARCO.Config())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"neighbors": 9, "queue_length": 8}, "setting 'method.neighbors' is 9: queue_length is 8; ask for at most"),
        ({"rank_low": 3, "rank_high": 3}, "setting 'method.rank_high' is 3: no rank lies from rank_low, 3"),
        ({"sampler": "grid"}, "setting 'method.sampler' is 'grid'"),
        ({"contrast": 0.1}, "contrast_weight"),
    ],
)
def test_bad_settings_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(ARCO.Config, values, where="method")
