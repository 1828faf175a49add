"""CCT: parameters, perturbations by hand, and who learns from what."""

from __future__ import annotations

import pytest
import torch
from consistency_tasks import make, make_batch

from scantly.methods import catalogue
from scantly.methods.base import Progress, Task
from scantly.methods.parts.feature_perturbation import drop_features, drop_voxels, proportional_noise

AT = Progress(10, 10)
FULL = {"consistency": 1.0, "rampup_iterations": 0}


def test_the_published_number_of_parameters():
    kind = catalogue.load("cct")
    method = kind(Task(1, ("background", "a", "b", "c"), 2, (64, 64)), kind.Config())
    assert sum(p.numel() for p in method.parameters()) == 3_713_664


def test_without_perturbations_equal_decoders_agree():
    method = make("cct", **FULL).eval()
    for decoder, head in zip(method.decoders, method.heads, strict=True):
        decoder.load_state_dict(method.network.decoder.state_dict())
        head.load_state_dict(method.network.head.state_dict())
    method.perturbations = [lambda features: features] * 3
    assert method.losses(make_batch(), AT)["consistency"].item() == pytest.approx(0, abs=1e-10)
    method = make("cct", **FULL).eval()
    assert method.losses(make_batch(), AT)["consistency"].item() > 1e-4


def test_noise_is_in_proportion_and_the_same_for_the_batch():
    method, features = make("cct"), torch.rand(2, 4, 8, 8) + 0.5
    share = proportional_noise(features, 0.3, method.generator) / features - 1
    torch.testing.assert_close(share[0], share[1], atol=1e-5, rtol=0)
    assert share.abs().max() <= 0.3 + 1e-5
    assert share.std().item() == pytest.approx(0.6 / 12**0.5, abs=0.03)


def test_single_features_are_dropped_and_the_others_scaled():
    method, features = make("cct"), torch.ones(2, 4, 32, 32)
    dropped = drop_features(features, 0.3, method.generator)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)


def test_voxels_with_the_highest_mean_feature_are_dropped():
    """Means 1, 0.6 and 2 of at most 2: with bounds (0.4, 0.4) what reaches 0.8 goes, and only that."""
    features = torch.tensor([[1.0, 0.6, 2.0], [1.0, 0.6, 2.0]])[None, :, None]
    assert (
        drop_voxels(features, (0.4, 0.4), torch.Generator())[0, :, 0].tolist() == [[0.0, pytest.approx(0.6), 0.0]] * 2
    )


def test_the_share_above_which_voxels_go_is_drawn_once_for_the_batch():
    """Equal images lose the same voxels: 64 of them, over the whole width of the bounds."""
    one = torch.linspace(0.5, 1, 64).view(1, 1, 8, 8)
    dropped = drop_voxels(one.expand(64, 2, 8, 8), (0.5, 1.0), torch.Generator().manual_seed(0))
    assert torch.equal(dropped, dropped[:1].expand_as(dropped))


def test_the_main_prediction_does_not_depend_on_what_the_perturbations_draw():
    seen = []
    for seed in (0, 1):
        method = make("cct")
        method.generator.manual_seed(seed)
        method.network.head.register_forward_hook(lambda module, args, output: seen.append(output))
        method.losses(make_batch(), AT)
    assert torch.equal(*seen)


@pytest.mark.parametrize("official", [False, True])
def test_whether_the_consistency_moves_the_main_decoder(official):
    method = make("cct", official=official, **FULL)
    method.losses(make_batch(), AT)["consistency"].backward()
    assert any(p.grad is not None and p.grad.any() for p in method.network.head.parameters()) == official
    assert all(p.grad is not None and p.grad.any() for p in method.heads.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.network.encoder.parameters())


def test_the_supervised_loss_is_the_mean_over_decoders_or_the_main_ones():
    batch = make_batch()
    method = make("cct").eval()
    method.perturbations = [lambda features: features] * 3
    features = method.network.encode(batch.labeled)
    others = [h(d(features)[0]) for d, h in zip(method.decoders, method.heads, strict=True)]
    all_of_them = [method.network.decode(features), *others]
    losses = [method.config.supervised_loss([logits], batch.labels) for logits in all_of_them]
    torch.testing.assert_close(method.losses(batch, AT)["supervised"], torch.stack(losses).mean())
    method.config = method.config.model_copy(update={"supervised_auxiliary": False})
    torch.testing.assert_close(method.losses(batch, AT)["supervised"], losses[0])
