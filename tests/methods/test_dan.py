"""DAN: the judge, who learns from what, and the published numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from consistency_tasks import make, make_batch

from scantly.methods.base import Progress, Stage
from scantly.networks.discriminator import Discriminator
from scantly.training.config import TrainingSection
from scantly.training.optimizers import TrainingHandles

AT = Progress(10, 10)
FULL = {"consistency": 1.0, "rampup_iterations": 0}


def test_the_published_number_of_parameters():
    assert sum(p.numel() for p in Discriminator(2, 4, 1).parameters()) == 2_762_754


@pytest.mark.parametrize("dims", [2, 3])
def test_the_discriminator_has_the_layers_of_the_public_code(dims):
    """In 2D the sum of the two inputs enters the next convolution as it is, in 3D rectified and after dropout."""
    kinds = [type(layer).__name__ for layer in Discriminator(dims, 2, 1).layers]
    conv, drop = f"Conv{dims}d", f"Dropout{dims}d"
    after_the_sum = [] if dims == 2 else ["LeakyReLU", drop]
    assert kinds == [*after_the_sum, conv, "LeakyReLU", drop, conv, "LeakyReLU", drop, conv, "LeakyReLU"]


@pytest.mark.parametrize(("dims", "size"), [(2, 256), (2, 96), (3, 32)])
def test_a_verdict_per_image_of_any_size(dims, size):
    judge = Discriminator(dims, 2, 1).eval()
    shape = (size,) * dims
    assert judge(torch.rand(3, 2, *shape), torch.rand(3, 1, *shape)).shape == (3, 2)


def test_an_undecided_judge_costs_ln_2():
    method = make("dan", **FULL)
    with torch.no_grad():
        method.judge.classify.weight.zero_()
        method.judge.classify.bias.zero_()
    batch = make_batch(labeled=2, unlabeled=3)
    assert method.losses(batch, AT)["adversarial"].item() == pytest.approx(math.log(2))
    assert method.judgment(batch).item() == pytest.approx(math.log(2))


def test_the_judge_learns_which_rows_are_labeled():
    method, batch = make("dan").eval(), make_batch(labeled=1, unlabeled=3)
    verdicts = method.judge(method.network(batch.images).softmax(1), batch.images)
    expected = F.cross_entropy(verdicts, torch.tensor([1, 0, 0, 0]))
    torch.testing.assert_close(method.judgment(batch), expected)


def test_the_network_wants_unlabeled_maps_called_labeled():
    method, batch = make("dan", **FULL).eval(), make_batch()
    verdicts = method.judge(method.network(batch.unlabeled).softmax(1), batch.unlabeled)
    torch.testing.assert_close(method.losses(batch, AT)["adversarial"], F.cross_entropy(verdicts, torch.ones(2).long()))


def test_neither_loss_reaches_the_others_weights():
    """A step changes both, and each exactly as if only its own loss had been there."""
    batch = make_batch()
    method = make("dan", **FULL)
    handles = TrainingHandles(method, Stage(), TrainingSection(lr=0.1, weight_decay=0.0), 10)
    assert set(handles.rates()) == {"network", "judge"}
    seen = {}
    update = handles.update

    def watched(name):
        seen[name] = {key for key, p in method.named_parameters() if p.grad is not None}
        update(name)

    handles.update = watched
    before = {key: value.clone() for key, value in method.state_dict().items()}
    method.step(batch, AT, handles)
    for name in ("network", "judge"):
        assert seen[name]
        assert all(key.startswith(f"{name}.") for key in seen[name])
        assert any(not torch.equal(value, before[key]) for key, value in method.state_dict().items() if name in key)


def test_judging_leaves_the_networks_statistics_and_modes_alone():
    method, batch = make("dan"), make_batch()
    buffers = {key: value.clone() for key, value in method.network.named_buffers()}
    method.judgment(batch)
    assert all(torch.equal(value, buffers[key]) for key, value in method.network.named_buffers())
    assert all(module.training for module in method.modules())


def test_the_judge_does_not_drop_while_it_is_fooled():
    method, batch = make("dan", **FULL), make_batch()
    one, other = (method.losses(batch, AT)["adversarial"] for _ in range(2))
    assert torch.equal(one, other)
    assert method.judge.training
