"""Networks by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from scantly.errors import ConfigError, unknown_name

__all__ = ["build", "known_networks", "side_factors"]

#: Name -> module and class; imported when asked for, since ``dynunet`` needs MONAI, which takes long to import.
_OURS = {"unet": "unet:UNet", "unet3d": "unet:UNet3D", "vnet": "vnet:VNet", "dynunet": "dynunet:DynUNet"}


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
        name: ``unet``, ``unet3d``, ``vnet``, ``dynunet``, or the class name of a network in ``monai.networks.nets``
            that takes ``spatial_dims``, ``in_channels`` and ``out_channels``. The name is looked up in that module
            alone; no path is imported.
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        arguments: Further keyword arguments of that network.

    Raises:
        ConfigError: for an unknown name (the nearest is offered) or arguments the network does not take.
    """
    network = _find(name)
    extra = dict(arguments or {})
    known = [key for key in inspect.signature(network).parameters if key not in {"self", "spatial_dims"}]
    for key in extra:
        if key not in known:
            raise ConfigError(unknown_name(f"argument of network {name}", key, known))
    if extra.get("deep_supervision") and name not in _OURS:
        raise ConfigError(
            f"network {name} gives coarser logits in a form of its own; for deep_supervision choose network.name "
            "dynunet."
        )
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
