"""The selective scan against worked numbers, the recurrence written down, and a scan by doubling."""

from __future__ import annotations

import importlib
import importlib.machinery
import logging
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scantly.networks.selective_scan import naive_scan, selective_scan

module = importlib.import_module("scantly.networks.selective_scan")

NAMES = ("u", "delta", "A", "B", "C", "D")


def random_inputs(batch=2, length=37, channels=5, states=4, *, dtype=torch.float64, seed=0, decay=3.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    inputs = [
        normal(batch, length, channels),
        uniform(batch, length, channels),
        -decay * uniform(channels, states) - 0.01,
        normal(batch, length, states),
        normal(batch, length, states),
        normal(channels),
    ]
    return [tensor.to(dtype).requires_grad_() for tensor in inputs]


def column(*values):
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1)


def with_gradients(scan, inputs, **options):
    y = scan(*inputs, **options)
    torch.manual_seed(3)
    weights = torch.randn(y.shape, dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [tensor for tensor in inputs if tensor is not None])]


def assert_agree(ours, theirs, tolerance):
    for name, a, b in zip(("y", *NAMES), ours, theirs, strict=False):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        scale = max(float(b.detach().abs().max()) if b.numel() else 0, 1)
        assert (a - b).abs().max() <= tolerance * scale if b.numel() else True, name


def doubling_scan(u, delta, A, B, C, D=None):
    """By associativity: pairs (a, b) of tokens 1, 2, 4, ... apart become one, (a2 a1, a2 b1 + b2)."""
    a = (delta[..., None] * A).exp()
    b = (delta * u)[..., None] * B[:, :, None]
    distance = 1
    while distance < u.shape[1]:
        before_a = torch.cat([torch.ones_like(a[:, :distance]), a[:, :-distance]], 1)
        before_b = torch.cat([torch.zeros_like(b[:, :distance]), b[:, :-distance]], 1)
        a, b = a * before_a, a * before_b + b
        distance *= 2
    y = (b * C[:, :, None]).sum(-1)
    return y if D is None else y + D * u


SCANS = {"ours": selective_scan, "naive": naive_scan, "doubling": doubling_scan}


@pytest.mark.parametrize("scan", SCANS)
def test_worked_numbers_of_one_state(scan):
    u, delta = column(1, 2, 0, -1), column(0.5, 1, 0.5, 0.25)
    B, C = column(1, 0.5, 1, 2), column(1, 1, 2, 1)
    y = SCANS[scan](u, delta, torch.tensor([[-1.0]], dtype=torch.float64), B, C)
    assert y.flatten().tolist() == pytest.approx([0.5, 1.183940, 1.436191, 0.059254], abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
def test_worked_numbers_do_not_depend_on_the_chunk(chunk):
    """In chunks of 2: the second has local states (0, -0.5), decays (0.606531, 0.472367) and receives 1.183940."""
    u, delta = column(1, 2, 0, -1), column(0.5, 1, 0.5, 0.25)
    B, C = column(1, 0.5, 1, 2), column(1, 1, 2, 1)
    A = torch.tensor([[-1.0]], dtype=torch.float64)
    y = selective_scan(u, delta, A, B, C, chunk=chunk).flatten()
    assert y.tolist() == pytest.approx([0.5, 1.183940, 1.436191, 0.059254], abs=1e-6)
    local = selective_scan(u[:, 2:], delta[:, 2:], A, B[:, 2:], torch.ones_like(C[:, 2:]), chunk=chunk).flatten()
    assert local.tolist() == pytest.approx([0, -0.5])
    received = local + torch.tensor([0.606531, 0.472367]) * 1.183940
    assert received.tolist() == pytest.approx([0.718096, 0.059254], abs=1e-5)


@pytest.mark.parametrize(("scan", "options"), [("ours", {"chunk": 3}), ("ours", {}), ("naive", {}), ("doubling", {})])
def test_worked_numbers_of_two_states(scan, options):
    ones = torch.ones(1, 4, 1, dtype=torch.float64)
    B = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1]], dtype=torch.float64)[None]
    A = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    D = torch.tensor([0.1], dtype=torch.float64)
    y = SCANS[scan](ones, 0.5 * ones, A, B, torch.ones_like(B), D, **options)
    assert y.flatten().tolist() == pytest.approx([0.6, 0.903265, 1.467879, 0.766438], abs=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 8, 16, 36, 37, 38, 64, 256])
def test_values_and_gradients_are_those_of_the_recurrence(chunk):
    inputs = random_inputs()
    ours = with_gradients(selective_scan, inputs, chunk=chunk)
    assert_agree(ours, with_gradients(naive_scan, inputs), 1e-12)
    assert_agree(ours, with_gradients(doubling_scan, inputs), 1e-12)


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 80),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_shape_and_chunk(batch, length, channels, states, chunk, direct, seed):
    inputs = random_inputs(batch, length, channels, states, seed=seed)
    inputs[5] = inputs[5] if direct else None
    assert_agree(with_gradients(selective_scan, inputs, chunk=chunk), with_gradients(naive_scan, inputs), 1e-11)


@pytest.mark.parametrize("chunk", [2, 5, 20])
def test_gradcheck(chunk):
    inputs = random_inputs(2, 11, 2, 3)
    assert torch.autograd.gradcheck(lambda *tensors: selective_scan(*tensors, chunk=chunk), inputs)


@pytest.mark.parametrize("wanted", [*((name,) for name in NAMES), ("u", "C"), ("A", "B"), ("delta", "D")])
def test_each_gradient_alone(wanted):
    inputs = random_inputs()
    expected = with_gradients(naive_scan, inputs)
    for name, tensor in zip(NAMES, inputs, strict=True):
        tensor.requires_grad_(name in wanted)
    y = selective_scan(*inputs, chunk=8)
    torch.manual_seed(3)
    (y * torch.randn(y.shape, dtype=torch.float64)).sum().backward()
    for name, tensor, gradient in zip(NAMES, inputs, expected[1:], strict=True):
        if name in wanted:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


def test_memory_that_is_not_contiguous():
    inputs = random_inputs(2, 20, 3, 4)
    expected = with_gradients(naive_scan, inputs)
    strided = [t if t.ndim == 1 else t.detach().transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    strided = [tensor.detach().requires_grad_() for tensor in strided]
    assert_agree(with_gradients(selective_scan, strided, chunk=7), expected, 1e-12)
    # The gradient of a sum has no memory of its own.
    ours, naive = (torch.autograd.grad(scan(*inputs).sum(), inputs) for scan in (selective_scan, naive_scan))
    assert_agree(ours, naive, 1e-12)


def test_a_token_sees_itself_and_those_before():
    inputs = [tensor.detach() for tensor in random_inputs(1, 20)]
    y = selective_scan(*inputs, chunk=4)
    for index in (0, 1, 3, 4):  # all that has tokens
        changed = [tensor.clone() for tensor in inputs]
        changed[index][:, 7] += 1
        other = selective_scan(*changed, chunk=4)
        assert torch.equal(other[:, :7], y[:, :7])
        assert not torch.allclose(other[:, 7], y[:, 7])


def test_zero_steps_leave_the_direct_part():
    u, delta, A, B, C, D = random_inputs()
    assert torch.equal(selective_scan(u, delta * 0, A, B, C, D), D * u)
    assert not selective_scan(u, delta * 0, A, B, C).any()


def test_constant_coefficients_converge_to_the_geometric_sum():
    ones = torch.ones(1, 400, 1, dtype=torch.float64)
    A = torch.tensor([[-0.7]], dtype=torch.float64)
    y = selective_scan(ones, 0.5 * ones, A, 3 * ones, ones, chunk=16).flatten()
    a, b = torch.tensor(-0.35, dtype=torch.float64).exp(), 1.5
    assert y[-1].item() == pytest.approx((b / (1 - a)).item(), rel=1e-12)
    assert y[9].item() == pytest.approx((b * (1 - a**10) / (1 - a)).item(), rel=1e-12)


@pytest.mark.parametrize("decay", [1e-4, 3.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sequences_stay_exact(decay, dtype):
    """Sums of logarithms, the other way to write this, lose all digits here."""
    inputs = random_inputs(1, 5000, 2, 2, decay=decay, dtype=dtype)
    tolerance = {torch.float32: 3e-5, torch.float64: 1e-11}[dtype]
    ours = with_gradients(selective_scan, inputs)
    assert all(torch.isfinite(tensor).all() for tensor in ours)
    assert_agree(ours, with_gradients(naive_scan, inputs), tolerance)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(low):
    exact = random_inputs(2, 100, 16, 32, dtype=torch.float32)
    # Values that 16 bits hold, so that only the computation could lose something.
    exact = [tensor.detach().to(low).float().requires_grad_() for tensor in exact]
    expected = with_gradients(selective_scan, exact)
    inputs = [tensor.detach().to(low).requires_grad_() for tensor in exact[:2]]
    inputs += [tensor.detach().requires_grad_() for tensor in exact[2:]]
    with torch.autocast("cpu", dtype=low):
        y = selective_scan(*inputs)
        torch.manual_seed(3)
        weights = torch.randn(y.shape, dtype=torch.float64).float()
        gradients = torch.autograd.grad((y * weights).sum(), inputs)  # as autocast is on here, too
        assert naive_scan(*inputs).dtype == torch.float32
    assert torch.equal(y, expected[0])
    for index, (gradient, exact_gradient) in enumerate(zip(gradients, expected[1:], strict=True)):
        assert gradient.dtype == (low if index < 2 else torch.float32)
        assert torch.equal(gradient, exact_gradient.to(gradient.dtype))


def test_float64_of_one_argument_is_kept():
    inputs = random_inputs(dtype=torch.float32)
    inputs[2] = inputs[2].double()
    assert selective_scan(*inputs).dtype == naive_scan(*inputs).dtype == torch.float64


def test_no_tokens_and_no_rows():
    for batch, length in ((2, 0), (0, 5)):
        inputs = random_inputs(batch, length)
        y = selective_scan(*inputs)
        assert y.shape == (batch, length, 5)
        assert all(not gradient.any() for gradient in torch.autograd.grad(y.sum(), inputs))


class Largest(TorchDispatchMode):
    """Numbers in the largest piece of memory that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("length", [64, 1024, 8192])
def test_memory_is_that_of_the_inputs_and_of_one_chunk(length):
    batch, channels, states, chunk = 2, 8, 16, 32
    inputs = random_inputs(batch, length, channels, states, dtype=torch.float32)
    saved = []
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        selective_scan(*inputs, chunk=chunk).sum().backward()
    per_token = batch * channels * states
    given_numbers = max(tensor.numel() for tensor in inputs)
    assert largest.numbers <= max(given_numbers, chunk * per_token, length // chunk * per_token)
    known = {tensor.data_ptr() for tensor in inputs}
    assert [t.numel() for t in saved if t.data_ptr() not in known] == [length // chunk * per_token]


def test_nothing_is_kept_without_gradients():
    inputs = random_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.no_grad():
            assert not selective_scan(*inputs).requires_grad
        assert not selective_scan(*(tensor.detach() for tensor in inputs)).requires_grad
    assert not saved
    with torch.no_grad(), Largest() as largest:
        selective_scan(*inputs, chunk=4)
    assert largest.numbers <= max(*(tensor.numel() for tensor in inputs), 4 * 2 * 5 * 4)


def test_gradients_of_gradients_are_refused():
    inputs = random_inputs()
    (gradient,) = torch.autograd.grad(selective_scan(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("scan", [selective_scan, naive_scan])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("u", (2, 37)),
        ("delta", (2, 36, 5)),
        ("A", (4, 5)),
        ("A", (5,)),
        ("A", (5, 0)),
        ("B", (2, 37, 5)),
        ("C", (1, 37, 4)),
        ("D", (1,)),
    ],
)
def test_shapes_that_do_not_fit(scan, name, shape):
    inputs = dict(zip(NAMES, random_inputs(), strict=True))
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        scan(*inputs.values())


def test_a_chunk_has_a_token():
    with pytest.raises(ValueError, match="chunk is 0"):
        selective_scan(*random_inputs(), chunk=0)


def fake_kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """What ``mamba_ssm`` documents: sequences ``(B, channels, L)``, float32 A and D."""
    assert z is None
    assert delta_bias is None
    assert not delta_softplus
    assert all(tensor.is_contiguous() for tensor in (u, delta, A, B, C))
    u, delta, B, C = (tensor.transpose(1, 2) for tensor in (u, delta, B, C))
    return naive_scan(u, delta, A, B, C, D).transpose(1, 2)


@pytest.fixture
def package(monkeypatch):
    """Puts modules in the place of ``mamba_ssm``; the search for it starts afresh."""

    def install(**content):
        for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface"):
            fake = types.ModuleType(name)
            fake.__spec__ = importlib.machinery.ModuleSpec(name, None)
            fake.__path__ = []
            monkeypatch.setitem(sys.modules, name, fake)
        for name, value in content.items():
            setattr(sys.modules["mamba_ssm.ops.selective_scan_interface"], name, value)

    module._kernel.cache_clear()
    yield install
    module._kernel.cache_clear()


@pytest.mark.parametrize("direct", [True, False])
def test_the_kernels_receive_their_layout(package, direct):
    package(selective_scan_fn=fake_kernel)
    kernel = module._kernel()
    assert kernel is fake_kernel
    inputs = random_inputs(dtype=torch.float32)
    inputs[5] = inputs[5] if direct else None

    def scan(*tensors):
        return module._kernel_scan(kernel, module._checked(module._Inputs(*tensors)))

    assert_agree(with_gradients(scan, inputs), with_gradients(naive_scan, inputs), 1e-5)


def test_the_kernels_are_not_asked_on_a_cpu(package):
    package(selective_scan_fn=None)
    inputs = random_inputs(dtype=torch.float32)
    assert_agree(with_gradients(selective_scan, inputs), with_gradients(naive_scan, inputs), 1e-5)


def test_without_the_package_nothing_is_said(monkeypatch, caplog):
    module._kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert module._kernel() is None
    assert not caplog.records
    module._kernel.cache_clear()


def test_a_broken_package_is_named_once(package, caplog):
    package()  # without the function
    with caplog.at_level(logging.WARNING, "scantly"):
        assert module._kernel() is None
        assert module._kernel() is None
    (record,) = caplog.records
    assert "selective_scan_fn" in record.getMessage()
