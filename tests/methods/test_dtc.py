"""DTC: which loss reaches which head, the ramp, and agreement of the two tasks."""

from __future__ import annotations

import math

import pytest
import torch
from consistency_tasks import make, make_batch

from scantly.losses import signed_distance, soft_dice, soft_mask
from scantly.methods.base import Progress

AT = Progress(10, 10)
FULL = {"rampup_iterations": 0}


def outputs(method, batch):
    return method.network.both(batch.images)


class Told(torch.nn.Module):
    """Gives the logits and distances it is made with."""

    def __init__(self, logits, distances):
        super().__init__()
        self.logits, self.distances = torch.nn.Parameter(logits), torch.nn.Parameter(distances)

    def both(self, images):
        assert len(images) == len(self.logits)
        return self.logits, self.distances


@pytest.mark.parametrize("dims", [2, 3])
def test_the_terms_are_those_of_the_paper(dims):
    method, batch = make("dtc", classes=3, dims=dims, **FULL).eval(), make_batch(2, 3, classes=3, dims=dims)
    terms = method.losses(batch, AT)
    logits, distances = outputs(method, batch)
    masks = torch.stack([batch.labels == 1, batch.labels == 2], 1)
    targets = torch.stack([signed_distance(masks[:, i]) for i in range(2)], 1)
    dice = [soft_dice(logits[:2, [i]].sigmoid(), masks[:, [i]].float()) for i in range(2)]
    torch.testing.assert_close(terms["supervised"], sum(dice) / 2)
    torch.testing.assert_close(terms["distance"], 0.3 * ((distances[:2] - targets) ** 2).mean())
    agreement = ((torch.sigmoid(-1500 * distances) - logits.sigmoid()) ** 2).mean()
    torch.testing.assert_close(terms["consistency"], agreement)


def test_tasks_that_agree_cost_nothing():
    distances = torch.tensor([[[[-0.002, 0.0, 0.001]]], [[[0.003, -0.001, 0.0]]]], dtype=torch.float64)
    method, batch = make("dtc", **FULL), make_batch(1, 1)
    batch.labeled = batch.unlabeled = torch.zeros(1, 1, 1, 3)
    batch.labels = torch.tensor([[[1, 0, 0]]])
    method.network = Told(soft_mask(distances).logit(), distances)
    assert method.losses(batch, AT)["consistency"].item() == pytest.approx(0, abs=1e-12)
    method.network = Told(soft_mask(distances).logit(), -distances)
    assert method.losses(batch, AT)["consistency"].item() > 0.1


def test_the_consistency_counts_all_rows_and_both_heads_learn_from_it():
    method = make("dtc", **FULL)
    method.network = Told(torch.zeros(4, 1, 16, 16), torch.full((4, 1, 16, 16), 0.0005))
    method.losses(make_batch(1, 3), AT)["consistency"].backward()
    for told in (method.network.logits, method.network.distances):
        assert (told.grad != 0).all()


def test_the_supervised_terms_use_labeled_rows_alone():
    method = make("dtc", consistency=0.0)
    method.network = Told(torch.zeros(4, 1, 16, 16), torch.zeros(4, 1, 16, 16))
    terms = method.losses(make_batch(1, 3), AT)
    (terms["supervised"] + terms["distance"]).backward()
    for told in (method.network.logits, method.network.distances):
        assert told.grad[0].abs().sum() > 0
        assert not told.grad[1:].any()


@pytest.mark.parametrize(("iteration", "epoch"), [(0, 0), (149, 0), (150, 1), (3000, 20), (5999, 39)])
def test_the_ramp(iteration, epoch):
    method = make("dtc")
    expected = math.exp(-5 * (1 - epoch / 40) ** 2)
    assert method.config.consistency_weight(Progress(iteration, 6000)) == pytest.approx(expected)
    assert method.config.consistency_weight(Progress(iteration * 5, 30_000)) == pytest.approx(expected)


def test_a_batch_without_the_class_is_finite_and_the_switch_acts():
    batch = make_batch()
    batch.labels = torch.zeros_like(batch.labels)
    ours, official = (make("dtc", empty_distance=empty).losses(batch, AT) for empty in ("outside", "zero"))
    assert all(torch.isfinite(value) for value in [*ours.values(), *official.values()])
    assert ours["distance"] != official["distance"]
    batch.labels = torch.ones_like(batch.labels)
    assert all(torch.isfinite(value) for value in make("dtc").losses(batch, AT).values())


def test_bfloat16_costs_what_float32_does():
    """The steep sigmoid is not computed in half precision."""
    method, batch = make("dtc", **FULL).eval(), make_batch()
    plain = method.losses(batch, AT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = method.losses(batch, AT)
    for name, value in plain.items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], value, rtol=0.1, atol=0.02)
