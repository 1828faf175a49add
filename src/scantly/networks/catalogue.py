"""Networks by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from scantly.errors import ConfigError, times, unknown_name

__all__ = ["build", "check_sides", "known_networks", "side_factors"]

#: Name -> module and class; imported when asked for, since ``dynunet`` needs MONAI, which takes long to import.
_OURS = {
    "unet": "unet:UNet",
    "unet3d": "unet:UNet3D",
    "unet6": "lclpl_unet:UNet6",
    "vnet": "vnet:VNet",
    "dynunet": "dynunet:DynUNet",
}


def _find(name: str) -> type[nn.Module]:
    if name in _OURS:
        module, _, kind = _OURS[name].partition(":")
        network: type[nn.Module] = getattr(import_module(f"scantly.networks.{module}"), kind)
        return network
    found = _monai_networks().get(name)
    if found is None:
        raise ConfigError(unknown_name("network", name, known_networks()))
    return found


def _monai_networks() -> dict[str, type[nn.Module]]:
    from monai.networks import nets

    return {
        name: value
        for name, value in vars(nets).items()
        if inspect.isclass(value)
        and issubclass(value, nn.Module)
        and {"spatial_dims", "in_channels", "out_channels"} <= set(inspect.signature(value).parameters)
    }


def known_networks() -> list[str]:
    """Names for :func:`build`: ours in lower case, then MONAI's classes that segment, for instance ``DynUNet``."""
    return [*_OURS, *sorted(_monai_networks())]


def build(
    name: str,
    *,
    spatial_dims: Literal[2, 3],
    in_channels: int,
    out_channels: int,
    arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network that maps images ``(B, in_channels, *spatial)`` to logits ``(B, out_channels, *spatial)``.

    Args:
        name: ``unet``, ``unet3d``, ``unet6``, ``vnet``, ``dynunet``, or the class name of a network in
            ``monai.networks.nets`` that takes ``spatial_dims``, ``in_channels`` and ``out_channels``. The name is
            looked up in that module alone; no path is imported.
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        arguments: Further keyword arguments of that network.

    Raises:
        ConfigError: for an unknown name (the nearest is offered) or arguments the network does not take.
    """
    network = _find(name)
    extra = dict(arguments or {})
    if extra.get("deep_supervision") and name != "dynunet":
        raise ConfigError(
            f"deep_supervision is an option of network dynunet, not of {name}; leave it out or take --set "
            "network.name=dynunet."
        )
    known = [key for key in inspect.signature(network).parameters if key not in {"self", "spatial_dims"}]
    for key in extra:
        if key not in known:
            raise ConfigError(unknown_name(f"argument of network {name}", key, known))
    try:
        return network(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **extra)
    except (TypeError, ValueError, IndexError, AssertionError) as error:
        raise ConfigError(f"network {name} refuses network.arguments {extra}: {error}.") from error


def side_factors(
    name: str, *, spatial_dims: Literal[2, 3], arguments: Mapping[str, Any] | None = None
) -> tuple[int, ...] | None:
    """What each side of an image must be divisible by; ``None`` for MONAI's networks, which do not say.

    No memory is taken and no random number drawn.

    Args:
        name: As for :func:`build`.
        spatial_dims: 2 or 3.
        arguments: As for :func:`build`.

    Raises:
        ConfigError: as :func:`build`.

    Example:
        >>> side_factors("vnet", spatial_dims=3)
        (16, 16, 16)
    """
    if name not in _OURS:
        return None
    with torch.device("meta"):
        network = build(name, spatial_dims=spatial_dims, in_channels=1, out_channels=2, arguments=arguments)
    factors: tuple[int, ...] = network.factors  # type: ignore[assignment]
    return factors


def check_sides(
    name: str, sides: Sequence[int], *, in_channels: int = 1, arguments: Mapping[str, Any] | None = None
) -> None:
    """Refuse images that the network cannot take, before any is there.

    Ours say what their sides must be divisible by. MONAI's are run on tensors without data: if the sides fail and
    larger multiples of 32 do not, they are refused; a network that cannot run without data is not judged.

    Args:
        name: As for :func:`build`.
        sides: Of the images, ``(H, W)`` or ``(D, H, W)``.
        in_channels: Image channels.
        arguments: As for :func:`build`.

    Raises:
        ConfigError: naming sides that fit.
    """
    dims: Literal[2, 3] = 2 if len(sides) == 2 else 3
    factors = side_factors(name, spatial_dims=dims, arguments=arguments)
    if factors is not None:
        if all(side % factor == 0 for side, factor in zip(sides, factors, strict=True)):
            return
        fitting = [max(1, round(side / factor)) * factor for side, factor in zip(sides, factors, strict=True)]
        why = f"takes sides divisible by {times(factors)}"
    else:
        fitting = [max(64, -(-side // 32) * 32) for side in sides]
        if _runs(name, sides, in_channels, arguments) or not _runs(name, fitting, in_channels, arguments):
            return
        why = "cannot take them"
    size = " ".join(str(side) for side in [*fitting[-2:], *fitting[:-2]])
    raise ConfigError(
        f"sides of {times(sides)} do not fit network {name}, which {why}; use --size {size}, or another network.name."
    )


def _runs(name: str, sides: Sequence[int], in_channels: int, arguments: Mapping[str, Any] | None) -> bool:
    """Whether the network takes such images, tried without data."""
    dims: Literal[2, 3] = 2 if len(sides) == 2 else 3
    with torch.device("meta"), torch.no_grad():
        network = build(name, spatial_dims=dims, in_channels=in_channels, out_channels=2, arguments=arguments)
        try:
            network.eval()(torch.empty(1, in_channels, *sides))
        except (RuntimeError, ValueError, AssertionError):
            return False
    return True
