"""SASSNet: the judge sees distances, who learns from what, and the published numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from consistency_tasks import make, make_batch

from scantly.losses import signed_distance, soft_dice
from scantly.methods import catalogue
from scantly.methods.base import Batch, Progress, Stage, Task
from scantly.networks.discriminator import Discriminator
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

AT = Progress(10, 10)
FULL = {"consistency": 1.0, "rampup_iterations": 0}


def test_the_published_number_of_parameters():
    judge = Discriminator(3, 1, 1)
    assert sum(p.numel() for p in judge.parameters()) == 11_020_290
    assert sum(p.numel() for p in Discriminator(2, 1, 1).parameters()) == 2_762_754 - 3 * 64 * 16


def test_an_undecided_judge_costs_ln_2():
    method = make("sassnet", **FULL)
    with torch.no_grad():
        method.judge.classify.weight.zero_()
        method.judge.classify.bias.zero_()
    batch = make_batch(labeled=2, unlabeled=3)
    assert method.losses(batch, AT)["adversarial"].item() == pytest.approx(math.log(2))
    assert method.judgment(batch).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(("iteration", "weight"), [(0, 6.74e-5), (3000, 0.002865), (5999, 0.00997)])
def test_the_ramp(iteration, weight):
    method = make("sassnet")
    assert method.config.consistency_weight(Progress(iteration, 6000)) == pytest.approx(weight, rel=1e-3)


@pytest.mark.parametrize("dims", [2, 3])
def test_what_the_network_minimizes(dims):
    method, batch = make("sassnet", classes=3, dims=dims, **FULL).eval(), make_batch(2, 3, classes=3, dims=dims)
    terms = method.losses(batch, AT)
    logits, distances = method.network.both(batch.images)
    masks = torch.stack([batch.labels == 1, batch.labels == 2], 1)
    targets = torch.stack([signed_distance(masks[:, i]) for i in range(2)], 1)
    torch.testing.assert_close(terms["supervised"], soft_dice(logits[:2].sigmoid(), masks.float()))
    torch.testing.assert_close(terms["distance"], 0.3 * ((distances[:2] - targets) ** 2).mean())
    verdicts = method.judge(distances[2:], batch.unlabeled)
    torch.testing.assert_close(terms["adversarial"], F.cross_entropy(verdicts, torch.ones(3).long()))


def test_what_the_judge_minimizes():
    method, batch = make("sassnet").eval(), make_batch(labeled=1, unlabeled=3)
    verdicts = method.judge(method.network.both(batch.images)[1], batch.images)
    torch.testing.assert_close(method.judgment(batch), F.cross_entropy(verdicts, torch.tensor([1, 0, 0, 0])))


def test_the_judge_teaches_the_distances_and_not_the_masks_head():
    method = make("sassnet", **FULL)
    method.losses(make_batch(), AT)["adversarial"].backward()
    assert all(p.grad is None for p in method.network.backbone.head.parameters())
    assert all(p.grad.abs().sum() > 0 for p in method.network.distance_head.parameters())
    assert method.network.backbone.encoder[0][0].weight.grad.abs().sum() > 0


def test_neither_loss_reaches_the_others_weights():
    method, batch = make("sassnet", **FULL), make_batch()
    handles = TrainingHandles(method, Stage(), TrainingSection(lr=0.1, weight_decay=0.0), 10)
    assert set(handles.rates()) == {"network", "judge"}
    assert handles.rates()["judge"] == pytest.approx(1e-4)
    seen, update = {}, handles.update

    def watched(name):
        seen[name] = {key for key, p in method.named_parameters() if p.grad is not None}
        update(name)

    handles.update = watched
    method.step(batch, AT, handles)
    for name in ("network", "judge"):
        assert seen[name] == {key for key, _ in method.named_parameters() if key.startswith(f"{name}.")}


def test_the_judges_step_is_its_own_alone():
    """Its gradient holds nothing of the network's step, which passes through it."""
    method, other, batch = make("sassnet", **FULL).eval(), make("sassnet", **FULL).eval(), make_batch()
    settings = TrainingSection(lr=0.1, weight_decay=0.0)
    method.step(batch, AT, TrainingHandles(method, Stage(), settings, 10))
    other.network.load_state_dict(method.network.state_dict())
    handles = TrainingHandles(other, Stage(), settings, 10)
    handles.backward(other.judgment(batch), "judge")
    handles.update("judge")
    for mine, theirs in zip(method.judge.parameters(), other.judge.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_the_judge_it_is_a_supervised_network_of_two_heads():
    method, batch = make("sassnet", consistency=0.0), make_batch()
    terms = method.losses(batch, AT)
    torch.stack(list(terms.values())).sum().backward()
    with_judge = [p.grad.clone() for p in method.network.parameters()]
    method.zero_grad()
    (terms := method.losses(batch, AT)).pop("adversarial")
    torch.stack(list(terms.values())).sum().backward()
    for mine, alone in zip(with_judge, method.network.parameters(), strict=True):
        torch.testing.assert_close(mine, alone.grad)


def test_judging_leaves_the_networks_statistics_and_modes_alone():
    method, batch = make("sassnet"), make_batch()
    buffers = {key: value.clone() for key, value in method.network.named_buffers()}
    method.judgment(batch)
    assert all(torch.equal(value, buffers[key]) for key, value in method.network.named_buffers())
    assert all(module.training for module in method.modules())


@pytest.mark.parametrize("sides", [(8, 64, 64), (1, 16, 20), (2, 3, 40), (5, 5, 5)])
def test_thin_patches_are_halved_where_they_can_be(sides):
    judge = Discriminator(3, 1, 1, sides=sides).eval()
    assert judge(torch.rand(2, 1, *sides), torch.rand(2, 1, *sides)).shape == (2, 2)


def test_sides_of_sixteen_or_more_change_nothing():
    torch.manual_seed(0)
    plain = Discriminator(2, 3, 1)
    torch.manual_seed(0)
    given = Discriminator(2, 3, 1, sides=(16, 40))
    for mine, theirs in zip(plain.parameters(), given.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", ["dan", "sassnet"])
def test_a_step_on_a_thin_patch(name):
    kind = catalogue.load(name)
    arguments = {"widths": [4, 8], "kernel_sizes": [[1, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2]]}
    task = Task(1, ("background", "a"), 3, (4, 32, 32), "dynunet", arguments)
    method = kind(task, kind.Config(**FULL)).train()
    x, y = torch.rand(2, 1, 4, 32, 32), torch.randint(2, (2, 4, 32, 32))
    handles = TrainingHandles(method, Stage(), TrainingSection(), 10)
    terms = method.step(Batch(x, y, x, x, y, x), AT, handles)
    assert all(torch.isfinite(value) for value in terms.values())
