import math

import pytest
import torch
import torch.nn.functional as F

from scantly.losses import (
    cross_entropy,
    cross_entropy_dice,
    soft_dice,
    soft_dice_per_image,
    weighted_cross_entropy,
)


def test_worked_number_of_the_squared_form():
    probs = torch.tensor([[[[0.2, 0.6]], [[0.8, 0.4]]]])
    loss = soft_dice(probs, torch.tensor([[[1, 0]]]), include_background=False)
    assert loss.item() == pytest.approx(1 - 1.60001 / 1.80001, abs=1e-6)


def test_perfect_prediction_costs_nothing():
    labels = torch.randint(3, (2, 8, 8))
    probs = F.one_hot(labels, 3).movedim(-1, 1).float()
    assert soft_dice(probs, labels).item() == pytest.approx(0, abs=1e-6)


def test_absent_and_not_predicted_class_costs_nothing():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    probs = torch.stack([torch.ones(1, 4, 4), torch.zeros(1, 4, 4)], dim=1)
    assert soft_dice(probs, labels, include_background=False).item() == pytest.approx(0, abs=1e-6)


def test_sums_run_over_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(3, 2, 4, 4, generator=generator).softmax(1)
    labels = torch.randint(2, (3, 4, 4), generator=generator)
    labels[0] = 0
    y, p = (labels == 1).double(), probs[:, 1].double()
    expected = 1 - (2 * (p * y).sum() + 1e-5) / ((p**2).sum() + (y**2).sum() + 1e-5)
    assert soft_dice(probs, labels, include_background=False).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5)])
def test_2d_and_3d_agree_on_the_same_voxels(shape):
    probs = torch.rand(2, 3, *shape).softmax(1)
    labels = torch.randint(3, (2, *shape))
    flat = soft_dice(probs.flatten(2)[..., None], labels.flatten(1)[..., None])
    torch.testing.assert_close(soft_dice(probs, labels), flat)


def test_uniform_logits_cost_ln_c():
    assert cross_entropy(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.long)).item() == pytest.approx(
        math.log(4)
    )


def test_sum_is_half_of_each_and_bf16_is_computed_in_fp32():
    logits = torch.randn(2, 3, 8, 8)
    labels = torch.randint(3, (2, 8, 8))
    expected = 0.5 * (cross_entropy(logits, labels) + soft_dice(logits.softmax(1), labels))
    torch.testing.assert_close(cross_entropy_dice(logits, labels), expected)
    half = logits.bfloat16()
    assert cross_entropy_dice(half, labels).dtype == torch.float32
    torch.testing.assert_close(cross_entropy_dice(half, labels), cross_entropy_dice(half.float(), labels))


def test_worked_number_of_the_dice_per_image():
    first = torch.tensor([[0.9, 0.8], [0.3, 0.2]])
    probs = torch.stack([first, 1 - first])[None]
    target = F.one_hot(torch.tensor([[[0, 0], [1, 1]]]), 2).movedim(-1, 1)
    loss = soft_dice_per_image(probs, target)
    assert loss.item() == pytest.approx(1 - (2 * 1.7 / 4.2 + 2 * 1.5 / 3.8) / 2, abs=1e-6)
    assert loss.item() == pytest.approx(0.200501, abs=1e-6)
    foreground = soft_dice_per_image(probs, target, include_background=False)
    assert foreground.item() == pytest.approx(1 - 0.789474, abs=1e-6)
    background = soft_dice_per_image(probs.flip(1), target.flip(1), include_background=False)
    assert background.item() == pytest.approx(1 - 0.809524, abs=1e-6)


def test_dice_per_image_is_the_mean_over_images_and_an_absent_class_costs_its_share():
    probs = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)).softmax(1).requires_grad_()
    labels = torch.randint(3, (3, 5, 6), generator=torch.Generator().manual_seed(1))  # class 3 is nowhere
    target = F.one_hot(labels, 4).movedim(-1, 1).float()
    losses = []
    for image in range(3):
        for c in range(4):
            p, y = probs[image, c], (labels[image] == c).float()
            losses.append(1 - 2 * (p * y).sum() / (p.sum() + y.sum() + 1e-10))
    loss = soft_dice_per_image(probs, target)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-6)
    assert all(losses[i].item() == 1 for i in (3, 7, 11))
    loss.backward()
    assert probs.grad[:, 3].abs().sum() == 0
    assert probs.grad[:, :3].abs().sum() > 0


def test_dice_per_image_with_a_class_neither_present_nor_predicted_is_finite():
    probs = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 3).clone().requires_grad_()
    loss = soft_dice_per_image(probs, probs.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0.5)
    assert probs.grad.isfinite().all()


def test_dice_per_image_of_volumes_is_computed_in_fp32():
    probs = torch.rand(2, 3, 4, 5, 6).softmax(1).bfloat16()
    target = torch.rand(2, 3, 4, 5, 6).softmax(1)
    loss = soft_dice_per_image(probs, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, soft_dice_per_image(probs.float().flatten(2)[..., None], target.flatten(2)[..., None])
    )


def test_weighted_cross_entropy_is_the_mean_over_voxels():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    weights = torch.tensor([0.1, 0.45, 0.45])
    expected = -(weights.view(1, 3, 1, 1) * target * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(weighted_cross_entropy(logits, target, weights), expected)
    assert weighted_cross_entropy(logits.bfloat16(), target, weights).dtype == torch.float32


def rows(shape=(3, 4, 5), classes=3, seed=0):
    """Random probabilities, labels and a mask that keeps about half."""
    generator = torch.Generator().manual_seed(seed)
    probs = (2 * torch.randn(shape[0], classes, *shape[1:], generator=generator)).softmax(1)
    return probs, torch.randint(classes, shape, generator=generator), torch.rand(shape, generator=generator) < 0.5


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5)])
def test_a_mask_drops_voxels(shape, soft):
    probs, labels, mask = rows(shape)
    target = rows(shape, seed=1)[0] if soft else labels

    def kept(x):
        return x.movedim(1, -1)[mask].T[None] if x.ndim > mask.ndim else x[mask][None]

    for background in (True, False):
        ours = soft_dice(probs, target, mask=mask, include_background=background)
        torch.testing.assert_close(ours, soft_dice(kept(probs), kept(target), include_background=background))
    assert not torch.isclose(ours, soft_dice(probs, target, include_background=False))
    torch.testing.assert_close(soft_dice(probs, target, mask=torch.ones_like(mask)), soft_dice(probs, target))


def test_masked_voxels_get_no_gradient():
    probs, labels, mask = rows()
    probs.requires_grad_()
    soft_dice(probs, labels, mask=mask).backward()
    outside = ~mask[:, None].expand_as(probs)
    assert torch.equal(probs.grad[outside], torch.zeros(int(outside.sum())))
    assert (probs.grad[~outside] != 0).any()


@pytest.mark.parametrize("soft", [False, True])
def test_an_empty_mask_costs_nothing_and_gives_no_gradient(soft):
    probs, labels, mask = rows()
    target = probs.clone() if soft else labels
    probs.requires_grad_()
    loss = soft_dice(probs, target, mask=torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(probs.grad, torch.zeros_like(probs))


def test_a_mask_of_weights_weighs_each_product():
    """p = (0.8, 0.4), y = (1, 0.5), m = (1, 0.5): 2 (0.8 + 0.1) over 0.64 + 0.08 + 1 + 0.125."""
    probs, target = torch.tensor([[[0.8, 0.4]]]), torch.tensor([[[1.0, 0.5]]])
    loss = soft_dice(probs, target, mask=torch.tensor([[1.0, 0.5]]))
    assert loss.item() == pytest.approx(1 - 1.80001 / 1.84501, abs=1e-6)


def test_soft_targets_by_hand():
    """Class 0: p = (0.9, 0.3), y = (0.8, 0.5): 2 (0.72 + 0.15) over 0.81 + 0.09 + 0.64 + 0.25; class 1 the rest."""
    first, target = torch.tensor([0.9, 0.3]), torch.tensor([0.8, 0.5])
    loss = soft_dice(torch.stack([first, 1 - first])[None], torch.stack([target, 1 - target])[None])
    expected = 1 - (1.74001 / 1.79001 + 0.74001 / 0.79001) / 2
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    probs, labels, _ = rows()
    torch.testing.assert_close(soft_dice(probs, F.one_hot(labels, 3).movedim(-1, 1)), soft_dice(probs, labels))


@pytest.mark.parametrize("soft", [False, True])
def test_soft_dice_keeps_double_precision_and_no_other(soft):
    probs, labels, mask = rows()
    target = rows(seed=1)[0] if soft else labels
    assert soft_dice(probs.double(), target, mask=mask).dtype == torch.float64
    assert soft_dice(probs.bfloat16(), target, mask=mask).dtype == torch.float32
    double = soft_dice(probs.double(), target.double() if soft else target, mask=mask)
    assert soft_dice(probs, target, mask=mask).item() == pytest.approx(double.item(), abs=1e-6)
