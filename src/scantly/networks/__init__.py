"""Backbones: ours by name, and every network of MONAI by its class name."""

from scantly.networks.catalogue import build, known_networks
from scantly.networks.unet import UNet

__all__ = ["UNet", "build", "known_networks"]
