"""The shape that our networks share: encoder, decoder, head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor, nn

from scantly.errors import ConfigError, times

__all__ = ["Decoder", "EncoderDecoder"]


class Decoder(nn.ModuleList):
    """Steps from the deepest level up to the images' resolution; each takes deeper features and a skip."""

    def forward(
        self, features: Sequence[Tensor], after: Iterable[Callable[[Tensor], Tensor]] | None = None
    ) -> list[Tensor]:
        """Decoder features of every level but the deepest, finest first, from those of the encoder.

        Args:
            features: Those of the encoder, finest first.
            after: What is done to the features of each level before the next finer one takes them, coarsest first.
        """
        decoded: list[Tensor] = []
        x = features[-1]
        changes: Iterable[Callable[[Tensor], Tensor]] = after if after is not None else [nn.Identity()] * len(self)
        for step, skip, change in zip(self, reversed(features[:-1]), changes, strict=True):
            x = change(step(x, skip))
            decoded.insert(0, x)
        return decoded


class EncoderDecoder(nn.Module):
    """A segmentation network whose parts can be used alone.

    A subclass sets the attributes. A method may run ``head`` or heads of its own on :meth:`decode_features`, put
    several decoders (:meth:`new_decoder`) on the features of one encoder, or change the features in between.

    Attributes:
        spatial_dims: 2 or 3.
        widths: Channels per level, finest first; the decoder's levels have the same.
        factors: What each side of an image must be divisible by.
        encoder: One module per level, finest first.
        pool: What lies between two levels of the encoder; the identity where the levels halve by themselves.
        decoder: The way up.
        head: From the finest decoder features to logits.
        deep_supervision: Whether :meth:`decode_all` gives logits of several resolutions.
        upsamplings: Kinds of decoders that :meth:`new_decoder` makes, the network's own first; empty: none.
    """

    spatial_dims: Literal[2, 3]
    widths: tuple[int, ...]
    factors: tuple[int, ...]
    encoder: nn.ModuleList
    pool: nn.Module
    decoder: Decoder
    head: nn.Module
    deep_supervision: bool = False
    upsamplings: tuple[str, ...] = ()

    def new_decoder(self, upsampling: str) -> Decoder:
        """A further decoder for the features of :meth:`encode`, freshly initialized, with weights of its own.

        Args:
            upsampling: ``transposed`` convolution, ``linear`` or ``nearest`` interpolation.

        Raises:
            ConfigError: if the network does not have that kind.
        """
        raise ConfigError(
            f"{type(self).__name__} has no decoder with {upsampling} upsampling; choose network.name unet or vnet."
        )

    def initialize(self, module: nn.Module) -> None:
        """Give a layer that a method adds the initialization of the network's own ones; to be passed to ``apply``.

        Nothing happens where these have torch's.
        """

    def encode(self, images: Tensor) -> list[Tensor]:
        """Features of every level, finest first.

        Args:
            images: ``(B, C, *spatial)``.

        Returns:
            One tensor per level, ``(B, widths[i], *spatial / 2**i)`` where every level halves all sides.

        Raises:
            ConfigError: if a side is not divisible by its factor.
        """
        sides = tuple(images.shape[2:])
        if len(sides) != self.spatial_dims or any(side % n for side, n in zip(sides, self.factors, strict=True)):
            raise ConfigError(
                f"this {type(self).__name__} takes {self.spatial_dims}D images whose sides are multiples of "
                f"{_product(self.factors)}; got {times(sides)}. Choose another --size."
            )
        features = [self.encoder[0](images)]
        for level in self.encoder[1:]:
            features.append(level(self.pool(features[-1])))
        return features

    def decode_features(self, features: Sequence[Tensor]) -> Tensor:
        """Features of the finest decoder level, on which the head works, ``(B, widths[0], *spatial)``."""
        finest: Tensor = self.decoder(features)[0]
        return finest

    @property
    def pyramid_widths(self) -> tuple[int, ...]:
        """Channels of the maps of :meth:`pyramid`, coarsest first."""
        return self.widths[::-1]

    def pyramid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Features of every level on the way up, coarsest first; costs no more than :meth:`decode_features`.

        Args:
            features: Those of :meth:`encode`.

        Returns:
            The deepest level's, then the decoder's. The last are those of :meth:`decode_features`, from which ``head``
            makes logits.
        """
        return [features[-1], *reversed(self.decoder(features))]

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, classes, *spatial)`` from the features of :meth:`encode`."""
        logits: Tensor = self.head(self.decode_features(features))
        return logits

    def decode_all(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits of every resolution with a head, finest first; the first are those of :meth:`decode`."""
        return [self.decode(features)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, classes, *spatial)``."""
        return self.decode(self.encode(images))


def _product(factors: Sequence[int]) -> str:
    return str(factors[0]) if len(set(factors)) == 1 else times(factors)
