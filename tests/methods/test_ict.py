"""ICT: the worked numbers of its specification, and what is mixed."""

from __future__ import annotations

import pytest
import torch
from consistency_tasks import Fixed, make, make_batch, row_of
from torch import nn

from scantly.errors import ConfigError
from scantly.methods.base import Progress


class InTurn(nn.Module):
    """Each pass is another network's."""

    def __init__(self, *networks):
        super().__init__()
        self.networks = list(networks)

    def forward(self, images):
        return self.networks.pop(0)(images)


def test_worked_mixture(monkeypatch):
    """Teacher (0.8, 0.2) and (0.4, 0.6), share 0.25 of the second: (0.7, 0.3) against the student's (0.6, 0.4)."""
    method = make("ict")
    method.student = Fixed([[0.6], [0.4]])
    monkeypatch.setattr(method, "shares", lambda images: torch.full((1, 1, 1, 1), 0.25))
    method.teacher = InTurn(Fixed([[0.8], [0.2]]), Fixed([[0.4], [0.6]]))
    method.config = method.config.model_copy(update={"teacher_buffers": "own"})
    batch = row_of(1)
    batch.unlabeled = batch.unlabeled.expand(2, -1, -1, -1)
    method.losses(batch, Progress(0, 10))
    assert method.pop_logged()["disagreement"].item() == pytest.approx(0.01, abs=1e-6)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.3])
def test_the_student_sees_labeled_images_and_mixtures(share, monkeypatch):
    method, seen = make("ict"), {}
    monkeypatch.setattr(method, "shares", lambda images: torch.full((len(images), 1, 1, 1), share))
    method.student.register_forward_hook(lambda module, args, output: seen.update(images=args[0]))
    batch = make_batch(labeled=2, unlabeled=5)
    method.losses(batch, Progress(0, 10))
    assert len(seen["images"]) == 2 + 2  # the odd unlabeled row takes no part
    assert torch.equal(seen["images"][:2], batch.labeled)
    expected = (1 - share) * batch.unlabeled[:2] + share * batch.unlabeled[2:4]
    torch.testing.assert_close(seen["images"][2:], expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equal_images_and_equal_networks_agree_for_every_share(share, monkeypatch):
    method = make("ict").eval()
    monkeypatch.setattr(method, "shares", lambda images: torch.full((len(images), 1, 1, 1), share))
    batch = make_batch()
    batch.unlabeled = batch.unlabeled[:1].expand(2, -1, -1, -1)
    assert method.losses(batch, Progress(0, 10))["consistency"].item() == pytest.approx(0, abs=1e-10)


def test_shares_are_beta_distributed_and_drawn_from_the_methods_generator():
    method = make("ict")
    images = torch.zeros(20_000, 1, 1, 1)
    shares = method.shares(images)
    assert shares.shape == (20_000, 1, 1, 1)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
    assert shares.var().item() == pytest.approx(1 / (4 * 1.4), abs=0.005)  # of Beta(0.2, 0.2)
    method.generator.manual_seed(0)
    torch.manual_seed(99)
    assert torch.equal(method.shares(images), shares)


def test_targets_are_probabilities_without_gradient():
    method = make("ict", consistency=1.0, rampup_iterations=0)
    method.losses(make_batch(), Progress(10, 10))["consistency"].backward()
    assert all(p.grad is not None for p in method.student.head.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())


def test_one_unlabeled_row_cannot_be_mixed():
    with pytest.raises(ConfigError, match="unlabeled_batch_size to 2 or more"):
        make("ict").losses(make_batch(unlabeled=1), Progress(0, 10))
