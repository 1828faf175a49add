"""Losses that are ratios of sums over the batch: two processes with unequal sums against one with the whole batch."""

from __future__ import annotations

import pytest
import torch

from scantly.losses import (
    confident_cross_entropy,
    cross_entropy_dice,
    masked_cross_entropy,
    masked_divergence,
    masked_quantiles,
    mutual_consistency,
    pyramid_consistency,
    soft_dice,
)
from scantly.losses.local_contrastive import mean_over_pairs
from scantly.losses.patch_contrastive import closed_form_contrast, discrete_contrast
from scantly.methods.parts.memory_bank import MemoryBank
from scantly.ranks import rank, world_size
from two_ranks import run_on_two_ranks

ROWS, CLASSES = 4, 3


def part(values, first=None):
    """This rank's rows; the first rank has so many, else half."""
    if world_size() == 1:
        return values
    first = len(values) // 2 if first is None else first
    return values[first:] if rank() else values[:first]


def logits(seed=0, rows=ROWS):
    return torch.randn(rows, CLASSES, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(seed=0):
    """Labels of which the first half of the rows lacks the last class."""
    labels = torch.randint(CLASSES, (ROWS, 5, 4), generator=torch.Generator().manual_seed(seed))
    labels[: ROWS // 2].clamp_(max=CLASSES - 2)
    return labels


def mask():
    """Nothing is trusted in the first half."""
    found = torch.rand(ROWS, 5, 4, generator=torch.Generator().manual_seed(3)) > 0.4
    found[: ROWS // 2] = False
    return found


def dice(x, **settings):
    return soft_dice(x.softmax(1), part(maps()), **settings)


LOSSES = {
    "dice": dice,
    "dice_plain": lambda x: dice(x, squared=False, include_background=False),
    "dice_smooth": lambda x: dice(x, smooth=1e-10, smooth_numerator=False),
    "dice_masked": lambda x: dice(x, mask=part(mask())),
    "cross_entropy_dice": lambda x: cross_entropy_dice(x, part(maps())),
    "masked": lambda x: masked_cross_entropy(x, part(maps()), part(mask()), normalize="masked"),
    "masked_all": lambda x: masked_cross_entropy(x, part(maps()), part(mask())),
    "confident": lambda x: confident_cross_entropy(
        x, torch.where(part(mask()), part(maps()), -1), part(mask()).double(), threshold=0.5
    )[0],
    "divergence": lambda x: masked_divergence(x, part(logits(1)), part(mask())),
    "mutual": lambda x: mutual_consistency([x, 2 * x.flip(1)], temperature=0.5),
    "pyramid": lambda x: pyramid_consistency([x, 3 * x.flip(1), x.flip(2)])[0],
    "pairs": lambda x: mean_over_pairs(x.flatten(1).exp().sum(1), part(torch.tensor([0, 0, 6, 3])), 9, variant="inter"),
    "pairs_released": lambda x: mean_over_pairs(
        x.flatten(1).exp().sum(1), part(torch.tensor([0, 0, 6, 3])), 2, variant="intra", normalization="released"
    ),
}


def vectors(count, seed):
    rows = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def closed(x, first):
    keys = vectors(9, 1).view(3, 3, 6)
    covariances = keys.transpose(1, 2) @ keys / 3
    groups = part(torch.tensor([0, 0, 1, 2, 2]), first)
    weights = {"temperature": 0.5, "covariance_weight": 1.0, "negative_weight": 8.0}
    return closed_form_contrast(x, groups, keys.mean(1), covariances, **weights)


def discrete(x, first):
    keys, key_groups = vectors(9, 1), torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    groups = part(torch.tensor([0, 0, 1, 2, 3]), first)
    return discrete_contrast(x, groups, keys, key_groups, temperature=0.5)


def every_loss():
    """Value, and the gradient that counts: the mean over the ranks is what is minimized."""
    torch.Tensor.float = torch.Tensor.double
    found = {}
    for name, loss in LOSSES.items():
        x = part(logits()).clone().requires_grad_()
        value = loss(x)
        found[name] = value.detach(), torch.autograd.grad(value, x)[0] / world_size()
    for name, loss in {"closed": closed, "discrete": discrete}.items():
        for first in (2, 4, 5):  # the second rank has three of five anchors, one, or none
            x = part(vectors(5, 0), first).clone().requires_grad_()
            value = loss(x, first)
            found[name, first] = value.detach(), torch.autograd.grad(value, x)[0] / world_size()
    return found


@pytest.fixture(scope="module")
def answers():
    return run_on_two_ranks(every_loss)


@pytest.fixture
def whole(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return every_loss()


def test_values_and_gradients_are_those_of_the_whole_batch(answers, whole):
    for name, (value, gradient) in whole.items():
        values = torch.stack([answer[name][0] for answer in answers])
        torch.testing.assert_close(values.mean(), value, rtol=1e-12, atol=1e-12, msg=str(name))
        found = torch.cat([answer[name][1] for answer in answers])
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-13, msg=str(name))


def by_hand():
    labels = torch.tensor([[[1, 1]]]) if rank() == 0 else torch.tensor([[[0, 0]]])
    probs = torch.tensor([[[[0.5, 0.5]], [[0.5, 0.5]]]])
    row = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]])
    trusted = torch.tensor([[True, False, True]]) if rank() == 0 else torch.tensor([[False, True, False]])
    values = torch.tensor([0.1, 0.2, 0.3]) if rank() == 0 else torch.tensor([0.4, 0.5, 9.0])
    return (
        soft_dice(probs, labels, smooth=1e-12),
        masked_cross_entropy(row, torch.tensor([[0, 0, 1]]), trusted, normalize="masked"),
        masked_quantiles(values, values < 1, (0.2, 0.8)),
        masked_quantiles(values, (values > 8), (0.5,)),
        masked_quantiles(values, torch.zeros(3, dtype=torch.bool), (0.5,)),
    )


def test_worked_numbers():
    for dice_loss, cross_entropy, quantiles, single, none in run_on_two_ranks(by_hand):
        # per class 1 - 2 * 1 / (4 * 0.25 + 2) = 1 / 3; the mean of the ranks' own losses is 2 / 3
        assert dice_loss.item() == pytest.approx(1 / 3)
        # (0.126928 + 0.048587 + 0.693147) / 3 voxels; the mean of the ranks' means is 0.3905
        assert cross_entropy.item() == pytest.approx(0.289554, abs=1e-6)
        assert quantiles.tolist() == pytest.approx([0.18, 0.42])
        assert single.tolist() == pytest.approx([9.0])
        assert none.tolist() == [float("inf")]


def pushed():
    banks = MemoryBank(5, (2,)), MemoryBank(5, (2,))
    states = []
    for step in range(3):
        rows = torch.arange(3.0)[:, None].expand(-1, 2) + 10 * step + 100 * rank()
        banks[0].push(rows)
        banks[1].push(rows, torch.tensor([[True, False, True], [False, False, False]][(step + rank()) % 2]))
        states.append([(bank.values[:, 0].tolist(), int(bank.filled), int(bank.pointer)) for bank in banks])
    return states


def test_banks_hold_all_ranks_rows_in_their_order():
    one, other = run_on_two_ranks(pushed)
    assert one == other
    assert one[0] == [([102.0, 1.0, 2.0, 100.0, 101.0], 5, 1), ([0.0, 2.0, 0.0, 0.0, 0.0], 2, 2)]
    assert one[1][1] == ([0.0, 2.0, 110.0, 112.0, 0.0], 4, 4)
    assert one[2][1] == ([22.0, 2.0, 110.0, 112.0, 20.0], 5, 1)
