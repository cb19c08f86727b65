"""A picture's CLIP embedding as what a model reads: unCLIP's decoder (Ramesh et al. 2022, section 2.1).

Such a model draws variations of a picture; told an embedding that a prior made of a prompt, it draws from text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.combined import Widths
from stipple_core.embedders import EmbedderConfig, build_embedder


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddingConfig:
    """How the embedding of a picture is told.

    Raises:
        ValueError: it is not told at all.
    """

    encoder: EmbedderConfig = field(default_factory=EmbedderConfig)
    vector: bool = True  # the embedding itself, added to the time embedding
    tokens: int = 0  # and so many tokens made of it by a trained matrix; unCLIP: 4
    token_dim: int | None = None  # their width: that of the prompts' tokens; null: the embedding's

    def __post_init__(self):
        if self.tokens < 0 or not (self.vector or self.tokens):
            raise ValueError(f"image.tokens {self.tokens} without image.vector tells nothing; use at least 1 token")


class ImageEmbeddingReader(nn.Module):
    """Given.image [B, 3, H, W] -> Context with vector [B, d], tokens [B, k, token_dim], or both.

    Whoever is dropped has an embedding of zeros, which no picture has. Where Given.embedding [B, d] is there, made by a
    prior or mixed from several, no picture is looked at.
    """

    reads = frozenset({"image"})
    reads_prompts = False  # true where a prior makes embeddings of them
    Config = ImageEmbeddingConfig

    def __init__(self, config: ImageEmbeddingConfig) -> None:
        super().__init__()
        self.embedder = build_embedder(config.encoder, texts=False)
        self.config = replace(config, encoder=self.embedder.config)
        dim, width = self.embedder.dim, config.token_dim or self.embedder.dim
        self.trainable = config.tokens > 0
        if self.trainable:
            self.to_tokens = nn.Linear(dim, config.tokens * width)
        self.widths = Widths(tokens=width if config.tokens else 0, vector=dim if config.vector else 0)

    def requires_grad_(self, requires_grad: bool = True) -> ImageEmbeddingReader:
        """Whether the matrix learns; the encoder never does."""
        super().requires_grad_(requires_grad)
        self.embedder.requires_grad_(False)
        return self

    def forward(self, given: ConditionInputs) -> Context:
        """What is told of B pictures."""
        kept = ~given.is_dropped
        embedding = torch.zeros(len(kept), self.embedder.dim, device=kept.device)  # [B, d]
        if given.embedding is not None:
            embedding[kept] = given.embedding[kept].to(embedding)
        elif kept.any():  # of a batch in training half is dropped, and not looked at
            with torch.no_grad():
                embedding[kept] = self.embedder.images(given.image[kept])
        tokens = None
        if self.trainable:
            tokens = self.to_tokens(embedding.to(self.to_tokens.weight.dtype))
            tokens = tokens.unflatten(1, (self.config.tokens, -1))  # [B, k * width] -> [B, k, width]
        return Context(tokens=tokens, vector=embedding if self.config.vector else None)
