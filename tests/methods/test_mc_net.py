"""MC-Net and MC-Net+: the worked numbers of their specification, parameters, decoders."""

from __future__ import annotations

import pytest
import torch
from consistency_tasks import make, make_batch
from torch import nn

from scantly.losses import mutual_consistency, sharpened
from scantly.methods import catalogue
from scantly.methods.base import Progress, Task

AT = Progress(10, 10)


def logits_of(*probs: float) -> torch.Tensor:
    return torch.tensor(probs).log()[None, :, None]


@pytest.mark.parametrize(
    ("name", "dims", "classes", "network", "parameters"),
    [
        ("mc_net", 2, 4, "unet", 2_577_624),
        ("mc_net_plus", 2, 4, "unet", 3_210_924),
        ("mc_net", 3, 2, "vnet", 12_347_716),
        ("mc_net_plus", 3, 2, "vnet", 15_246_566),
    ],
)
def test_the_published_numbers_of_parameters(name, dims, classes, network, parameters):
    kind = catalogue.load(name)
    method = kind(Task(1, ("background", "a", "b", "c")[:classes], dims, (32,) * dims, network), kind.Config())
    assert sum(p.numel() for p in method.parameters()) == parameters


@pytest.mark.parametrize(("p", "expected"), [(0.5, 0.5), (0.55, 0.88150), (0.6, 0.98295), (0.7, 0.99979)])
def test_worked_sharpening(p, expected):
    sharp = sharpened(logits_of(p, 1 - p), 0.1).flatten().tolist()
    assert sharp == pytest.approx([expected, 1 - expected], abs=1e-5)


def test_sharpening_of_more_classes_and_without_effect():
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    assert sharpened(logits, 0.1).flatten().tolist() == pytest.approx([0.0170, 0.0002, 0, 0], abs=5e-5)
    wanted = [0.9458, 0.0533, 0.0009, 0]
    assert sharpened(logits, 0.1, normalized=True).flatten().tolist() == pytest.approx(wanted, abs=5e-5)
    torch.testing.assert_close(sharpened(logits, 1.0), logits.exp(), atol=1e-6, rtol=0)


def test_sharpening_of_certain_predictions_is_finite_and_so_is_its_gradient():
    logits = torch.tensor([200.0, 0.0, -200.0]).view(1, 3, 1).requires_grad_()
    sharp = sharpened(logits, 0.1)
    assert sharp.flatten().tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    sharp.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_worked_mutual_consistency():
    one, other = logits_of(0.4, 0.6), logits_of(0.7, 0.3)
    assert mutual_consistency([one, other], temperature=0.1).item() == pytest.approx(0.82618, abs=1e-5)
    assert mutual_consistency([other, one], temperature=0.1).item() == pytest.approx(0.82618, abs=1e-5)
    three = mutual_consistency([one, other, other], temperature=0.1).item()
    pair = mutual_consistency([other, other], temperature=0.1).item()
    assert three == pytest.approx(2 * 0.82618 + pair, abs=2e-5)  # six ordered pairs


@pytest.mark.parametrize("p", [0.5, 1 - 1e-7])
def test_equal_decoders_agree_where_they_are_certain_or_undecided(p):
    logits = logits_of(p, 1 - p)
    assert mutual_consistency([logits] * 3, temperature=0.1).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("detached", [False, True])
def test_whether_sharpened_predictions_take_a_gradient(detached):
    one, other = (logits_of(*p).requires_grad_() for p in ((0.4, 0.6), (0.55, 0.45)))
    mutual_consistency([one, other], temperature=0.1, detached=detached).backward()
    probs = one.detach().softmax(1).requires_grad_()
    target = sharpened(other.detach(), 0.1)
    through_probs = torch.autograd.grad((probs - target).square().mean(), probs)[0]
    jacobian = torch.autograd.functional.jacobian(lambda z: z.softmax(1), one.detach())
    expected = torch.einsum("bcv,bcvxyz->xyz", through_probs, jacobian)
    assert torch.allclose(one.grad, expected, atol=1e-6) == detached


def test_the_ramp_for_the_left_atrium():
    """Weight 1 after 6,000 of 15,000 iterations."""
    config = make("mc_net", consistency=1.0, rampup_iterations=6_000, published_iterations=15_000).config
    for iteration, expected in ((0, 0.00674), (1_500, 0.06005), (3_000, 0.28650), (6_000, 1.0), (14_999, 1.0)):
        assert config.consistency_weight(Progress(iteration, 15_000)) == pytest.approx(expected, abs=1e-5)


def test_two_dimensional_dice_has_no_gradient_where_a_class_is_absent():
    method = make("mc_net", classes=3)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    labels = torch.randint(2, (2, 4, 4))  # class 2 is absent
    loss = method.supervised_loss(logits, labels)
    p, y = logits.softmax(1), nn.functional.one_hot(labels, 3).movedim(-1, 1)
    parts = [1 - (p[:, c] * y[:, c]).sum() / ((p[:, c] ** 2).sum() + y[:, c].sum() + 1e-10) for c in range(3)]
    assert parts[2].item() == 1
    torch.testing.assert_close(loss, torch.stack(parts).mean())


@pytest.mark.parametrize("name", ["mc_net", "mc_net_plus"])
def test_two_dimensional_dice_of_a_perfect_prediction_is_a_half_per_decoder(name):
    """The public 2D code's Dice has no factor 2: 1 - 16 / (16 + 16) for every class of 16 voxels."""
    method = make(name, classes=2)
    labels = torch.tensor([[[0, 1]] * 16])
    logits = 60.0 * (nn.functional.one_hot(labels, 2).movedim(-1, 1).float() - 0.5)
    assert method.supervised_loss(logits, labels).item() == pytest.approx(0.5, abs=1e-6)
    assert method.supervised_weight == 1.0


def test_three_dimensional_dice_counts_the_foreground_with_plain_denominators():
    method = make("mc_net", dims=3)
    logits, labels = torch.randn(2, 2, 4, 4, 4), torch.randint(2, (2, 4, 4, 4))
    p, y = logits.softmax(1)[:, 1], labels
    expected = 1 - (2 * (p * y).sum() + 1e-8) / (p.sum() + y.sum() + 1e-8)
    torch.testing.assert_close(method.supervised_loss(logits, labels), expected)


@pytest.mark.parametrize(("name", "count"), [("mc_net", 2), ("mc_net_plus", 3)])
def test_the_supervised_loss_is_the_sum_over_decoders(name, count):
    method, batch = make(name, supervised="ce_dice", supervised_weight=0.25).eval(), make_batch()
    for decoder, head in zip(method.decoders, method.heads, strict=True):
        head.load_state_dict(method.network.head.state_dict())
        decoder.forward = method.network.decoder.forward
    once = method.config.supervised_loss([method.network(batch.labeled)], batch.labels)
    torch.testing.assert_close(method.losses(batch, AT)["supervised"], 0.25 * count * once)


def test_decoders_differ_in_their_upsampling_or_in_their_weights():
    method = make("mc_net_plus")
    ups = [method.network.decoder, *method.decoders]
    kinds = [type(decoder[0].upsample).__name__ for decoder in ups]
    assert kinds == ["Upsample", "ConvTranspose2d", "Upsample"]
    assert [decoder[0].upsample.mode for decoder in (ups[0], ups[2])] == ["bilinear", "nearest"]
    kind = catalogue.load("mc_net")
    of_one_kind = kind(Task(1, ("background", "a"), 3, (16,) * 3, "unet3d", {"widths": [4, 8]}), kind.Config())
    own, other = of_one_kind.network.decoder, of_one_kind.decoders[0]
    assert [p.shape for p in own.parameters()] == [p.shape for p in other.parameters()]
    assert not all(torch.equal(p, q) for p, q in zip(own.parameters(), other.parameters(), strict=True))


def test_the_networks_own_decoder_predicts():
    method, images = make("mc_net").eval(), make_batch().labeled
    features = method.network.encode(images)
    assert torch.equal(method.predictor(images), method.network.decode(features))
    assert not any("decoders" in key for key in method.predictor.state_dict())
