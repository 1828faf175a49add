"""Backbones by name, ours and every network of MONAI by its class name; heads on their features."""

from scantly.networks.batch_norm import synchronize_batch_norm
from scantly.networks.catalogue import build, check_sides, known_networks, side_factors
from scantly.networks.distance import DistanceNetwork
from scantly.networks.encoder_decoder import Decoder, EncoderDecoder
from scantly.networks.pyramid import PyramidHead
from scantly.networks.unet import UNet, UNet3D
from scantly.networks.vnet import VNet

__all__ = [
    "Decoder",
    "DistanceNetwork",
    "EncoderDecoder",
    "PyramidHead",
    "UNet",
    "UNet3D",
    "VNet",
    "build",
    "check_sides",
    "known_networks",
    "side_factors",
    "synchronize_batch_norm",
]
