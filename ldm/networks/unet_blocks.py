"""The parts of the latent UNet: residual blocks, transformers, resampling (Rombach et al. 2022, appendix E.2.1).

Submodule names are those of diffusers' `UNet2DConditionModel` and `UNet2DModel`, so weights are exchanged without a
key map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.networks.attention import PlainAttention, Signal, SpatialTransformer, zeroed
from stipple_core.operators.normalization import norm_silu
from stipple_core.operators.winograd import Convolution


def scale_sinusoids(scale: Tensor, dim: int) -> Tensor:
    """Embed guidance scales [B] as [B, dim]: sines, then cosines of 1000 (scale - 1) (Luo et al. 2023, appendix)."""
    half = dim // 2
    steps = torch.arange(half, device=scale.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000.0) * steps / max(half - 1, 1))  # 1 down to 1 / 10000, [dim / 2]
    angles = 1000 * (scale.float() - 1)[:, None] * frequencies  # [B, dim / 2]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))  # [B, dim]


class Embedding(nn.Module):
    """Two linear layers with SiLU between: [B, dim] -> [B, out_dim]; a condition [B, condition_dim] is added before.

    The projection of the condition is zero at construction, so that it has no effect before training.
    """

    def __init__(self, dim: int, out_dim: int, condition_dim: int | None = None):
        super().__init__()
        self.linear_1 = nn.Linear(dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)
        if condition_dim is not None:
            self.cond_proj = nn.Linear(condition_dim, dim, bias=False)
            nn.init.zeros_(self.cond_proj.weight)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = x if condition is None else x + self.cond_proj(condition)
        return self.linear_2(F.silu(self.linear_1(x)))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the embedding between: [B, C, H, W] -> [B, out_channels, H, W].

    The embedding is added to the features, or with `scale_shift` scales and shifts the normalized ones (Dhariwal &
    Nichol 2021, AdaGN).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding_dim: int,
        groups: int,
        dropout: float,
        eps: float = 1e-5,
        scale_shift: bool = False,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, channels, eps=eps)
        self.conv1 = Convolution(channels, out_channels)
        self.time_emb_proj = nn.Linear(embedding_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(Convolution(out_channels, out_channels))
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, resized: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        h = norm_silu(self.norm1, x)
        if resized is not None:
            x, h = resized(x), resized(h)  # [B, C, H', W'] both
        h = self.conv1(h)  # [B, out_channels, H', W']
        projected = self.time_emb_proj(embedding)[:, :, None, None]  # [B, out_channels or twice as many, 1, 1]
        if self.scale_shift:
            scale, shift = projected.chunk(2, dim=1)  # [B, out_channels, 1, 1] each
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = norm_silu(self.norm2, h + projected)
        return self.conv_shortcut(x) + self.conv2(self.dropout(h))


class Downsample(nn.Module):
    """A convolution of stride 2, padded by 1 on all sides: [B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(x)


class ResidualDownsample(ResidualBlock):
    """A residual block over the means of 2 x 2 pixels: [B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return super().forward(x, embedding, lambda h: F.avg_pool2d(h, 2, ceil_mode=True))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution: [B, C, h, w] -> [B, C, *size]; size is the skip's, 2h or 2h - 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Convolution(channels, channels)

    def forward(self, x: Tensor, embedding: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # [B, C, *size]


class ResidualUpsample(ResidualBlock):
    """A residual block over nearest neighbours: [B, C, h, w] -> [B, C, *size]; size is the skip's, 2h or 2h - 1."""

    def forward(self, x: Tensor, embedding: Tensor, size: torch.Size) -> Tensor:
        return super().forward(x, embedding, lambda h: F.interpolate(h, size=size, mode="nearest"))


class UNetLevel(nn.Module):
    """The layers at one resolution: residual block j, followed by attention j if there is one."""

    def __init__(
        self,
        resnets: Iterable[ResidualBlock],
        attentions: Iterable[SpatialTransformer | PlainAttention],
        downsampler: Downsample | ResidualDownsample | None = None,
        upsampler: Upsample | ResidualUpsample | None = None,
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsampler] if downsampler else [])
        self.upsamplers = nn.ModuleList([upsampler] if upsampler else [])

    def layer(self, index: int, x: Tensor, signal: Signal, skip: Tensor | None = None) -> Tensor:
        """Run layer `index` on x [B, C, H, W], after concatenating a skip connection [B, S, H, W] if there is one."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)  # [B, C + S, H, W]
        x = self.resnets[index](x, signal.embedding)  # [B, out_channels, H, W]
        return self.attentions[index](x, signal) if index < len(self.attentions) else x
