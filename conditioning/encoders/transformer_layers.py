"""Layers that several text encoders share: self-attention, and embedding tables without initial values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameter names of transformers' CLIP: [B, L, d] -> [B, L, d].

    Args:
        width: d.
        inner: Sum of the widths of the heads, which may differ from d.
        bias: Whether q, k and v have biases.
        causal: Whether tokens attend only to earlier tokens if there is no mask.
    """

    def __init__(self, width: int, heads: int, *, inner: int, bias: bool, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(attend(q, k, v, self.heads, mask, self.causal and mask is None))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Multi-head attention of q, k and v [B, L, d]; the mask is broadcast to [B, heads, L, L]."""
    # [B, L, d] -> [B, heads, L, d / heads]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return x.transpose(1, 2).flatten(2)  # [B, heads, L, d / heads] -> [B, L, d]


def empty_embedding(size: int, width: int) -> nn.Embedding:
    """Return an uninitialized embedding table: the initialization of nn.Embedding on "meta" imports for 2.5 s."""
    return nn.Embedding.from_pretrained(torch.empty(size, width), freeze=False)
