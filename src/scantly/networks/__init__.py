"""Backbones: ours by name, and every network of MONAI by its class name."""

from scantly.networks.catalogue import build, check_sides, known_networks, side_factors
from scantly.networks.encoder_decoder import Decoder, EncoderDecoder
from scantly.networks.unet import UNet, UNet3D
from scantly.networks.vnet import VNet

__all__ = [
    "Decoder",
    "EncoderDecoder",
    "UNet",
    "UNet3D",
    "VNet",
    "build",
    "check_sides",
    "known_networks",
    "side_factors",
]
