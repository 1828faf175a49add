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
