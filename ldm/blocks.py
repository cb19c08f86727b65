"""The parts of the latent UNet: residual blocks, transformers, resampling (Rombach et al. 2022, appendix E.2.1).

Submodule names are those of diffusers' `UNet2DConditionModel` and `UNet2DModel`, so weights are exchanged without a
key map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.normalization import norm_silu
from kernels.winograd import Convolution

KeysValues = tuple[Tensor, Tensor]  # of one attention, [B, heads, L, dim / heads] each

MASKED = -10000.0  # added to the attention score of a masked token; finite, so that a row masked whole stays defined
WIDTH_IN_CACHE = 3_000_000  # numbers between the two layers of a feed-forward that are made at a time on a CPU: 12 MB
FEWEST_ROWS = 512  # below, its matrix products are too flat to be fast


@dataclass(frozen=True)
class Signal:
    """All that a layer is told besides its input.

    Args:
        embedding: [B, E], of time (and vector), already through its activation.
        tokens: [B, L, d] for cross-attention, or None.
        bias: [B, 1, 1, L] added to the scores of cross-attention: 0 for a token, `MASKED` for padding; or None.
        keys_values: of each cross-attention that has read the tokens before (`UNet.read`), or None.
    """

    embedding: Tensor
    tokens: Tensor | None = None
    bias: Tensor | None = None
    keys_values: Mapping[Attention, KeysValues] | None = None

    def source(self, attention: Attention) -> Tensor | KeysValues | None:
        """What a cross-attention reads."""
        return self.tokens if self.keys_values is None else self.keys_values[attention]


def sinusoids(timestep: Tensor, dim: int) -> Tensor:
    """Embed timesteps [B] (real, 0 to about 1000) as [B, dim]: cosines, then sines (Ho et al. 2020, in LDM's order)."""
    half = dim // 2
    steps = torch.arange(half, device=timestep.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(10000.0) * steps / half)  # 1 down to 1 / 10000, [dim / 2]
    angles = timestep.float()[:, None] * frequencies  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [B, dim]


def zeroed(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, so that the residual branch that it ends begins as the identity (LDM)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Embedding(nn.Module):
    """Two linear layers with SiLU between: [B, dim] -> [B, out_dim]."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, out_dim)
        self.linear_2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
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
        told = self.time_emb_proj(embedding)[:, :, None, None]  # [B, out_channels or twice as many, 1, 1]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)  # [B, out_channels, 1, 1] each
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = norm_silu(self.norm2, h + told)
        return self.conv_shortcut(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, dim] to tokens [B, L, context_dim], or to itself when there are none."""

    def __init__(self, dim: int, heads: int, context_dim: int | None = None, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def read(self, source: Tensor) -> KeysValues:
        """Keys and values of a source [B, L, context_dim or dim]."""
        return self._heads(self.to_k(source)), self._heads(self.to_v(source))

    def forward(self, x: Tensor, source: Tensor | KeysValues | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend from x [B, N, dim] to a source [B, L, context_dim], to what was read of one, or to x itself."""
        keys, values = source if isinstance(source, tuple) else self.read(x if source is None else source)
        attended = F.scaled_dot_product_attention(self._heads(self.to_q(x)), keys, values, attn_mask=bias)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))  # [B, N, dim]

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, N, dim] -> [B, heads, N, dim / heads]; a CPU reads each head faster in one piece."""
        heads = projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads.contiguous() if heads.is_cpu else heads


class PlainAttention(Attention):
    """Attention of the pixels of a feature map to each other, as a residual: [B, C, H, W] -> [B, C, H, W].

    What LDM's unconditional models have instead of a `SpatialTransformer`; it reads nothing of the signal.
    """

    def __init__(self, channels: int, heads: int, groups: int, eps: float):
        super().__init__(channels, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        zeroed(self.to_out[0])

    def forward(self, x: Tensor, signal: Signal) -> Tensor:
        h = super().forward(self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2))  # [B, H * W, C]
        return x + h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # [B, C, H, W]


class GatedGELU(nn.Module):
    """A linear layer half of which gates the other (Shazeer 2020, GEGLU): [B, N, dim] -> [B, N, width]."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        values, gate = self.proj(x).chunk(2, dim=-1)  # [B, N, width] each
        return values * F.gelu(gate)


class FeedForward(nn.Module):
    """A gated layer of four times the width and back: [B, N, dim] -> [B, N, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(GatedGELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not x.is_cpu:
            return self.net(x)
        rows = max(FEWEST_ROWS, WIDTH_IN_CACHE // self.net[0].proj.out_features)  # what is between stays in the cache
        return torch.cat([self.net(part) for part in x.flatten(0, 1).split(rows)]).view_as(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm: [B, N, dim] -> [B, N, dim].

    Without a context (`context_dim` None) the second attention is to itself as well, as in LDM.
    """

    def __init__(self, dim: int, heads: int, context_dim: int | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, signal: Signal) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), signal.source(self.attn2), signal.bias)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, as a residual: [B, C, H, W] -> [B, C, H, W].

    The projections at both ends are 1x1 convolutions in LDM and SD1, linear layers in SD2: the same arithmetic, but for
    the shape of the stored weight. Both run as a matrix product over pixels, which for channels_last input is a view.
    """

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int | None, linear: bool, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = zeroed(nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor, signal: Signal) -> Tensor:
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H * W, C]
        h = F.linear(h, self.proj_in.weight.flatten(1), self.proj_in.bias)
        for block in self.transformer_blocks:
            h = block(h, signal)
        h = F.linear(h, self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # [B, C, H, W]


class Downsample(nn.Module):
    """A convolution of stride 2, padded by 1 on all sides: [B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, signal: Signal) -> Tensor:
        return self.conv(x)


class ResidualDownsample(ResidualBlock):
    """A residual block over the means of 2 x 2 pixels: [B, C, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]."""

    def forward(self, x: Tensor, signal: Signal) -> Tensor:
        return super().forward(x, signal.embedding, lambda h: F.avg_pool2d(h, 2, ceil_mode=True))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution: [B, C, h, w] -> [B, C, *size]; size is the skip's, 2h or 2h - 1."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Convolution(channels, channels)

    def forward(self, x: Tensor, signal: Signal, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))  # [B, C, *size]


class ResidualUpsample(ResidualBlock):
    """A residual block over nearest neighbours: [B, C, h, w] -> [B, C, *size]; size is the skip's, 2h or 2h - 1."""

    def forward(self, x: Tensor, signal: Signal, size: torch.Size) -> Tensor:
        return super().forward(x, signal.embedding, lambda h: F.interpolate(h, size=size, mode="nearest"))


class Level(nn.Module):
    """The layers at one resolution: residual block j, followed by attention j where there is one."""

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
        """Run layer `index` on x [B, C, H, W], with a skip connection [B, S, H, W] concatenated where one is given."""
        if skip is not None:
            x = torch.cat([x, skip], dim=1)  # [B, C + S, H, W]
        x = self.resnets[index](x, signal.embedding)  # [B, out_channels, H, W]
        return self.attentions[index](x, signal) if index < len(self.attentions) else x
