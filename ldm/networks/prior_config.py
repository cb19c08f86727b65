"""The shape of unCLIP's prior (Ramesh et al. 2022, table 3)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """The shape of a prior; the defaults are the paper's (1 billion parameters) over CLIP ViT-L/14.

    It says of itself what a UNetConfig says, as a network of latents [B, d, 1, 1].

    Raises:
        ValueError: a size is not positive.
    """

    embedding_dim: int = 768  # d, the length of an image embedding
    token_dim: int = 768  # channels of a prompt's tokens
    vector_dim: int = 768  # length of a prompt's embedding
    text_tokens: int = 77  # L, the number of a prompt's tokens
    layers: int = 24  # transformer blocks
    heads: int = 32  # attention heads
    head_dim: int = 64  # channels of a head; heads x head_dim is the width, 2048
    dropout: float = 0.0  # none: the paper names none for the prior

    sample_size, downsampling, attention, guidance_dim = 1, 1, "causal", None  # constant UNetConfig fields

    def __post_init__(self):
        for name in ("embedding_dim", "token_dim", "vector_dim", "text_tokens", "layers", "heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"prior.{name} {getattr(self, name)} must be at least 1")

    @property
    def width(self) -> int:
        """The number of channels of the transformer."""
        return self.heads * self.head_dim

    @property
    def in_channels(self) -> int:
        """The number of channels of the input z_t [B, d, 1, 1]."""
        return self.embedding_dim

    @property
    def out_channels(self) -> int:
        """The number of channels of the output [B, d, 1, 1]."""
        return self.embedding_dim

    @property
    def cross_attention_dim(self) -> int:
        """The number of channels of context.tokens [B, L, d]."""
        return self.token_dim
