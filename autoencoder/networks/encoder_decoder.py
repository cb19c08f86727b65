"""The encoder and the decoder without regularization (Rombach et al. 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoencoder.networks.autoencoder_blocks import EPS, DecoderLevel, EncoderLevel, MiddleLevel
from autoencoder.networks.autoencoder_config import AutoencoderConfig
from stipple_core.operators.normalization import norm_silu


def run_layers(levels: Iterable[nn.Module], x: Tensor, checkpointing: bool) -> Tensor:
    """Run the layers of levels in order. With `checkpointing`, only their inputs are kept for the backward pass."""
    recompute = checkpointing and torch.is_grad_enabled()
    for level in levels:
        for layer in level.layers():
            x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False) if recompute else layer(x)
    return x


class Encoder(nn.Module):
    """Maps images [B, in_channels, H, W] to features [B, c, H/f, W/f], or to moments [B, 2c, H/f, W/f] for KL."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        last = len(channels) - 1
        self.checkpointing = False
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            EncoderLevel(channels[max(i - 1, 0)], channels[i], config.layers_per_block, attention, groups, i < last)
            for i, attention in enumerate(config.attention_levels)
        )
        self.mid_block = MiddleLevel(channels[-1], config.mid_attention, groups)
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        moments = 2 if config.regularizer == "kl" else 1
        self.conv_out = nn.Conv2d(channels[-1], moments * config.latent_channels, 3, padding=1)

    @property
    def levels(self) -> tuple[nn.Module, ...]:
        """All levels in the order in which they run."""
        return (*self.down_blocks, self.mid_block)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)
        x = run_layers(self.levels, x, self.checkpointing)  # [B, C, H/f, W/f]
        return self.conv_out(norm_silu(self.conv_norm_out, x))


class Decoder(nn.Module):
    """Maps features [B, c, H/f, W/f] to images [B, in_channels, H, W], not clamped."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        last = len(channels) - 1
        self.checkpointing = False
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MiddleLevel(channels[0], config.mid_attention, groups)
        self.up_blocks = nn.ModuleList(
            DecoderLevel(channels[max(i - 1, 0)], channels[i], config.layers_per_block + 1, attention, groups, i < last)
            for i, attention in enumerate(config.attention_levels[::-1])
        )
        self.conv_norm_out = nn.GroupNorm(groups, channels[-1], eps=EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.in_channels, 3, padding=1)

    @property
    def levels(self) -> tuple[nn.Module, ...]:
        """All levels in the order in which they run."""
        return (self.mid_block, *self.up_blocks)

    def forward(self, features: Tensor) -> Tensor:
        x = self.conv_in(features)
        x = run_layers(self.levels, x, self.checkpointing)  # [B, C, H, W]
        return self.conv_out(norm_silu(self.conv_norm_out, x))
