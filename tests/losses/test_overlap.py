import math

import pytest
import torch
import torch.nn.functional as F

from scantly.losses import cross_entropy, cross_entropy_dice, soft_dice


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
