"""Gradients of bf16 convolutions on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scantly.networks import build
from scantly.settings import merge
from scantly.training import train as train_module
from scantly.training.cpu_bf16 import mend_convolutions
from scantly.training.resolve import resolve


def gradients(network: nn.Module, images: torch.Tensor, *, bf16: bool) -> list[torch.Tensor]:
    network.zero_grad(set_to_none=True)
    waste = [torch.full((1 << power,), torch.nan) for power in range(10, 22)]  # so that unwritten memory shows
    del waste
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=False):
        output = network(images)
    output.float().square().sum().backward()
    return [p.grad.clone() for p in network.parameters() if p.ndim > 1]


@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 2, 2), (2, 8, 8), (4, 4, 4), (1, 4, 4)], ids=str)
def test_a_mended_convolution_has_the_gradient_of_float32(shape):
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv3d(64, 64, 3, padding=1))
    images = torch.randn(4, 64, *shape)
    (exact,) = gradients(conv, images, bf16=False)
    mend_convolutions(conv)
    for _ in range(3):
        (found,) = gradients(conv, images, bf16=True)
        assert (found - exact).norm() < 0.02 * exact.norm()
    assert list(conv.state_dict()) == ["0.weight", "0.bias"]


def test_every_gradient_of_a_v_net_with_a_bottom_two_voxels_deep_is_reproducible():
    torch.manual_seed(0)
    network = build(
        "vnet", spatial_dims=3, in_channels=1, out_channels=2, arguments={"widths": [4, 8, 16], "dropout": 0}
    )
    mend_convolutions(network)
    images = torch.randn(2, 1, 8, 16, 16)
    first, second = (gradients(network, images, bf16=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a.isfinite().all() for a in first)


@pytest.mark.parametrize(("precision", "mended"), [("bf16", True), ("32", False)])
def test_training_on_a_cpu_mends_them_for_bf16(cohort, tiny, tmp_path, monkeypatch, precision, mended):
    asked = []
    monkeypatch.setattr(train_module, "mend_convolutions", asked.append)
    sets = merge(tiny, {"training": {"steps": 1, "precision": precision}, "data": {"store": str(tmp_path / "s")}})
    config = resolve(cohort, flags={"method": "supervised", "labeled": 1}, sets=sets)
    train_module.train_config(config, tmp_path / "run", quiet=True)
    assert bool(asked) == mended
