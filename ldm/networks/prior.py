"""unCLIP's prior, which denoises an image's CLIP embedding conditioned on text (Ramesh et al. 2022, section 2.2).

Parameter names are those of diffusers' PriorTransformer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.networks.prior_config import PriorConfig
from ldm.networks.unet import ReadContext
from ldm.networks.unet_blocks import Embedding
from stipple_core.operators.sinusoids import sinusoids

EXTRA = 4  # places after the text: its embedding, the timestep, the noisy embedding, the output


class PriorTransformer(nn.Module):
    """A causal transformer over text tokens, text embedding, timestep, noisy embedding and one learned place.

    The output is that of the last place. It is called like a UNet.

    Attributes:
        config: its shape.
        checkpointing: recompute each block's activations in the backward pass.
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        width, dim = config.width, config.embedding_dim
        self.time_embedding = Embedding(width, width)
        self.proj_in = nn.Linear(dim, width)
        self.embedding_proj = nn.Linear(config.vector_dim, width)
        self.encoder_hidden_states_proj = nn.Linear(config.token_dim, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(1, config.text_tokens + EXTRA, width))
        self.prd_embedding = nn.Parameter(0.01 * torch.randn(1, 1, width))
        self.transformer_blocks = nn.ModuleList(PriorBlock(config) for _ in range(config.layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, dim)
        self.register_buffer("clip_mean", torch.zeros(1, dim))
        self.register_buffer("clip_std", torch.ones(1, dim))

    def forward(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """Run the network.

        Args:
            z_t: [B, d, 1, 1].
            timestep: [B], real numbers from 0 to about 1000.
            context: tokens [B, L, token_dim] with their mask [B, L] or None, vector [B, vector_dim].
        Returns: [B, d, 1, 1].
        Raises:
            ValueError: the context lacks tokens or vector, or has others.
        """
        self._check(context)
        time = self.time_embedding(sinusoids(timestep, self.config.width).to(z_t.dtype))  # [B, width]
        single = [self.embedding_proj(context.vector), time, self.proj_in(z_t.flatten(1))]
        end = self.prd_embedding.to(z_t.dtype).expand(len(z_t), -1, -1)
        x = [self.encoder_hidden_states_proj(context.tokens), torch.stack(single, 1), end]
        x = torch.cat(x, 1) + self.positional_embedding.to(z_t.dtype)  # [B, L + 4, width]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        seen = causal if context.mask is None else causal & F.pad(context.mask, (0, EXTRA), value=True)[:, None, None]
        for block in self.transformer_blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, seen, use_reentrant=False)
            else:
                x = block(x, seen)
        return self.proj_to_clip_embeddings(self.norm_out(x[:, -1]))[..., None, None]  # [B, d] -> [B, d, 1, 1]

    @torch.no_grad()
    def tell_scale(self, mean: Tensor, std: Tensor) -> None:
        """Store the scale of embeddings, std * z_0 + mean, [d] each, for programs without `ImageEmbeddings`."""
        self.clip_mean.copy_(mean[None])
        self.clip_std.copy_(std[None])

    def read(self, context: Any) -> ReadContext:
        """The context itself: a prior computes nothing of it in advance."""
        return ReadContext(context.tokens, context.mask, context.vector, context.latents, {})

    def _check(self, context: Any) -> None:
        shapes = tuple(None if x is None else tuple(x.shape[1:]) for x in (context.tokens, context.vector))
        expected = ((self.config.text_tokens, self.config.token_dim), (self.config.vector_dim,))
        if shapes != expected:
            raise ValueError(
                f"context has tokens and vector of shape {shapes}, this prior was built for {expected}; use the "
                "conditioner that it was trained with"
            )


class PriorBlock(nn.Module):
    """Causal self-attention and feed-forward, each on the norm of the residual stream: [B, N, width] -> the same."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.attn1 = nn.LayerNorm(width), PriorAttention(width, config.heads)
        self.norm3, self.ff = nn.LayerNorm(width), PriorFeedForward(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = x + self.dropout(self.attn1(self.norm1(x), seen))
        return x + self.dropout(self.ff(self.norm3(x)))


class PriorAttention(nn.Module):
    """Self-attention of x [B, N, width], with a mask of the places that each place sees."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, N, width] -> [B, heads, N, head_dim]
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.to_out[0](x.transpose(1, 2).flatten(2))  # [B, heads, N, head_dim] -> [B, N, width]


class PriorFeedForward(nn.Module):
    """A layer of four times the width and back: [B, N, width] -> [B, N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = nn.Module()
        inner.proj = nn.Linear(width, 4 * width)
        self.net = nn.ModuleList([inner, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](F.gelu(self.net[0].proj(x)))
