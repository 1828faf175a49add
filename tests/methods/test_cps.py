"""CPS: symmetry, isolation, and that the two networks differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from consistency_tasks import make, make_batch

from scantly.methods.base import Progress, Stage
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

AT = Progress(10, 10)
FULL = {"consistency": 1.5, "rampup_iterations": 0}


def test_the_networks_begin_differently():
    method = make("cps")
    first, second = (torch.cat([p.flatten() for p in net.parameters()]) for net in (method.first, method.second))
    assert not torch.allclose(first, second)


def test_swapping_the_networks_changes_nothing():
    method, batch = make("cps", **FULL), make_batch()
    one = method.losses(batch, AT)
    method.first, method.second = method.second, method.first
    other = method.losses(batch, AT)
    for name in ("supervised", "cross"):
        torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize("rows", ["unlabeled", "all"])
def test_each_learns_the_others_labels(rows):
    method, batch = make("cps", rows=rows, **FULL).eval(), make_batch()
    images = batch.images if rows == "all" else batch.unlabeled
    first, second = method.first(images), method.second(images)
    expected = 1.5 * (F.cross_entropy(first, second.argmax(1)) + F.cross_entropy(second, first.argmax(1)))
    torch.testing.assert_close(method.losses(batch, AT)["cross"], expected)


def test_no_gradient_crosses_over():
    """With the other's outputs cut off the gradient of one network stays the same."""
    method, batch = make("cps", **FULL), make_batch()
    sum(method.losses(batch, AT).values()).backward()
    both = [p.grad.clone() for p in method.first.parameters()]
    method.zero_grad()
    method.second.requires_grad_(False)
    sum(method.losses(batch, AT).values()).backward()
    for p, gradient in zip(method.first.parameters(), both, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert all(p.grad is None for p in method.second.parameters())


def test_a_step_updates_both_and_each_has_its_optimizer():
    method, batch = make("cps", **FULL), make_batch()
    handles = TrainingHandles(method, Stage(), TrainingSection(lr=0.1), 10)
    assert set(handles.rates()) == {"first", "second"}
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.step(batch, AT, handles)
    for name in ("first.head.weight", "second.head.weight"):
        assert not torch.equal(method.state_dict()[name], before[name])


def test_who_predicts():
    for name in ("first", "second"):
        method = make("cps", predict_with=name)
        assert method.predictor is getattr(method, name)


def test_the_rate_is_advanced_before_the_step_as_in_the_public_code():
    """0.01 (1 - t / 30000)^0.9 at step t."""
    handles = TrainingHandles(make("cps"), Stage(), TrainingSection(lr=0.01, power=0.9, schedule="poly"), 30_000)
    for step, expected in ((0, 0.01), (1, 0.009999699999499994), (29_999, 9.345248855829638e-07)):
        handles.set_iteration(step)
        assert handles.rates() == {"first": pytest.approx(expected), "second": pytest.approx(expected)}
