"""Checkpoints: written whole or not at all, read without pickle's dangers."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scantly.errors import RunError
from scantly.files import atomic_path
from scantly.ranks import rank, rows_of_all_ranks, world_size

__all__ = ["capture_rng", "load_checkpoint", "restore_rng", "save_checkpoint"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain data, atomically.

    Raises:
        RunError: if the disk is full; the previous checkpoint survives.
    """
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's writer reports a full disk so
            raise OSError(str(error).splitlines()[0]) from error


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``: tensors and plain data, no code.

    Raises:
        RunError: if it is missing, damaged or holds anything else.
    """
    if not path.is_file():
        raise RunError(f"{path} is missing; restore it, or train the run again with another --out.")
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"{path} cannot be read ({reason}); remove it to start the run again.") from error
    return state


def capture_rng(generator: torch.Generator) -> dict[str, Tensor]:
    """State of the method's generator and of torch's global ones (dropout draws from those).

    Returns:
        ``(bytes,)`` each, of several ranks ``(ranks, bytes)``; collective.
    """
    state = {"method": generator.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if world_size() > 1:
        state = {name: rows_of_all_ranks(value[None]) for name, value in state.items()}
    return state


def restore_rng(generator: torch.Generator, state: dict[str, Tensor]) -> None:
    """Inverse of :func:`capture_rng`.

    Raises:
        RunError: if the state is that of another kind of device, or of another number of ranks, which cannot continue
            exactly.
    """
    ranks = 1 if state["method"].ndim == 1 else len(state["method"])
    if ranks != world_size():
        raise RunError(
            f"the checkpoint was written by {ranks} {'process' if ranks == 1 else 'processes'}, and this training has "
            f"{world_size()}; resume with as many."
        )
    if ranks > 1:
        state = {name: value[rank()].clone() for name, value in state.items()}  # generators crash on parts of a tensor
    if state["method"].numel() != generator.get_state().numel():
        raise RunError(
            f"the checkpoint was written on another kind of device than '{generator.device.type}'; resume with the "
            "--device it was trained on."
        )
    generator.set_state(state["method"].cpu())
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
