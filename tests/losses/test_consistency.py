import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly.losses import (
    IGNORED,
    confident_cross_entropy,
    cross_entropy,
    entropy,
    masked_cross_entropy,
    masked_divergence,
    masked_quantiles,
    soft_dice,
)


def two_classes(target_probs):
    """Logits of which class 1, the label, has these probabilities; ``(1, 2, 1, n)``."""
    probs = torch.tensor(target_probs)
    return torch.stack([1 - probs, probs]).log()[None, :, None]


def test_worked_numbers_of_the_supervised_terms():
    probs = torch.tensor([[[[0.8, 0.4]], [[0.2, 0.6]]]])
    labels = torch.tensor([[[0, 1]]])
    assert soft_dice(probs, labels).item() == pytest.approx(0.126983, abs=1e-6)
    assert cross_entropy(probs.log(), labels).item() == pytest.approx(0.366985, abs=1e-6)


CONFIDENCE = torch.tensor([[[0.99, 0.98, 0.5, 0.6]]])
LOGITS = two_classes([0.9, 0.8, 0.5, 0.7])
LABELS = torch.ones(1, 1, 4, dtype=torch.long)


def test_worked_number_of_the_pseudo_label_loss():
    loss, weights = confident_cross_entropy(LOGITS, LABELS, CONFIDENCE, threshold=0.97)
    assert weights.tolist() == [0.5]
    assert loss.item() == pytest.approx(0.172291, abs=1e-6)


def test_voxels_of_an_image_without_confident_ones_count_in_the_divisor():
    logits, labels = LOGITS.repeat(2, 1, 1, 1), LABELS.repeat(2, 1, 1)
    loss, weights = confident_cross_entropy(logits, labels, torch.cat([CONFIDENCE, 0.5 * CONFIDENCE]), threshold=0.97)
    assert weights.tolist() == [0.5, 0.0]
    assert loss.item() == pytest.approx(0.086145, abs=1e-6)


def test_no_confident_voxel_costs_zero_and_can_be_differentiated():
    logits = LOGITS.clone().requires_grad_()
    loss, _ = confident_cross_entropy(logits, LABELS, 0.5 * CONFIDENCE, threshold=0.97)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_a_batch_fitted_exactly_costs_zero_not_nan():
    logits = torch.stack([torch.full((1, 4), -200.0), torch.full((1, 4), 200.0)])[None].requires_grad_()
    loss, _ = confident_cross_entropy(logits, LABELS, CONFIDENCE, threshold=0.97)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.isfinite().all()


def test_voxels_fitted_exactly_drop_out_of_the_mean():
    fitted = torch.tensor([-200.0, 200.0]).view(1, 2, 1, 1)
    logits = torch.cat([LOGITS[..., :2], fitted, LOGITS[..., 3:]], dim=3)
    loss, _ = confident_cross_entropy(logits, LABELS, CONFIDENCE, threshold=0.97)
    assert loss.item() == pytest.approx(-0.5 * (math.log(0.9) + math.log(0.8) + math.log(0.7)) / 3, abs=1e-6)


def test_ignored_voxels_count_neither_in_the_weight_nor_in_the_mean():
    labels, confidence = LABELS.clone(), CONFIDENCE.clone()
    labels[..., 1], confidence[..., 1] = IGNORED, 0
    loss, weights = confident_cross_entropy(LOGITS, labels, confidence, threshold=0.97)
    assert weights.item() == pytest.approx(1 / 3)
    expected = -(math.log(0.9) + math.log(0.5) + math.log(0.7)) / 3 / 3
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    everywhere = torch.full_like(labels, IGNORED)
    assert confident_cross_entropy(LOGITS, everywhere, 0 * confidence, threshold=0.97)[0].item() == 0


@pytest.mark.parametrize("size", [(4, 5), (3, 4, 5)])
def test_pseudo_label_loss_is_that_of_slow_loops(size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, *size, generator=generator)
    labels = torch.randint(-1, 4, (3, *size), generator=generator)
    confidence = torch.rand(3, *size, generator=generator) * (labels >= 0)
    total, count = 0.0, 0
    for row in range(3):
        known = labels[row] >= 0
        weight = float((confidence[row] >= 0.6).sum()) / float(known.sum())
        log_probs = logits[row].double().log_softmax(0)
        for position in known.nonzero().tolist():
            total += -weight * float(log_probs[(int(labels[(row, *position)]), *position)])
            count += 1
    loss, _ = confident_cross_entropy(logits, labels, confidence, threshold=0.6)
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    half, _ = confident_cross_entropy(logits.bfloat16(), labels, confidence, threshold=0.6)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss.item(), rel=0.02)


def test_entropy_of_uniform_and_of_certain_predictions():
    probs = torch.tensor([[[[0.25, 1.0]], [[0.25, 0.0]], [[0.25, 0.0]], [[0.25, 0.0]]]])
    assert entropy(probs)[0, 0].tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)


def test_divergence_of_equal_predictions_and_over_an_empty_mask_is_zero():
    logits = torch.randn(2, 3, 4, 4)
    assert masked_divergence(logits, logits.clone(), torch.ones(2, 4, 4)).item() == pytest.approx(0, abs=1e-7)
    assert masked_divergence(logits, torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4)).item() == 0


def test_divergence_is_the_mean_over_images_of_their_masked_means():
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 2, 3, 4, 4, generator=generator)
    mask = torch.rand(2, 4, 4, generator=generator)
    expected = 0.0
    for row in range(2):
        kl = F.kl_div(logits[row].log_softmax(0), target[row].softmax(0), reduction="none").sum(0)
        expected += float((mask[row] * kl).sum() / mask[row].sum()) / 2
    logits, target = logits.requires_grad_(), target.requires_grad_()
    loss = masked_divergence(logits, target, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert logits.grad.abs().sum() > 0
    assert target.grad is None


def test_worked_numbers_of_the_entropy_masks():
    h = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    low, high = masked_quantiles(h, torch.ones(5, dtype=torch.bool), (0.2, 0.8))
    assert [low.item(), high.item()] == pytest.approx([0.18, 0.42], abs=1e-6)
    assert h[h <= low].tolist() == pytest.approx([0.1])
    assert h[h >= high].tolist() == pytest.approx([0.5])


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=30),
    share=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_quantiles_under_a_mask_are_those_of_numpy(values, share, seed):
    h = torch.tensor(values)
    mask = torch.rand(len(h), generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[0] = True
    (found,) = masked_quantiles(h, mask, (share,))
    assert found.item() == pytest.approx(np.quantile(h[mask].double().numpy(), share), abs=1e-5)


def test_quantiles_under_an_empty_mask_are_infinite():
    for length in (1, 4):
        assert masked_quantiles(torch.rand(length), torch.zeros(length, dtype=torch.bool), (0.0, 0.3)).isinf().all()


# Three voxels of the specification of GapMatch: confidences 0.97, 0.80, 0.99 with threshold 0.95.
STRONG_LOGITS = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
TRUSTED = torch.tensor([[0.97, 0.80, 0.99]]) >= 0.95
PSEUDO = torch.tensor([[0, 0, 1]])


@pytest.mark.parametrize(("normalize", "expected"), [("all", 0.058505), ("masked", 0.087758)])
def test_worked_numbers_of_the_masked_cross_entropy(normalize, expected):
    assert TRUSTED.tolist() == [[True, False, True]]
    loss = masked_cross_entropy(STRONG_LOGITS, PSEUDO, TRUSTED, normalize=normalize)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    one_hot = F.one_hot(PSEUDO, 2).movedim(-1, 1).float()
    soft = masked_cross_entropy(STRONG_LOGITS, one_hot, TRUSTED, normalize=normalize)
    assert soft.item() == pytest.approx(expected, abs=1e-6)


def test_masked_cross_entropy_with_a_full_mask_is_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, 6, generator=generator)
    labels = torch.randint(3, (2, 4, 5, 6), generator=generator)
    full = torch.ones_like(labels, dtype=torch.bool)
    for normalize in ("all", "masked"):
        torch.testing.assert_close(
            masked_cross_entropy(logits, labels, full, normalize=normalize), cross_entropy(logits, labels)
        )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("normalize", ["all", "masked"])
def test_masked_cross_entropy_over_an_empty_mask_is_zero_and_gives_no_gradient(normalize, soft):
    logits = STRONG_LOGITS.clone().requires_grad_()
    targets = torch.full((1, 2, 3), 0.5) if soft else PSEUDO
    loss = masked_cross_entropy(logits, targets, torch.zeros_like(TRUSTED), normalize=normalize)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_voxels_outside_the_mask_get_no_gradient_and_soft_targets_are_weighed():
    logits = torch.tensor([[[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]], requires_grad=True)
    targets = torch.tensor([[[0.25, 0.5, 0.9], [0.75, 0.5, 0.1]]])
    mask = torch.tensor([[True, True, False]])
    loss = masked_cross_entropy(logits, targets, mask)
    voxels = [
        0.25 * math.log1p(math.exp(-1)) + 0.75 * math.log1p(math.exp(1)),
        0.5 * (math.log1p(math.exp(2)) + math.log1p(math.exp(-2))),
    ]
    assert loss.item() == pytest.approx(sum(voxels) / 3, abs=1e-6)
    loss.backward()
    assert torch.equal(logits.grad[..., 2], torch.zeros(1, 2))
    assert (logits.grad[..., 0] != 0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("soft", [False, True])
def test_the_precision_of_the_masked_cross_entropy(dtype, expected, soft):
    targets = F.one_hot(PSEUDO, 2).movedim(-1, 1).float() if soft else PSEUDO
    loss = masked_cross_entropy(STRONG_LOGITS.to(dtype), targets, TRUSTED)
    assert loss.dtype == expected
    assert loss.item() == pytest.approx(0.058505, abs=1e-6)
