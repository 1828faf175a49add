"""On a CUDA device: the selective scan gives what it gives on a CPU, by itself and by the kernels of mamba_ssm."""

from __future__ import annotations

import importlib

import pytest
import torch

from scantly.networks.selective_scan import selective_scan

module = importlib.import_module("scantly.networks.selective_scan")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def inputs(length):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    u, B, C, D = normal(2, length, 32), normal(2, length, 8), normal(2, length, 8), normal(32)
    A = -torch.arange(1.0, 9.0).expand(32, 8).contiguous()
    return [u, torch.rand(2, length, 32, generator=generator), A, B, C, D]


def with_gradients(tensors, dtype=None, **options):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    with torch.autocast(leaves[0].device.type, dtype=dtype, enabled=dtype is not None):
        y = selective_scan(*leaves, **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


def assert_agree(ours, theirs, tolerance=1e-4):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert (a.cpu() - b.cpu()).abs().max() <= tolerance * max(float(b.detach().abs().max()), 1)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("length", "chunk"), [(1, 256), (100, 7), (1000, 256), (1000, 2048)])
def test_the_scan_on_the_gpu_gives_what_the_cpu_gives(length, chunk, dtype, monkeypatch):
    monkeypatch.setattr(module, "_kernel", lambda: None)
    tensors = inputs(length)
    ours = with_gradients([tensor.cuda() for tensor in tensors], dtype, chunk=chunk)
    assert_agree(ours, with_gradients(tensors, chunk=chunk))


def test_the_scan_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(module, "_kernel", lambda: None)
    leaves = [tensor.cuda().requires_grad_() for tensor in inputs(1000)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        selective_scan(*leaves).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("length", [1, 100, 5000])
def test_the_kernels_give_what_the_cpu_gives(length, monkeypatch):
    pytest.importorskip("mamba_ssm")
    assert module._kernel() is not None
    used = []
    original = module._kernel_scan
    monkeypatch.setattr(module, "_kernel_scan", lambda *arguments: used.append(1) or original(*arguments))
    tensors = inputs(length)
    ours = with_gradients([tensor.cuda() for tensor in tensors])
    assert used
    assert_agree(ours, with_gradients(tensors), 1e-3)  # their exponentials are approximate
