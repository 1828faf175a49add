"""The Pi-model: what differs between its passes, and what learns from their difference."""

from __future__ import annotations

import pytest
import torch
from consistency_tasks import make, make_batch

from scantly.losses import cross_entropy_dice
from scantly.methods.base import Progress

AT = Progress(10, 10)
FULL = {"consistency": 1.0, "rampup_iterations": 0}


def test_without_noise_and_dropout_the_passes_agree():
    batch = make_batch()
    assert make("pi_model", noise_std=0.0, **FULL).losses(batch, AT)["consistency"].item() == pytest.approx(
        0, abs=1e-12
    )
    assert make("pi_model", noise_std=0.0, dropout=0.5, **FULL).losses(batch, AT)["consistency"] > 0
    assert make("pi_model", **FULL).losses(batch, AT)["consistency"] > 0


@pytest.mark.parametrize("rows", ["all", "unlabeled"])
@pytest.mark.parametrize("noisy", [1, 2])
def test_the_terms(rows, noisy):
    method, batch = make("pi_model", rows=rows, noisy_passes=noisy, **FULL).eval(), make_batch(1, 3)
    terms = method.losses(batch, AT)
    method.generator.manual_seed(0)
    images = batch.images
    first = method.network(method.config.noisy(images, method.generator) if noisy == 2 else images)
    start = 0 if rows == "all" else 1
    second = method.network(method.config.noisy(images[start:], method.generator))
    torch.testing.assert_close(terms["supervised"], cross_entropy_dice(first[:1], batch.labels))
    expected = (first[start:].softmax(1) - second.softmax(1)).square().mean()
    torch.testing.assert_close(terms["consistency"], expected)
    assert (first[start:] != second).any()


def test_both_passes_take_the_gradient():
    """The gradient is that of both: with one detached it is another."""
    method, batch = make("pi_model", rows="unlabeled", **FULL).eval(), make_batch()
    given = list(method.network.parameters())
    both = torch.autograd.grad(method.losses(batch, AT)["consistency"], given)
    method.generator.manual_seed(0)
    first = method.network(batch.images)[2:].softmax(1)
    second = method.network(method.config.noisy(batch.unlabeled, method.generator)).softmax(1)
    halves = [
        torch.autograd.grad((a - b).square().mean(), given, retain_graph=True)
        for a, b in ((first, second.detach()), (first.detach(), second))
    ]
    for whole, one, other in zip(both, *halves, strict=True):
        torch.testing.assert_close(whole, one + other)
    assert any(not torch.allclose(whole, one) for whole, one in zip(both, halves[0], strict=True))


def test_noise_is_clamped_and_drawn_from_the_methods_generator():
    method, batch = make("pi_model", noise_std=5.0, noise_limit=0.2), make_batch()
    noisy = method.config.noisy(batch.unlabeled, method.generator) - batch.unlabeled
    assert noisy.abs().max().item() == pytest.approx(0.2)
    one = make("pi_model", **FULL).losses(batch, AT)
    torch.rand(5)
    again = make("pi_model", **FULL).losses(batch, AT)
    assert torch.equal(one["consistency"], again["consistency"])
