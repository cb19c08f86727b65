"""The residual, attention and resampling blocks of the autoencoder (Esser et al. 2021, appendix A).

The modules of a level have diffusers' names. `layers()` returns them in the order in which they run, so that encoder
and decoder can recompute each of them separately in the backward pass, or run them in tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from stipple_core.operators.normalization import norm_silu
from stipple_core.operators.winograd import Convolution

EPS = 1e-6


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the channels change."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=EPS)
        self.conv1 = Convolution(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=EPS)
        self.conv2 = Convolution(out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_silu(self.norm1, x))
        h = self.conv2(norm_silu(self.norm2, h))
        return self.conv_shortcut(x) + h


class SingleHeadAttention(nn.Module):
    """Self-attention over all positions with a single head and a residual connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.group_norm(x).permute(0, 2, 3, 1).reshape(b, 1, height * width, c)  # [B, C, H, W] -> [B, 1, HW, C]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        h = self.to_out[0](h).reshape(b, height, width, c).permute(0, 3, 1, 2)  # [B, 1, HW, C] -> [B, C, H, W]
        return x + h


class Downsample(nn.Module):
    """Halves the sides by a strided convolution with padding only at the right and the bottom."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # [B, C, H, W] -> [B, C, H/2, W/2]


class Upsample(nn.Module):
    """Doubles the sides by nearest-neighbor interpolation and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Convolution(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # [B, C, H, W] -> [B, C, 2H, 2W]


class AutoencoderLevel(nn.Module):
    """Residual blocks of one resolution, each optionally followed by attention. Subclasses add the resampling."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, attention: bool, groups: int):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (depth - 1)
        self.resnets = nn.ModuleList([ResnetBlock(channels, out_channels, groups) for channels in inputs])
        self.attentions = nn.ModuleList(
            [SingleHeadAttention(out_channels, groups) for _ in inputs] if attention else []
        )

    def layers(self) -> Iterator[nn.Module]:
        """Yield the modules in the order in which they run."""
        for i, resnet in enumerate(self.resnets):
            yield resnet
            if self.attentions:
                yield self.attentions[i]


class EncoderLevel(AutoencoderLevel):
    """A level of the encoder. `downsamplers` is empty in the last level."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, attention: bool, groups: int, resample: bool):
        super().__init__(in_channels, out_channels, depth, attention, groups)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if resample else [])

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        yield from self.downsamplers


class DecoderLevel(AutoencoderLevel):
    """A level of the decoder. `upsamplers` is empty in the last level."""

    def __init__(self, in_channels: int, out_channels: int, depth: int, attention: bool, groups: int, resample: bool):
        super().__init__(in_channels, out_channels, depth, attention, groups)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if resample else [])

    def layers(self) -> Iterator[nn.Module]:
        yield from super().layers()
        yield from self.upsamplers


class MiddleLevel(nn.Module):
    """Two residual blocks at the lowest resolution, optionally with attention between them."""

    def __init__(self, channels: int, attention: bool, groups: int):
        super().__init__()
        self.attentions = nn.ModuleList([SingleHeadAttention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def layers(self) -> Iterator[nn.Module]:
        yield self.resnets[0]
        yield from self.attentions
        yield self.resnets[1]
