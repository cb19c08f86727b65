"""The architecture of an autoencoder (Rombach et al. 2022, table 8), with the option names of diffusers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The architecture of an `Autoencoder`; f = 2 ** (len(block_out_channels) - 1).

    Raises:
        ValueError: a value is invalid; the message names the value, the rule and a fix.
    """

    regularizer: str = "kl"  # "kl" (diagonal Gaussian posterior) or "vq" (codebook)
    in_channels: int = 3  # channels of images and reconstructions
    latent_channels: int = 4  # c, channels of the latents
    block_out_channels: tuple[int, ...] = (
        128,
        256,
        512,
        512,
    )  # channels per level; all but the last halve the size
    layers_per_block: int = 2  # residual blocks per level in the encoder; the decoder has one more
    attention_levels: tuple[bool, ...] = ()  # per level: self-attention after each residual block; empty: none
    mid_attention: bool = True  # self-attention at the lowest resolution, between two residual blocks
    norm_num_groups: int = 32  # groups of every GroupNorm
    sample_size: int = 256  # side of training images in pixels; informative only
    codebook_size: int = 8192  # vq: number of codes
    codebook_dim: int | None = None  # vq: channels of a code; None: latent_channels
    commitment: float = 0.25  # vq: beta, weight of the commitment loss

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        levels = tuple(bool(level) for level in self.attention_levels)
        if not any(levels):  # none, for any number of levels
            levels = (False,) * len(self.block_out_channels)
        object.__setattr__(self, "attention_levels", levels)
        if self.regularizer not in ("kl", "vq"):
            raise ValueError(f"regularizer {self.regularizer!r} is unknown; use 'kl' or 'vq'")
        for name in ("norm_num_groups", "layers_per_block", "in_channels", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"autoencoder.{name} {getattr(self, name)} must be at least 1")
        if not self.block_out_channels:
            raise ValueError("block_out_channels () is empty; specify at least one level, such as (64, 128)")
        if len(levels) != len(self.block_out_channels):
            raise ValueError(
                f"attention_levels has {len(levels)} entries for {len(self.block_out_channels)} levels of "
                "block_out_channels; specify one true or false per level, or an empty list"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels {channels} is not divisible by norm_num_groups {self.norm_num_groups}; "
                    f"use {(channels // self.norm_num_groups + 1) * self.norm_num_groups} or fewer groups"
                )

    @property
    def downsampling(self) -> int:
        """f, pixels per latent along each side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def code_channels(self) -> int:
        """Channels of the latents that `Autoencoder.encode` returns: those of a code, if there is a codebook."""
        return self.codebook_dim or self.latent_channels if self.regularizer == "vq" else self.latent_channels

    def check_size(self, *sides: int) -> None:
        """Raise a ValueError if a side of an image is not divisible by f."""
        f = self.downsampling
        for side in sides:
            if side % f:
                low = side // f * f
                sizes = f"{low} or {low + f}" if low else f"{f}"
                raise ValueError(f"image size {side} is not divisible by {f} (autoencoder downsampling); use {sizes}")
