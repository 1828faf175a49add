"""LCLPL: its stages, its batch, who gets which gradient, and what it does at the edges."""

import math

import pytest
import torch

from scantly.errors import ConfigError
from scantly.losses import soft_dice_per_image
from scantly.losses.local_contrastive import class_masks, mean_over_pairs
from scantly.methods.base import Batch, Progress, Rows, Task
from scantly.methods.lclpl import LCLPL
from scantly.methods.parts.samplers import sample

CLASSES = ("background", "left", "right")
ROUND = Progress(0, 10, "round1")


def make_task(dims=2, classes=CLASSES, side=16, **arguments):
    network = {"widths": [4, 8], **arguments}
    return Task(1, classes, dims, (side,) * dims, "unet6", network)


def make_method(dims=2, classes=CLASSES, side=16, **settings):
    torch.manual_seed(0)
    method = LCLPL(make_task(dims, classes, side), LCLPL.Config(**{"contrast_weight": 0.1, **settings})).train()
    method.generator = torch.Generator().manual_seed(0)
    return method


def make_batch(method, rows=4, seed=0, classes=None):
    """Noisy images with boxes of every class; labeled, extra and pseudo-labeled rows differ, views and raw rows too."""
    generator = torch.Generator().manual_seed(seed)
    dims, side = method.task.spatial_dims, method.task.patch_size[-1]

    def images(count):
        labels = torch.zeros(count, *(side,) * dims, dtype=torch.long)
        for c in classes or range(1, method.task.num_classes):
            start = torch.randint(0, side // 2, (count,), generator=generator)
            for row, first in enumerate(start.tolist()):
                low = (c - 1) * side // 4
                labels[(row, slice(low, low + side // 4), *(slice(first, first + side // 3),) * (dims - 1))] = c
        return labels[:, None] + 0.3 * torch.randn(count, 1, *labels.shape[1:], generator=generator), labels

    (x, y), (u, p), (e, f) = images(rows), images(method.pairs.unlabeled), images(method.pairs.labeled)
    return Batch(
        x,
        y,
        u.flip(-1),
        x.flip(-1),
        y.flip(-1),
        u,
        pseudo_labels=p.flip(-1),
        pseudo_labels_raw=p,
        extra=e,
        extra_labels=f,
    )


def statistics(network):
    return [m.running_mean.clone() for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]


@pytest.mark.parametrize("batches", ["joint", "apart"])
def test_views_take_part_in_the_batch_norm_statistics_only_in_a_joint_batch(batches):
    method = make_method(batches=batches)
    labeled_alone = make_method(batches=batches)
    batch = make_batch(method)
    terms = method.losses(batch, ROUND)
    labeled_alone.network(labeled_alone._segmentation_view(batch)[0])
    same = [
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(statistics(method.network), statistics(labeled_alone.network), strict=True)
    ]
    assert all(same) if batches == "apart" else not any(same)
    reached = gradients(method, terms["contrast"])
    assert any("encoder" in name for name in reached)
    assert any("contrast_head" in name for name in reached)
    assert not any(name.startswith("network.head") for name in reached)


def gradients(method, loss):
    method.zero_grad(set_to_none=True)
    loss.backward()
    return {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


# --- stages ---


def test_stages_of_acdc():
    method = LCLPL(Task(1, ("bg", "rv", "myo", "lv"), 2, (32, 32), "unet6"), LCLPL.Config())
    baseline, *rounds = method.stages()
    assert (baseline.labeled, baseline.unlabeled, baseline.extra) == (Rows(20), Rows(0), Rows(0))
    assert not baseline.relabel
    assert [stage.name for stage in rounds] == ["round1", "round2", "round3"]
    assert {stage.share for stage in (baseline, *rounds)} == {1.0}
    assert {(s.labeled, s.extra, s.unlabeled) for s in rounds} == {(Rows(20, 3), Rows(5, 4), Rows(5, 4))}
    assert all(stage.relabel and stage.from_best for stage in rounds)
    assert [stage.restart_optimizers for stage in rounds] == [True, False, False]


@pytest.mark.parametrize(("classes", "least"), [(2, 2), (3, 2), (4, 3), (8, 3)])
def test_classes_in_a_slice_of_the_segmentation_loss(classes, least):
    method = LCLPL(make_task(classes=tuple("abcdefgh"[:classes])), LCLPL.Config())
    assert method.stages()[1].labeled.classes == least
    assert method.stages()[1].extra.classes == classes


def test_volumes_take_the_rows_of_the_plan_and_fewer_pairs():
    stage = make_method(3).stages()[1]
    assert (stage.labeled.count, stage.extra.count, stage.unlabeled.count) == (None, 2, 2)
    assert make_method(2, seg_rows="plan").stages()[0].labeled.count is None
    assert make_method(3, seg_rows=6, pairs=10).stages()[1].labeled.count == 6


def test_without_the_contrastive_term_no_pool_is_loaded_or_labeled():
    method = make_method(contrast_weight=0.0)
    stage = method.stages()[1]
    assert (stage.unlabeled.count, stage.extra.count, stage.relabel) == (0, 0, False)
    terms = method.losses(make_batch(method), ROUND)
    assert list(terms) == ["supervised"]
    assert not gradients(method, terms["supervised"]) & {n for n, _ in method.named_parameters() if "contrast" in n}


def test_round_1_begins_with_a_new_head_on_the_baseline():
    method = make_method()
    stages = method.stages()
    method.network(torch.randn(4, 1, 16, 16))  # statistics of batch norm move
    for p in method.parameters():
        p.data.add_(1.0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method.enter_stage(stages[1], first=False)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    method.enter_stage(stages[1], first=True)
    after = method.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    head = {name for name in before if name.startswith("network.head")}
    assert changed == head
    assert after["network.head.1.running_mean"].abs().sum() == 0
    before = {name: value.clone() for name, value in after.items()}
    method.enter_stage(stages[2], first=True)
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_adam_as_published_or_the_recipes_optimizer():
    method = make_method()
    baseline, joint = method.stages()[:2]
    spec = method.optimizers(joint)["main"]
    assert (spec.name, spec.lr, spec.weight_decay, spec.schedule) == ("adam", 1e-3, 0.0, "constant")
    assert {id(p) for p in spec.parameters} == {id(p) for p in method.parameters()}
    assert {id(p) for p in method.optimizers(baseline)["main"].parameters} == {
        id(p) for p in method.network.parameters()
    }
    assert make_method(optimizer="recipe").optimizers(joint)["main"].name is None


def test_deep_supervision_is_refused_with_the_cure():
    arguments = {"kernel_sizes": [[3, 3]] * 4, "strides": [[1, 1], [2, 2], [2, 2], [2, 2]], "deep_supervision": True}
    with pytest.raises(ConfigError, match=r"leave network\.arguments\.deep_supervision out"):
        LCLPL(Task(1, CLASSES, 2, (32, 32), "dynunet", arguments), LCLPL.Config())


# --- one joint step ---


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("variant", ["intra", "inter"])
def test_who_gets_which_gradient(dims, variant):
    method = make_method(dims, variant=variant)
    batch = make_batch(method)
    names = {name for name, _ in method.named_parameters()}
    head = {n for n in names if n.startswith("network.head")}
    contrast_head = {n for n in names if n.startswith("contrast_head")}
    # The bias of a convolution in front of batch norm has a gradient of rounding only.
    shared = {n for n in names - head - contrast_head if not n.endswith("bias")}
    reached = gradients(method, method.losses(batch, ROUND)["contrast"])
    assert shared | {n for n in contrast_head if n.endswith("weight")} <= reached
    assert not reached & head
    reached = gradients(method, method.losses(batch, ROUND)["supervised"])
    assert shared | {n for n in head if n.endswith("weight")} <= reached
    assert not reached & contrast_head


def test_pseudo_labels_do_not_reach_the_segmentation_loss():
    method = make_method()
    state = method.generator.get_state()
    batch = make_batch(method)
    first = method.losses(batch, ROUND)
    batch.pseudo_labels_raw = batch.pseudo_labels_raw.flip(1)
    method.generator.set_state(state)
    method.load_state_dict(make_method().state_dict())
    second = method.losses(batch, ROUND)
    assert torch.equal(first["supervised"], second["supervised"])
    assert not torch.equal(first["contrast"], second["contrast"])


def test_both_groups_pass_the_network_in_one_batch(monkeypatch):
    method = make_method()
    seen = []
    encode = method.network.encode
    monkeypatch.setattr(method.network, "encode", lambda images: seen.append(len(images)) or encode(images))
    of_head = []
    method.contrast_head.register_forward_hook(lambda _, x, __: of_head.append(len(x[0])))
    batch = make_batch(method, rows=20)
    method.losses(batch, ROUND)
    assert (seen, of_head) == ([40], [20])


def test_embeddings_have_the_size_of_the_images():
    method = LCLPL(Task(1, ("bg", "rv", "myo", "lv"), 2, (192, 192), "unet6"), LCLPL.Config()).eval()
    with torch.no_grad():
        u = method.network.decode_features(method.network.encode(torch.zeros(2, 1, 192, 192)))
        assert u.shape == method.contrast_head(u).shape == (2, 16, 192, 192)
    kinds = [type(layer).__name__ for layer in method.contrast_head]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d"]
    assert all(layer.bias is None for layer in method.contrast_head[::3])
    assert method.contrast_head[1].eps == 1e-3


def test_the_loss_is_the_definition_on_the_voxels_drawn(monkeypatch):
    """Step by step as the paper's algorithm, with the network's own embeddings."""
    method = make_method(elastic_sigma=0.0, pixels=2)
    kept = {}

    def remember(*args, **kwargs):
        kept["indices"], counts = sample(*args, **kwargs)
        return kept["indices"], counts

    monkeypatch.setattr("scantly.methods.lclpl.sample", remember)
    method.contrast_head.register_forward_hook(lambda _, __, z: kept.update(z=z.detach()))
    batch = make_batch(method)
    term = method.losses(batch, ROUND)["contrast"].item()
    images = torch.cat([batch.extra_labels, batch.pseudo_labels_raw])
    first, second = kept["z"].chunk(2)
    indices = kept["indices"].view(2, 10, 2, 2)
    total = 0.0
    for b, rows in enumerate(zip(method.pairs.first, method.pairs.second, strict=True)):
        labels = [images[row].flatten() for row in rows]
        z = [side[b].flatten(1) for side in (first, second)]
        means = [torch.stack([e[:, y == c].mean(1) for c in (1, 2)]) for e, y in zip(z, labels, strict=True)]
        keys = torch.nn.functional.normalize(torch.cat(means), dim=1)
        pair = 0.0
        for side in (0, 1):
            for c in (1, 2):
                for voxel in indices[side, b, c - 1]:
                    assert labels[side][voxel] == c
                    s = keys @ torch.nn.functional.normalize(z[side][:, voxel], dim=0) / 0.1
                    pair += (2 * s.logsumexp(0) - s[c - 1] - s[c + 1]).item()
        total += pair / 8
    assert term == pytest.approx(0.1 * total / 10, rel=1e-4)


def test_drawn_voxels_are_of_their_class_and_one_voxel_is_drawn_three_times():
    labels = torch.zeros(2, 6, 6, dtype=torch.long)
    labels[0, 2:4, 1:5] = 1
    labels[1, 5, 5] = 2
    masks = class_masks(labels, range(1, 3))
    indices, counts = sample("naive", masks.flatten(0, 1), 3, 3, torch.Generator().manual_seed(0))
    assert counts.tolist() == [8, 0, 0, 1]
    assert (labels[0].flatten()[indices[0]] == 1).all()
    assert indices[3].tolist() == [35, 35, 35]


# --- views ---


def test_labels_follow_the_deformation_and_the_first_image_never_moves():
    method = make_method(side=32)
    batch = make_batch(method, rows=8)
    moved = torch.zeros(8)
    for _ in range(60):
        images, target = method._segmentation_view(batch)
        assert target.shape == (8, 3, 32, 32)
        torch.testing.assert_close(target.sum(1), torch.ones(8, 32, 32))
        moved += (images != batch.labeled).flatten(1).any(1)
    one_hot = class_masks(batch.labels, range(3)).view(8, 3, 32, 32).float()
    assert moved[0] == 0
    assert moved[-2:].tolist() == [60, 60]  # at most B - 2 rows stay
    assert (moved[2:] >= moved[1:-1]).all()
    assert 0 < moved[1] < 30
    assert torch.equal(target[0], one_hot[0])


def test_displacements_are_scaled_with_the_patch():
    method = LCLPL(make_task(side=96), LCLPL.Config())
    assert method._in_pixels(10.0) == pytest.approx(5.0)


def test_contrastive_views_change_intensities_alone_and_stay_in_range():
    method = make_method()
    batch = make_batch(method)
    views, labels = method._contrastive_views(batch)
    sources = torch.cat([batch.extra, batch.unlabeled_raw])[list(method.pairs.first + method.pairs.second)]
    expected = torch.cat([batch.extra_labels, batch.pseudo_labels_raw])
    assert torch.equal(labels, expected[list(method.pairs.first + method.pairs.second)])
    for view, source in zip(views, sources, strict=True):
        low, high = source.min(), source.max()
        assert view.min() >= low
        assert view.max() <= low + 1.5 * (high - low) + 1e-5
        inside = (view > low) & (view < low + 1.5 * (high - low))
        a, b = source[inside], view[inside]
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.999  # an affine change
    assert not torch.equal(views[0], views[10])  # two views of one image differ


def test_without_intensity_changes_the_views_are_the_images():
    method = make_method(brightness=0.0, contrast=0.0)
    batch = make_batch(method)
    views, labels = method._contrastive_views(batch)
    members = list(method.pairs.first + method.pairs.second)
    torch.testing.assert_close(views, torch.cat([batch.extra, batch.unlabeled_raw])[members])
    assert torch.equal(labels, torch.cat([batch.extra_labels, batch.pseudo_labels_raw])[members])


def test_intensities_of_labeled_images_change_on_request_alone():
    batch = make_batch(make_method())
    still, _ = make_method(elastic_sigma=0.0)._segmentation_view(batch)
    assert torch.equal(still, batch.labeled)
    changed, _ = make_method(elastic_sigma=0.0, seg_intensity_aug=True)._segmentation_view(batch)
    shift = (changed - batch.labeled)[2:].flatten(1)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-5)
    span = batch.labeled.flatten(1).amax(1) - batch.labeled.flatten(1).amin(1)
    assert (shift[:, 0].abs() <= 0.1 * span[2:] + 1e-5).all()
    mean = changed[:2].flatten(1).mean(1)
    torch.testing.assert_close(mean, batch.labeled[:2].flatten(1).mean(1))
    ratio = changed[:2].flatten(1).std(1) / batch.labeled[:2].flatten(1).std(1)
    assert ((ratio > 0.8) & (ratio < 1.2) & (ratio != 1)).all()


# --- segmentation losses, pseudo-labels ---


def test_kinds_of_segmentation_loss():
    logits = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = class_masks(torch.randint(0, 3, (2, 8, 8)), range(3)).view(2, 3, 8, 8).float()
    probs = logits.softmax(1)
    expected = {
        "dice": soft_dice_per_image(probs, target),
        "foreground_dice": soft_dice_per_image(probs, target, include_background=False),
        "cross_entropy": -(torch.tensor([0.1, 0.45, 0.45]).view(3, 1, 1) * target * probs.log()).sum(1).mean(),
    }
    for kind, value in expected.items():
        found = make_method(segmentation_loss=kind)._segmentation_loss(logits, target)
        torch.testing.assert_close(found, value)


def test_pseudo_labels_are_smoothed_in_2d_alone_and_on_request():
    probs = torch.full((3, 2, 64, 64), 0.1)
    probs[0] = 0.8
    probs[:, :, 30, 30] = torch.tensor([0.2, 0.7, 0.1])[:, None]
    assert make_method(side=64).pseudo_labels(probs).sum() == 0
    speck = make_method(side=64, crf="none").pseudo_labels(probs)
    assert speck.sum() == 2
    assert torch.equal(make_method(3).pseudo_labels(probs), speck)


# --- edges ---


def test_the_log_shows_whether_it_works():
    method = make_method()
    method.losses(make_batch(method), ROUND)
    logged = {name: float(value) for name, value in method.pop_logged().items()}
    assert logged["anchors/left"] == logged["anchors/right"] == 60  # 3 voxels of 20 images
    assert logged["pairs_used"] == 10
    assert logged["contrast_empty"] == 0
    assert -1 <= logged["negative_similarity"] <= 1
    assert -1 <= logged["positive_similarity"] <= 1
    assert 0 <= logged["pseudo_agreement"] <= 1


def test_agreement_is_the_foreground_dice_on_unlabeled_views():
    method = make_method()
    batch = make_batch(method)
    labels = torch.cat([batch.extra_labels, batch.pseudo_labels_raw])[method.members]
    perfect = class_masks(labels, range(3)).view(20, 3, 16, 16).float()
    contrast = method._contrast(torch.randn(20, 4, 16, 16), labels)
    method._watch(contrast, perfect, labels)
    assert float(method.pop_logged()["pseudo_agreement"]) == 1
    perfect[method.members >= 5] = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)
    method._watch(contrast, perfect, labels)
    assert float(method.pop_logged()["pseudo_agreement"]) == 0


@pytest.mark.parametrize("variant", ["intra", "inter"])
def test_images_without_foreground_give_zero_and_are_counted(variant):
    method = make_method(variant=variant)
    batch = make_batch(method)
    batch.extra_labels, batch.pseudo_labels_raw = 0 * batch.extra_labels, 0 * batch.pseudo_labels_raw
    for count in (1, 2):
        terms = method.losses(batch, ROUND)
        assert terms["contrast"].item() == 0
        assert float(method.pop_logged()["contrast_empty"]) == count
        sum(terms.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert method.state_dict()["contrast_empty"] == 2


def test_one_foreground_class_is_contrasted_with_the_background():
    method = make_method(classes=("background", "organ"))
    assert method.classes == range(2)
    terms = method.losses(make_batch(method), ROUND)
    assert terms["contrast"].item() > 0.1 * 1.38
    alone = make_method(classes=("background", "organ"), include_background=False)
    assert alone.losses(make_batch(alone), ROUND)["contrast"].item() == 0
    assert make_method().classes == range(1, 3)
    assert make_method(include_background=True).classes == range(3)


def test_classes_missing_in_some_images_stay_finite():
    method = make_method()
    batch = make_batch(method, classes=[1])
    batch.extra_labels[0, 0, 0] = 2
    terms = method.losses(batch, ROUND)
    assert all(value.isfinite() for value in terms.values())
    assert 0 < float(method.pop_logged()["pairs_used"]) < 10
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


@pytest.mark.parametrize("dims", [2, 3])
def test_mixed_precision_stays_finite_and_near(dims):
    method = make_method(dims)
    batch, state = make_batch(method), method.generator.get_state()
    exact = method.losses(batch, ROUND)
    method.generator.set_state(state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = method.losses(batch, ROUND)
    for name, value in terms.items():
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_released_normalization_is_smaller():
    correct, released = (
        make_method(normalization=kind).losses(make_batch(make_method()), ROUND)["contrast"].item()
        for kind in ("correct", "released")
    )
    assert 0 < released < 0.2 * correct


@pytest.mark.parametrize(
    "settings", [{"sampler": "sg"}, {"sampler": "sag"}, {"pairs": 6}, {"labeled_pairs": "different"}]
)
def test_settings_of_the_pairs_and_draws_train(settings):
    method = make_method(**settings)
    terms = method.losses(make_batch(method), ROUND)
    assert 2 * 0.693 * 0.1 < terms["contrast"].item() < 0.5
    assert any(name.startswith("contrast_head") for name in gradients(method, sum(terms.values())))


@pytest.mark.parametrize("kind", ["naive", "sg", "sag"])
def test_anchors_are_drawn_by_the_sampler_asked_for(kind, monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append((arguments[0], arguments[2], arguments[3]))
        return sample(*arguments)

    monkeypatch.setattr("scantly.methods.lclpl.sample", spy)
    method = make_method(pixels=4, **({} if kind == "naive" else {"sampler": kind}))  # naive is the default
    method.losses(make_batch(method), ROUND)
    assert seen == [(kind, 4, 4)]


@pytest.mark.parametrize(("variant", "least"), [("intra", 0.0), ("inter", 2 * math.log(2))])
def test_joint_training_pulls_classes_together(variant, least):
    method = make_method(variant=variant, elastic_sigma=0.0)
    batch = make_batch(method)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses, gaps = [], []
    for _ in range(50):
        terms = method.losses(batch, ROUND)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        logged = method.pop_logged()
        gaps.append(float(logged["positive_similarity"] - logged["negative_similarity"]))
        losses.append((terms["supervised"].item(), terms["contrast"].item() / 0.1))
    assert losses[-1][0] < 0.3 * losses[0][0]
    assert least <= losses[-1][1] < least + 0.3 < losses[0][1]
    assert gaps[-1] > gaps[0] + 0.2


def test_the_default_weight_is_the_released_one_in_effect():
    """Ten complete pairs of three classes with equal sums: 0.1 times the released value is 0.0106 times the mean."""
    sums, anchors = torch.full((10,), 36.0), torch.full((10,), 18)
    released = mean_over_pairs(sums, anchors, 9, variant="inter", normalization="released")
    correct = mean_over_pairs(sums, anchors, 9, variant="inter", normalization=LCLPL.Config().normalization)
    assert LCLPL.Config().contrast_weight * correct.item() == pytest.approx(0.1 * released.item(), rel=2e-3)
