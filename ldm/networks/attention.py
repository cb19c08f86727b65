"""Attention over pixels, to tokens, and in transformers (Rombach et al. 2022, section 3.3).

Submodule names are those of diffusers' `UNet2DConditionModel` and `UNet2DModel`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ldm.networks.row_blocks import map_rows

KeysValues = tuple[Tensor, Tensor]  # of one attention, [B, heads, L, dim / heads] each

MASKED = -10000.0  # added to the attention score of a masked token; finite, so that a row masked whole stays defined


@dataclass(frozen=True)
class Signal:
    """The inputs of a layer besides its features.

    Args:
        embedding: [B, E], of the timestep and the vector, after its activation.
        tokens: [B, L, d] for cross-attention, or None.
        bias: [B, 1, 1, L], added to the scores of cross-attention: 0 for a token, `MASKED` for padding; or None.
        keys_values: of each cross-attention, if they were computed before (see `UNet.read`), or None.
    """

    embedding: Tensor
    tokens: Tensor | None = None
    bias: Tensor | None = None
    keys_values: Mapping[Attention, KeysValues] | None = None

    def source(self, attention: Attention) -> Tensor | KeysValues | None:
        """What a cross-attention attends to."""
        return self.tokens if self.keys_values is None else self.keys_values[attention]


def zeroed(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to zero, so that the residual block that it ends is the identity at first (LDM)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Multi-head attention of x [B, N, dim] to tokens [B, L, context_dim], or to itself if there are none."""

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
        """Attend from x [B, N, dim] to a source [B, L, context_dim], to its keys and values, or to x itself."""
        keys, values = source if isinstance(source, tuple) else self.read(x if source is None else source)
        attended = F.scaled_dot_product_attention(self._heads(self.to_q(x)), keys, values, attn_mask=bias)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))  # [B, N, dim]

    def attend_to_self(self, x: Tensor) -> Tensor:
        """The output for x [B, N, dim] if each place attends to itself alone."""
        return self.to_out[0](self.to_v(x))

    def _heads(self, projected: Tensor) -> Tensor:
        """[B, N, dim] -> [B, heads, N, dim / heads]; contiguous on a CPU, which is faster."""
        heads = projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads.contiguous() if heads.is_cpu else heads


class PlainAttention(Attention):
    """Attention of the pixels of a feature map to each other, as a residual: [B, C, H, W] -> [B, C, H, W].

    LDM's unconditional models have it in place of a `SpatialTransformer`. It does not read the signal.
    """

    def __init__(self, channels: int, heads: int, groups: int, eps: float):
        super().__init__(channels, heads, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)
        zeroed(self.to_out[0])

    def forward(self, x: Tensor, signal: Signal) -> Tensor:
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H * W, C]
        h = super().forward(h)
        return x + h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)  # [B, C, H, W]

    def attend_to_self(self, x: Tensor) -> Tensor:
        """The output for x [B, C, H, W] if each pixel attends to itself alone."""
        h = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B, H * W, C]
        h = super().attend_to_self(h)
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
        return map_rows(self.net, x, width=self.net[0].proj.out_features)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a LayerNorm: [B, N, dim] -> [B, N, dim].

    Without a context (`context_dim` None) the second attention is self-attention too, as in LDM.
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

    The projections at both ends are 1x1 convolutions in LDM and SD1 and linear layers in SD2. Only the shapes of their
    weights differ: both are computed as a matrix product over pixels, which are a view of channels_last input.
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
