"""The worked numbers of the local contrastive loss, its invariances, and a slow second implementation."""

import math

import pytest
import torch

from scantly.losses.local_contrastive import (
    class_masks,
    class_means,
    local_contrastive_loss,
    mean_over_pairs,
    pick_voxels,
)

X = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8]]).double()
X2 = torch.tensor([[0.6, 0.8], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]).double()
LABELS = torch.tensor([1, 1, 2, 2])


def maps(*images: torch.Tensor) -> torch.Tensor:
    """Voxel lists ``(voxels, D)`` as embedding maps ``(R, D, 1, voxels)``."""
    return torch.stack([image.T[:, None] for image in images])


def every_voxel_once(labels: torch.Tensor, classes: range, draws: int) -> torch.Tensor:
    """Indices of each class's voxels in turn, ``(R, K, draws)``; 0 for an absent class."""
    rows = []
    for row in labels.flatten(1):
        found = [(row == c).nonzero().flatten() for c in classes]
        rows.append(
            torch.stack([f[torch.arange(draws) % len(f)] if len(f) else torch.zeros(draws).long() for f in found])
        )
    return torch.stack(rows)


def pair_loss(z, z2, y=LABELS, y2=LABELS, *, classes=range(1, 3), draws=2, device="cpu", **options):
    """One pair, with every voxel of each class as an anchor ``draws / voxels`` times."""
    embeddings, labels = maps(z, z2), torch.stack([y, y2])[:, None]
    means, present = class_means(embeddings, class_masks(labels, classes))
    anchors = pick_voxels(embeddings, every_voxel_once(labels, classes, draws))
    return local_contrastive_loss(anchors[None], means[None], present[None], **options)


def slow_pair(z, z2, y, y2, *, classes, draws, temperature, variant):
    """The definition, term by term: sum, anchors of both images."""

    def cosine(a, b):
        return float(a @ b / (a.norm().clamp(min=1e-6) * b.norm().clamp(min=1e-6)))

    means = [{c: e[y_ == c].mean(0) for c in classes if (y_ == c).any()} for e, y_ in ((z, y), (z2, y2))]
    total, anchors = 0.0, 0
    for side, (e, y_) in enumerate(((z, y), (z2, y2))):
        own, other = means[side], means[1 - side]
        keys = [*own.items(), *(other.items() if variant == "inter" else [])]
        if len({c for c, _ in keys}) < 2:
            continue
        for c in own:
            voxels = (y_ == c).nonzero().flatten().tolist()
            for k in range(draws):
                p = e[voxels[k % len(voxels)]]
                log_z = math.log(sum(math.exp(cosine(p, m) / temperature) for _, m in keys))
                total += sum(log_z - cosine(p, m) / temperature for key, m in keys if key == c)
                anchors += 1
    return total, anchors


# --- the worked numbers ---


def test_means_are_not_normalized():
    means, present = class_means(maps(X, X2), class_masks(torch.stack([LABELS, LABELS]), range(1, 3)))
    expected = torch.tensor([[[0.9, 0.3], [-0.3, 0.9]], [[0.8, 0.4], [-0.5, 0.5]]]).double()
    torch.testing.assert_close(means, expected)
    assert present.all()


@pytest.mark.parametrize(
    ("temperature", "intra", "inter"), [(1.0, 0.248628, 0.883931 + 0.938187), (0.1, 3.2104e-06, 0.458223 + 1.000784)]
)
def test_terms_of_one_anchor(temperature, intra, inter):
    means, present = class_means(maps(X, X2), class_masks(torch.stack([LABELS, LABELS]), range(1, 3)))
    cosines = torch.nn.functional.cosine_similarity(X[0], means.flatten(0, 1), dim=1)
    torch.testing.assert_close(
        cosines, torch.tensor([0.948683, -0.316228, 0.894427, -0.707107]).double(), rtol=0, atol=1e-6
    )
    # The one anchor stands for both classes of both images; its share is found by differences of pair losses.
    alone = torch.zeros(1, 2, 2, 1, 2).double()
    alone[0, 0, 0, 0] = X[0]
    options = {"temperature": temperature}
    for variant, expected in (("intra", intra), ("inter", inter)):
        anchors = 2 if variant == "intra" else 1
        with_anchor = local_contrastive_loss(alone, means[None], present[None], variant=variant, **options)
        without = local_contrastive_loss(0 * alone, means[None], present[None], variant=variant, **options)
        zero_term = math.log(2) if variant == "intra" else 2 * math.log(4)  # a zero vector is equally far from all
        found = (float(with_anchor.loss) - float(without.loss)) * 4 / anchors + zero_term
        assert found == pytest.approx(expected, abs=1e-6 if expected > 1e-3 else 1e-9)


@pytest.mark.parametrize(("temperature", "intra", "inter"), [(1.0, 0.668571, 2.076890), (0.1, 0.0189605, 2.060542)])
def test_a_whole_pair(temperature, intra, inter):
    for variant, expected in (("intra", intra), ("inter", inter)):
        found = pair_loss(X, X2, temperature=temperature, variant=variant)
        assert float(found.loss) == pytest.approx(expected, abs=1e-6)
        assert found.anchors.tolist() == [4, 4]
        assert found.used.tolist() == [True]


def test_three_orthogonal_classes_reach_the_least_loss():
    eye, labels = torch.eye(3).double(), torch.tensor([1, 2, 3])
    options = {"classes": range(1, 4), "draws": 1, "temperature": 0.1}
    intra = pair_loss(eye, eye, labels, labels, variant="intra", **options)
    inter = pair_loss(eye, eye, labels, labels, variant="inter", **options)
    assert float(intra.loss) == pytest.approx(2 * 9.07957e-05, rel=1e-6)
    assert float(inter.loss) == pytest.approx(2 * 0.693238, abs=1e-6)
    assert float(inter.loss) >= 2 * math.log(2)
    assert float(inter.positive) == pytest.approx(1.0)
    assert float(inter.negative) == pytest.approx(0.0, abs=1e-6)


def test_a_complete_inter_pair_costs_at_least_two_ln_two():
    for seed in range(20):
        z, z2 = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(12) % 4  # 0 is background
        found = pair_loss(z, z2, labels, labels, classes=range(1, 4), draws=3, variant="inter")
        assert float(found.loss) >= 2 * math.log(2) - 1e-6
        assert float(pair_loss(z, z2, labels, labels, classes=range(1, 4), draws=3, variant="intra").loss) >= 0


def test_a_class_that_one_image_lacks():
    lacking = torch.tensor([1, 1, 0, 0])
    intra = pair_loss(X, X2, LABELS, lacking, variant="intra", temperature=1.0)
    inter = pair_loss(X, X2, LABELS, lacking, variant="inter", temperature=1.0)
    assert float(intra.loss) == pytest.approx(0.674735, abs=1e-6)
    assert intra.anchors.tolist() == [2, 2]  # all of them in the first image
    assert float(inter.loss) == pytest.approx(1.403742, abs=1e-6)
    assert inter.anchors.tolist() == [4, 2]


@pytest.mark.parametrize(("classes", "intra", "inter"), [(3, 9, 18), (2, 6, 12), (7, 21, 42)])
def test_divisors_of_acdc_prostate_and_mmwhs(classes, intra, inter):
    one = torch.ones(1)
    for variant, divisor in (("intra", intra), ("inter", inter)):
        complete, anchors = 3 * classes, torch.full((1,), 2 * 3 * classes)
        for normalization in ("correct", "released"):
            found = mean_over_pairs(one, anchors, complete, variant=variant, normalization=normalization)
            assert float(found) == pytest.approx(1 / divisor)


def test_released_normalization():
    sums, anchors = torch.full((10,), 36.0), torch.full((10,), 18)
    released = mean_over_pairs(sums, anchors, 9, variant="inter", normalization="released")
    assert float(released) == pytest.approx(0.2117647, abs=1e-7)
    assert float(released) == pytest.approx(sum(36 / 18**j for j in range(1, 11)) / 10)
    assert float(mean_over_pairs(sums, anchors, 9, variant="inter")) == pytest.approx(2.0)
    last = torch.zeros(10)
    last[-1] = 36.0
    share = mean_over_pairs(last, anchors, 9, variant="inter", normalization="released") / released
    assert float(share) == pytest.approx(0.944, abs=1e-3)


# --- invariances ---


@pytest.mark.parametrize("variant", ["intra", "inter"])
def test_scale_rotation_names_order_and_background_change_nothing(variant):
    generator = torch.Generator().manual_seed(3)
    z, z2 = torch.randn(2, 12, 3, generator=generator)
    y, y2 = torch.arange(12) % 4, torch.arange(12).flip(0) % 4
    options = {"classes": range(1, 4), "draws": 3, "variant": variant}
    expected = float(pair_loss(z, z2, y, y2, **options).loss)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    names = torch.tensor([0, 3, 1, 2])
    noise = torch.randn(5, 3, generator=generator)
    nowhere = torch.zeros(5, dtype=torch.long)
    for changed in (
        pair_loss(7.5 * z, 0.2 * z2, y, y2, **options),
        pair_loss(z @ rotation, z2 @ rotation, y, y2, **options),
        pair_loss(z, z2, names[y], names[y2], **options),
        pair_loss(z2, z, y2, y, **options),
        pair_loss(
            torch.cat([z, noise]), torch.cat([z2, -noise]), torch.cat([y, nowhere]), torch.cat([y2, nowhere]), **options
        ),
    ):
        assert float(changed.loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_an_inter_term_of_equal_images_is_the_intra_term_plus_ln_two(temperature):
    intra = pair_loss(X, X, variant="intra", temperature=temperature)
    inter = pair_loss(X, X, variant="inter", temperature=temperature)
    # Per anchor, intra has one term and inter two; both losses are twice and once the mean over anchors.
    assert float(inter.loss) == pytest.approx(float(intra.loss) + 2 * math.log(2), abs=1e-6)


@pytest.mark.parametrize("variant", ["intra", "inter"])
def test_fewer_than_two_classes_give_zero_with_a_gradient_of_zero(variant):
    one = torch.tensor([1, 1, 0, 0])
    for y, y2 in ((one, one), (0 * one, one), (0 * one, 0 * one)):
        z, z2 = X.clone().requires_grad_(), X2.clone().requires_grad_()
        found = pair_loss(z, z2, y, y2, variant=variant)
        assert found.loss.item() == 0
        assert not found.used.any()
        assert found.anchors.tolist() == [0, 0]
        found.loss.backward()
        assert z.grad.abs().sum() == 0
        assert z2.grad.abs().sum() == 0


def test_classes_of_both_images_count_together_in_inter():
    one, two = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 2, 2])
    assert float(pair_loss(X, X2, one, two, variant="intra").loss) == 0
    found = pair_loss(X, X2, one, two, variant="inter", temperature=1.0)
    total, anchors = slow_pair(X, X2, one, two, classes=range(1, 3), draws=2, temperature=1.0, variant="inter")
    assert anchors == 4
    assert float(found.loss) == pytest.approx(total / 4, abs=1e-6)


def test_a_pair_without_anchors_does_not_count():
    embeddings, one = maps(X, X2), torch.tensor([1, 1, 0, 0])
    labels = torch.stack([torch.stack([LABELS, LABELS]), torch.stack([one, one])])[:, :, None]
    masks = [class_masks(pair, range(1, 3)) for pair in labels]
    means, present = (torch.stack(x) for x in zip(*(class_means(embeddings, m) for m in masks), strict=True))
    indices = [every_voxel_once(pair, range(1, 3), 2) for pair in labels]
    anchors = torch.stack([pick_voxels(embeddings, i) for i in indices])
    found = local_contrastive_loss(anchors, means, present, temperature=1.0)
    assert float(found.loss) == pytest.approx(2.076890, abs=1e-6)
    assert found.used.tolist() == [True, False]


# --- a second implementation ---


@pytest.mark.parametrize("variant", ["intra", "inter"])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_it_equals_the_definition_with_absent_classes(variant, temperature):
    generator = torch.Generator().manual_seed(11)
    count, draws, classes = 6, 3, range(1, 5)
    z = torch.randn(count, 2, 30, 5, generator=generator)
    y = torch.randint(0, 5, (count, 2, 30), generator=generator)
    y[0][y[0] == 2] = 0
    y[1, 0][y[1, 0] > 1] = 0
    y[2, 1] = 0
    y[3] = y[3].clamp(max=1)
    losses = []
    for b in range(count):
        total, anchors = slow_pair(
            z[b, 0], z[b, 1], y[b, 0], y[b, 1], classes=classes, draws=draws, temperature=temperature, variant=variant
        )
        if anchors:
            losses.append((2 if variant == "intra" else 1) * total / anchors)
    rows = z.flatten(0, 1).transpose(1, 2)[:, :, None]
    labels = y.flatten(0, 1)[:, None]
    means, present = class_means(rows, class_masks(labels, classes))
    anchors = pick_voxels(rows, every_voxel_once(labels, classes, draws))
    found = local_contrastive_loss(
        anchors.unflatten(0, (count, 2)),
        means.unflatten(0, (count, 2)),
        present.unflatten(0, (count, 2)),
        temperature=temperature,
        variant=variant,
    )
    assert float(found.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert len(losses) < count


def test_similarities_are_the_mean_cosines():
    found = pair_loss(X, X2, variant="inter", temperature=0.1)
    means, _ = class_means(maps(X, X2), class_masks(torch.stack([LABELS, LABELS]), range(1, 3)))
    same, other = [], []
    for z in (X, X2):
        for voxel, label in zip(z, LABELS, strict=True):
            for image in means:
                for c in (1, 2):
                    cosine = torch.nn.functional.cosine_similarity(voxel, image[c - 1], dim=0)
                    (same if c == label else other).append(float(cosine))
    assert float(found.positive) == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert float(found.negative) == pytest.approx(sum(other) / len(other), abs=1e-6)


# --- gradient, precision, shapes ---


def test_gradient_flows_through_anchors_and_means():
    embeddings = maps(X, X2).double().requires_grad_()
    labels = torch.stack([LABELS, LABELS])[:, None]
    masks = class_masks(labels, range(1, 3))
    indices = torch.tensor([[[0], [2]], [[0], [2]]])  # voxels 1 and 3 are no anchors
    means, present = class_means(embeddings, masks)
    local_contrastive_loss(pick_voxels(embeddings, indices)[None], means[None], present[None]).loss.backward()
    assert (embeddings.grad[:, :, 0, [1, 3]].abs().sum(1) > 0).all()
    assert (embeddings.grad[:, :, 0, [0, 2]].abs().sum(1) > 0).all()


def test_embeddings_of_zero_and_mixed_precision_stay_finite():
    labels = torch.stack([LABELS, LABELS])[:, None]
    embeddings = torch.zeros(2, 2, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means, present = class_means(embeddings, class_masks(labels, range(1, 3)))
        anchors = pick_voxels(embeddings, every_voxel_once(labels, range(1, 3), 3))
        found = local_contrastive_loss(anchors[None], means[None], present[None])
    assert found.loss.dtype == means.dtype == torch.float32
    assert found.loss.item() == pytest.approx(2 * math.log(4), abs=1e-6)
    found.loss.backward()
    assert embeddings.grad.isfinite().all()


def test_autocast_does_not_round():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pair_loss(X, X2, temperature=0.1)
    assert float(found.loss) == pytest.approx(2.060542, abs=1e-6)


def test_volumes_are_voxel_lists_too():
    generator = torch.Generator().manual_seed(0)
    z, y = torch.randn(2, 3, 2, 3, 4, generator=generator), torch.randint(0, 3, (2, 2, 3, 4), generator=generator)
    masks = class_masks(y, range(1, 3))
    assert masks.shape == (2, 2, 24)
    means, _ = class_means(z, masks)
    torch.testing.assert_close(means[1, 0], z[1].movedim(0, -1)[y[1] == 1].mean(0))
    indices = torch.tensor([[[0], [23]], [[5], [7]]])
    torch.testing.assert_close(pick_voxels(z, indices)[0, 1, 0], z[0, :, 1, 2, 3])
    torch.testing.assert_close(pick_voxels(z, indices)[1, 0, 0], z[1, :, 0, 1, 1])
