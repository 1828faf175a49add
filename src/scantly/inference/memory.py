"""How much memory a forward pass needs and how much is free, and what to say when it does not suffice."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scantly.data.parallel import available_memory
from scantly.errors import megabytes

__all__ = ["Footprint", "available_bytes", "footprint", "is_out_of_memory", "megabytes"]

#: Peak of a forward pass over the tensors alive at once, measured with V-Net and U-Net on a CPU: convolution
#: libraries keep copies in their own layout (1.1 to 1.4 in float32); bf16 tensors take half (0.67 to 0.75).
_OVER_LIVE = {"32": 1.4, "bf16": 0.75}


@dataclass(frozen=True)
class Footprint:
    """What one window costs.

    Attributes:
        peak: Bytes of a forward pass over one window.
        classes: Number of classes that come out.
    """

    peak: int
    classes: int


class _LivePeak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Greatest number of bytes of the tensors made inside that are alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: dict[int, int] = {}

    def _forget(self, key: int) -> None:
        self._live -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._known:
                    self._known[key] = storage.nbytes()
                    weakref.finalize(storage, self._forget, key)
                    self._live += storage.nbytes()
                    self.peak = max(self.peak, self._live)
        return result


@torch.no_grad()
def footprint(network: nn.Module, channels: int, window: Sequence[int], *, bf16: bool = False) -> Footprint | None:
    """Count, without computing anything, what a forward pass over one window needs.

    The network runs on tensors without data, so this works for windows that would not fit.

    Args:
        network: In evaluation mode.
        channels: Image channels.
        window: Extent of the window.
        bf16: Whether the pass runs under bf16 autocast.

    Returns:
        ``None`` for a network that cannot run without data.
    """
    weights = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shadows = {name: torch.empty_like(tensor, device="meta") for name, tensor in weights.items()}
    try:
        with _LivePeak() as count:
            images = torch.empty(1, channels, *window, device="meta")
            logits = torch.func.functional_call(network, shadows, (images,))
    except (RuntimeError, MemoryError):  # NotImplementedError is a RuntimeError
        return None
    return Footprint(int(count.peak * _OVER_LIVE["bf16" if bf16 else "32"]), int(logits.shape[1]))


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken, or ``None`` where that cannot be known.

    On a GPU what the driver has free and what PyTorch holds unused; on a CPU what the kernel calls available, or
    what the container's limit leaves if that is less.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    if device.type != "cpu":
        return None
    return available_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch or NumPy could not get memory; on a CPU PyTorch raises a plain ``RuntimeError``."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
