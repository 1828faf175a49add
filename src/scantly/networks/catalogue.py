"""Networks by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from scantly.errors import ConfigError, unknown_name
from scantly.networks.unet import UNet

__all__ = ["build", "known_networks"]

_OURS: dict[str, type[nn.Module]] = {"unet": UNet}


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
        name: ``unet``, or the class name of a network in ``monai.networks.nets`` that takes ``spatial_dims``,
            ``in_channels`` and ``out_channels``. The name is looked up in that module alone; no path is imported.
        spatial_dims: 2 or 3.
        in_channels: Image channels.
        out_channels: Classes, background included.
        arguments: Further keyword arguments of that network.

    Raises:
        ConfigError: for an unknown name (the nearest is offered) or arguments the network does not take.
    """
    network = _OURS.get(name) or _monai_networks().get(name)
    if network is None:
        raise ConfigError(unknown_name("network", name, known_networks()))
    extra = dict(arguments or {})
    known = [key for key in inspect.signature(network).parameters if key not in {"self", "spatial_dims"}]
    for key in extra:
        if key not in known:
            raise ConfigError(unknown_name(f"argument of network {name}", key, known))
    try:
        return network(spatial_dims=spatial_dims, in_channels=in_channels, out_channels=out_channels, **extra)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"network {name} refuses network.arguments {extra}: {error}.") from error
