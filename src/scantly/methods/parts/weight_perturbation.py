"""Steps in weight space: gradients taken aside, weights moved for one pass and put back bit by bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "RandomState",
    "Scale",
    "agreement",
    "ascend",
    "displaced",
    "joint_norm",
    "plus",
    "random_state",
    "replayed_random",
    "take_gradients",
]

#: ``global_l2``: one step of length epsilon for all weights together; ``layer_relative``: each tensor by epsilon times
#: its own norm; ``adaptive``: each weight in proportion to its size.
Scale = Literal["global_l2", "layer_relative", "adaptive"]

#: State of torch's global generators: the CPU's, and the CUDA device's where that is used.
RandomState = tuple[Tensor, Tensor | None]

_TINY = 1e-12


def take_gradients(weights: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients that have been added up, which are then cleared; zeros where there is none."""
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
    for p in weights:
        p.grad = None
    return taken


def plus(first: Sequence[Tensor], second: Sequence[Tensor], factor: float) -> list[Tensor]:
    """``first + factor * second``, tensor by tensor."""
    return list(torch._foreach_add(list(first), list(second), alpha=factor))


def joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm over all tensors together, a scalar."""
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
    return norm


def agreement(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Cosine between two lists of tensors, each taken as one long vector; a scalar, 0 where one of them is zero."""
    units = [
        torch._foreach_div(list(x), joint_norm(x).clamp(min=torch.finfo(x[0].dtype).tiny)) for x in (first, second)
    ]
    return torch.stack([product.sum() for product in torch._foreach_mul(*units)]).sum()


@torch.no_grad()
def ascend(weights: Sequence[Tensor], gradients: Sequence[Tensor], epsilon: float, scale: Scale) -> None:
    """Move the weights up the gradient, in place; a zero gradient moves nothing, and nothing waits for the device.

    Args:
        weights: Parameters, not empty.
        gradients: Of the loss to be raised, one per weight.
        epsilon: Size of the step: with ``global_l2`` its joint L2 norm (Foret et al., "Sharpness-Aware Minimization",
            ICLR 2021, equation 2), with ``layer_relative`` each tensor's step over the tensor's norm (Wu et al.,
            "Adversarial Weight Perturbation", NeurIPS 2020, equation 8), with ``adaptive`` the joint norm of
            step over weight (Kwon et al., "ASAM", ICML 2021, equation 9, without its floor).
        scale: As above.
    """
    weights, gradients = list(weights), list(gradients)
    if scale == "layer_relative":
        norms, lengths = torch._foreach_norm(gradients), torch._foreach_norm(weights)
        factors = [epsilon * length / (norm + _TINY) for norm, length in zip(norms, lengths, strict=True)]
        torch._foreach_add_(weights, torch._foreach_mul(gradients, factors))
        return
    sizes = torch._foreach_abs(weights) if scale == "adaptive" else None
    step = gradients if sizes is None else list(torch._foreach_mul(gradients, sizes))
    factor = epsilon / (joint_norm(step) + _TINY)
    step = step if sizes is None else list(torch._foreach_mul(step, sizes))
    torch._foreach_add_(weights, torch._foreach_mul(step, factor))


@contextmanager
def displaced(weights: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Within it the weights may be moved; afterwards they have the values they had, bit by bit.

    They are copied back: taking a step back would leave the rounding of both steps. The copy stays on the device.

    Yields:
        The copies.
    """
    kept = [p.detach().clone() for p in weights]
    try:
        yield kept
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(weights), kept)


def random_state(device: torch.device) -> RandomState:
    """State of torch's global generators of the CPU and of the device; reading it does not wait for the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def replayed_random(state: RandomState, device: torch.device) -> Iterator[None]:
    """Within it torch's global generators (dropout) draw again what they drew after ``state``.

    Afterwards they stand where they stood before.

    Args:
        state: Of :func:`random_state`.
        device: Where the network is.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
