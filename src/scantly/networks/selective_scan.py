"""The selective scan: a linear recurrence along a sequence whose coefficients depend on the input."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from scantly.networks.precision import without_autocast

__all__ = ["naive_scan", "selective_scan"]

_log = logging.getLogger("scantly")
_KERNELS = "mamba_ssm"
#: Tokens per chunk on a CPU, measured: its states fit the caches.
_CPU_CHUNK = 256
#: On a GPU a chunk has so many states (128 MB), not measured: there launches cost most, a few hundred per chunk.
_DEVICE_NUMBERS = 2**25


class _Inputs(NamedTuple):
    """The arguments, or something for each of them."""

    u: Any
    delta: Any
    A: Any
    B: Any
    C: Any
    D: Any


def selective_scan(  # noqa: PLR0917 - the paper's order, as everywhere
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, chunk: int | None = None
) -> Tensor:
    """Selective state space model of Mamba: every channel is filtered by N decaying states.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, equations 2 to 4 and
    algorithm 2, with its simplified step for B. For each token l, channel and state n,

        h_l[n] = exp(delta_l A[n]) h_{l-1}[n] + delta_l B_l[n] u_l,  h_{-1} = 0;  y_l = sum_n C_l[n] h_l[n] + D u_l

    A token sees itself and those before it. Time grows with L and not faster. States are held for one chunk at a time;
    for the backward pass only the inputs, as float32, and the states at the chunks' borders are kept, and the rest is
    computed again. Nothing is divided, so the result is exact up to rounding at any length and for any decay.

    On a CUDA device the kernels of the package ``mamba_ssm`` are used if it is installed, except for float64.

    Args:
        u: The sequence, ``(B, L, d)``, any floating type.
        delta: Step sizes, ``(B, L, d)``, at least 0 (softplus is the caller's); 0 skips a token.
        A: Decay rates, ``(d, N)``, negative.
        B: How a token enters the states, ``(B, L, N)``.
        C: How the states are read, ``(B, L, N)``.
        D: Weight of the token itself in its own result, ``(d,)``; None for 0.
        chunk: Tokens whose states are held at once, at least 1. Changes speed and memory, not the result. None: 256 on
            a CPU, on a GPU what makes 2**25 states. The kernels do not use it.

    Returns:
        y, ``(B, L, d)``; float32, or float64 if an argument is. Autocast changes neither this nor the computation.
        Gradients are to be had once, not gradients of gradients.

    Raises:
        ValueError: Shapes do not belong together, or ``chunk`` is below 1.

    Example:
        A unit impulse that halves with each token:

        >>> impulse = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1)
        >>> ones = torch.ones(1, 3, 1)
        >>> selective_scan(impulse, ones, -torch.tensor([[2.0]]).log(), ones, ones).flatten()
        tensor([1.0000, 0.5000, 0.2500])
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; it counts tokens and must be at least 1.")
    inputs = _checked(_Inputs(u, delta, A, B, C, D))
    with without_autocast(u.device):
        if u.is_cuda and inputs.u.dtype != torch.float64 and u.numel() and (kernel := _kernel()) is not None:
            return _kernel_scan(kernel, inputs)
        chunk = max(1, min(_usual_chunk(inputs) if chunk is None else chunk, u.shape[1]))
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
            return cast(Tensor, _Scan.apply(chunk, *inputs))  # type: ignore[no-untyped-call]
        return _forward(inputs, chunk, keep=False)[0]


def _usual_chunk(inputs: _Inputs) -> int:
    """Tokens per chunk by device."""
    if not inputs.u.is_cuda:
        return _CPU_CHUNK
    states = math.prod((len(inputs.u), *inputs.A.shape))
    return max(_CPU_CHUNK, _DEVICE_NUMBERS // max(1, states))


def naive_scan(  # noqa: PLR0917 - as selective_scan
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """The recurrence of :func:`selective_scan` written down: one token after the other, gradients by autograd.

    The reference for tests and benchmarks. Its backward pass takes time that grows with the square of L, since the
    gradient of each token's slice is as large as the sequence.

    Args:
        u: ``(B, L, d)``.
        delta: ``(B, L, d)``.
        A: ``(d, N)``.
        B: ``(B, L, N)``.
        C: ``(B, L, N)``.
        D: ``(d,)`` or None.

    Returns:
        ``(B, L, d)``, as :func:`selective_scan`.

    Raises:
        ValueError: Shapes do not belong together.
    """
    u, delta, A, B, C, D = _checked(_Inputs(u, delta, A, B, C, D))
    with without_autocast(u.device):
        h = u.new_zeros(u.shape[0], *A.shape)
        y = []
        for token in range(u.shape[1]):
            step = delta[:, token, :, None]
            h = (step * A).exp() * h + step * B[:, token, None] * u[:, token, :, None]
            y.append((h * C[:, token, None]).sum(-1))
        result = torch.stack(y, 1) if y else u * 1
        return result if D is None else result + D * u


def _checked(inputs: _Inputs) -> _Inputs:
    """Shapes that belong together, and one precision: a product of many decays has no digits left in 16 bits."""
    u, A = inputs.u, inputs.A
    if u.ndim != 3 or A.ndim != 2 or not A.shape[1]:
        raise ValueError(f"u is (B, L, d) and A is (d, N), N > 0, but they are {tuple(u.shape)} and {tuple(A.shape)}.")
    (batch, length, channels), states = u.shape, A.shape[1]
    per_state = (batch, length, states)
    expected = _Inputs(u.shape, u.shape, (channels, states), per_state, per_state, (channels,))
    for name, tensor, shape in zip(_Inputs._fields, inputs, expected, strict=True):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}, but u {tuple(u.shape)} and A {tuple(A.shape)} demand {tuple(shape)}."
            )
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in inputs)
    dtype = torch.float64 if double else torch.float32
    return _Inputs(*(None if tensor is None else tensor.to(dtype) for tensor in inputs))


# Below, a chunk of T tokens is m blocks of K, and a tensor over it is (B, m, K, N, d): step k of all blocks is one
# operation, nothing has to be reordered, and channels come last because they are many and a channel's states few.


class _Scan(torch.autograd.Function):
    """The scan with a backward pass of its own; differentiable once."""

    @staticmethod
    def forward(ctx: Any, chunk: int, *inputs: Any) -> Tensor:
        y, borders = _forward(_Inputs(*inputs), chunk, keep=any(ctx.needs_input_grad[1:6]))
        ctx.chunk = chunk
        ctx.save_for_backward(*inputs, borders)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, borders = ctx.saved_tensors
        # Autocast is as it was where backward() was called, not as in the forward pass.
        with without_autocast(dy.device):
            return None, *_backward(_Inputs(*inputs), dy, borders, ctx.chunk, _Inputs(*ctx.needs_input_grad[1:]))


class _Chunk:
    """Decays and states of one chunk.

    Attributes:
        decay: ``exp(delta_l A)``, in (0, 1].
        states: First what enters them, ``delta_l B_l u_l``; after :meth:`run` the states h_l.
    """

    def __init__(self, inputs: _Inputs, A_t: Tensor, span: slice, buffers: Sequence[Tensor]) -> None:
        batch, self.tokens, _ = inputs.u[:, span].shape
        self.m, self.K = _grid(self.tokens)
        self.span, self.A_t, self.buffers = span, A_t, buffers
        self.shape = (batch, self.m, self.K, *A_t.shape)
        self.u, self.delta, self.B, self.C = (
            self.blocks(values) for values in (inputs.u, inputs.delta, inputs.B, inputs.C)
        )
        self.decay, self.states = self.room(0), self.room(1)
        torch.mul(self.delta[..., None, :], A_t, out=self.decay).exp_()
        self.entering = self.delta * self.u
        torch.mul(self.entering[..., None, :], self.B[..., None], out=self.states)

    def blocks(self, values: Tensor) -> Tensor:
        """The chunk's part of ``(B, L, c)`` as ``(B, m, K, c)``; tokens beyond the end are 0 and change no state."""
        values = values[:, self.span]
        missing = self.m * self.K - self.tokens
        values = functional.pad(values, (0, 0, 0, missing)) if missing else values
        return values.reshape(len(values), self.m, self.K, values.shape[2])

    def write(self, values: Tensor, result: Tensor) -> None:
        """Put ``(B, m, K, c)`` into its place in ``(B, L, c)``."""
        result[:, self.span] = values.flatten(1, 2)[:, : self.tokens]

    def room(self, index: int) -> Tensor:
        """A buffer's front in the shape of the states; fresh memory would cost more than the arithmetic."""
        return self.buffers[index][: math.prod(self.shape)].view(self.shape)

    def run(self, border: Tensor) -> Tensor:
        """Compute the states from the one before the chunk, ``(B, N, d)``; returns the last one."""
        _recur(self.decay.unbind(2), self.states.unbind(2), self.across(self.delta.sum(2)), border)
        return self.states[:, -1, -1]

    def run_back(self, adjoints: Tensor, arriving: Tensor) -> None:
        """``adjoint_l += decay_{l+1} adjoint_{l+1}`` for all tokens, the last one first.

        Args:
            adjoints: What the tokens' own results demand of the states; overwritten by what all later ones demand.
            arriving: What the tokens after the chunk demand, ``(B, N, d)``.
        """
        # Behind a block's last token comes the first of the next block. Behind the last block nothing is left to
        # decay: ``arriving`` already did.
        after = torch.cat([self.decay[:, 1:, 0], torch.ones_like(self.decay[:, :1, 0])], 1)
        steps = self.delta[:, :, 1:].sum(2)
        steps[:, :-1] += self.delta[:, 1:, 0]
        decays = (after, *self.decay.unbind(2)[:0:-1])
        _recur(decays, adjoints.unbind(2)[::-1], self.across(steps), arriving, backwards=True)

    def across(self, steps: Tensor) -> Tensor:
        """Decay over whole blocks ``(B, m, N, d)`` from their steps' sums, which nobody needs of a single block."""
        return (steps[..., None, :] * self.A_t).exp_() if self.m > 1 else steps

    def times_previous(self, border: Tensor) -> Tensor:
        """``decay_l h_{l-1}``, in place of the decays."""
        self.decay[:, :, 1:].mul_(self.states[:, :, :-1])
        self.decay[:, 1:, 0].mul_(self.states[:, :-1, -1])
        self.decay[:, 0, 0].mul_(border)
        return self.decay


def _grid(tokens: int) -> tuple[int, int]:
    """Blocks m and tokens K of each, about alike: it takes 2 K + m operations, and a power of two leaves no rest."""
    blocks = 2 ** round(math.log2(tokens) / 2)
    return blocks, -(-tokens // blocks)


def _recur(
    decays: Sequence[Tensor], states: Sequence[Tensor], across: Tensor, initial: Tensor, *, backwards: bool = False
) -> None:
    """``states[k] += decays[k] * states[k - 1]`` through all steps of all blocks, in place.

    Args:
        decays: For each of K steps ``(B, m, N, d)``.
        states: What enters at each step, alike; overwritten by the states.
        across: Product of the decays of each block, ``(B, m, N, d)``.
        initial: The state before the first step of the first block, ``(B, N, d)``.
        backwards: The first block is the last one.
    """
    blocks = states[0].shape[1]
    first = -1 if backwards else 0
    states[0][:, first].addcmul_(decays[0][:, first], initial)
    if blocks > 1:
        # The state at the end of each block, as if the others were not there, and then with what they hand on.
        ends = states[0].clone()
        for decay, state in zip(decays[1:], states[1:], strict=True):
            torch.addcmul(state, decay, ends, out=ends)
        direction = -1 if backwards else 1
        pairs = zip(across.unbind(1)[::direction], ends.unbind(1)[::direction], strict=True)
        _, before = next(pairs)
        for decay, end in pairs:
            before = end.addcmul_(decay, before)
        later, earlier = (slice(1, None), slice(None, -1))[::direction]
        states[0][:, later].addcmul_(decays[0][:, later], ends[:, earlier])
    before = states[0]
    for decay, state in zip(decays[1:], states[1:], strict=True):
        before = state.addcmul_(decay, before)


def _sum_states(weights: Tensor, values: Tensor) -> Tensor:
    """``sum_n weights[..., n, :] * values[..., n, :]``, ``(..., d)``: without the products in memory."""
    (weight, value), *others = zip(weights.unbind(-2), values.unbind(-2), strict=True)
    result = weight * value
    for weight, value in others:
        result.addcmul_(weight, value)
    return result


def _sum_channels(values: Tensor, weights: Tensor) -> Tensor:
    """``sum_d values[..., n, d] * weights[..., d]``, ``(..., N)``."""
    return (values @ weights[..., None])[..., 0]


def _buffers(count: int, inputs: _Inputs, chunk: int) -> list[Tensor]:
    """Memory for the states of a chunk, ``count`` times."""
    # Blocks may reach beyond the chunk, and those of the last, shorter chunk farther than those of a whole one.
    tokens = max(math.prod(_grid(size)) for size in (chunk, (inputs.u.shape[1] - 1) % chunk + 1))
    return [inputs.u.new_empty(tokens * inputs.u.shape[0] * inputs.A.numel()) for _ in range(count)]


def _forward(inputs: _Inputs, chunk: int, *, keep: bool) -> tuple[Tensor, Tensor]:
    """y, and if ``keep`` the state before each chunk, ``(chunks, B, N, d)``."""
    u, D = inputs.u, inputs.D
    A_t = inputs.A.T.contiguous()
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    buffers = _buffers(2, inputs, chunk)
    state = u.new_zeros(u.shape[0], *A_t.shape)
    starts = range(0, u.shape[1], chunk)
    borders = u.new_empty(len(starts) if keep else 0, *state.shape)
    for index, start in enumerate(starts):
        if keep:
            borders[index] = state
        part = _Chunk(inputs, A_t, slice(start, start + chunk), buffers)
        state = part.run(state).clone()
        read = _sum_states(part.C[..., None], part.states)
        part.write(read if D is None else read.addcmul_(part.u, D), y)
    return y, borders


def _backward(inputs: _Inputs, dy: Tensor, borders: Tensor, chunk: int, needed: _Inputs) -> _Inputs:
    """The needed gradients: the chunks in reverse, each computed again from its border."""
    u, D = inputs.u, inputs.D
    du, ddelta, _, dB, dC, _ = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if tensor is not None and wanted else None
        for tensor, wanted in zip(inputs, needed, strict=True)
    )
    A_t = inputs.A.T.contiguous()
    dA, dD = torch.zeros_like(A_t), None if D is None else torch.zeros_like(D)
    if dD is not None and needed.D:
        for start in range(0, u.shape[1], chunk):
            dD += (u[:, start : start + chunk] * dy[:, start : start + chunk]).sum((0, 1))
    need_decay, need_entering = needed.delta or needed.A, needed.u or needed.delta
    buffers = _buffers(3, inputs, chunk)
    arriving = u.new_zeros(u.shape[0], *A_t.shape)
    for index in reversed(range(len(borders))):
        part = _Chunk(inputs, A_t, slice(index * chunk, (index + 1) * chunk), buffers)
        demand = part.blocks(dy)
        if need_decay or dC is not None:
            part.run(borders[index])
        if dC is not None:
            part.write(_sum_channels(part.states, demand), dC)
        if not (need_decay or need_entering or needed.B):
            continue
        adjoint = torch.mul(part.C[..., None], demand[..., None, :], out=part.room(2))
        part.run_back(adjoint, arriving)
        arriving = part.decay[:, 0, 0] * adjoint[:, 0, 0]
        if dB is not None:
            part.write(_sum_channels(adjoint, part.entering), dB)
        if need_entering:
            entered = _sum_states(part.B[..., None], adjoint)
            if du is not None:
                direct = entered * part.delta
                part.write(direct if D is None else direct.addcmul_(demand, D), du)
        if need_decay:
            # The gradient of the exponent delta_l A[n].
            exponent = part.times_previous(borders[index]).mul_(adjoint)
            if ddelta is not None:
                part.write(_sum_states(A_t, exponent).addcmul_(entered, part.u), ddelta)
            if needed.A:
                dA += exponent.mul_(part.delta[..., None, :]).sum((0, 1, 2))
    return _Inputs(du, ddelta, dA.T if needed.A else None, dB, dC, dD if needed.D else None)


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """``selective_scan_fn`` of ``mamba_ssm``, or None where it is missing or broken, which is said once."""
    if find_spec(_KERNELS) is None:
        return None
    try:
        module = importlib.import_module(f"{_KERNELS}.ops.selective_scan_interface")
        return cast(Callable[..., Tensor], module.selective_scan_fn)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        _log.warning("mamba_ssm is installed but cannot be used; the scan in PyTorch takes its place: %s", error)
        return None


def _kernel_scan(kernel: Callable[..., Tensor], inputs: _Inputs) -> Tensor:
    """The same by the kernels, whose sequences are ``(B, channels, L)``."""
    u, delta, B, C = (t.transpose(1, 2).contiguous() for t in (inputs.u, inputs.delta, inputs.B, inputs.C))
    D = None if inputs.D is None else inputs.D.contiguous()
    return kernel(u, delta, inputs.A.contiguous(), B, C, D=D, delta_softplus=False).transpose(1, 2)
