"""Conditioning on the CLIP embedding of an image: unCLIP's decoder (Ramesh et al. 2022, section 2.1).

Such a model draws variations of an image. With an embedding that a prior samples for a prompt, it draws from text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from conditioning.interface.context import Context
from conditioning.interface.input_reader import InputReader, Widths
from conditioning.interface.inputs import ConditionInputs
from stipple_core.embedders import EmbedderConfig, build_embedder


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddingConfig:
    """How the embedding of an image is passed to the UNet.

    Raises:
        ValueError: The embedding is passed neither as a vector nor as tokens.
    """

    encoder: EmbedderConfig = field(default_factory=EmbedderConfig)
    vector: bool = True  # add the embedding to the time embedding
    tokens: int = 0  # number of tokens that a trained matrix makes of the embedding; unCLIP: 4
    token_dim: int | None = None  # their width, equal to that of the prompts' tokens; null: that of the embedding

    def __post_init__(self):
        if self.tokens < 0 or not (self.vector or self.tokens):
            raise ValueError(f"image.tokens {self.tokens} must be at least 1 if image.vector is false")


class ImageEmbeddingReader(InputReader):
    """ConditionInputs.image [B, 3, H, W] -> Context with vector [B, d], tokens [B, k, token_dim], or both.

    Dropped members have a zero embedding. If ConditionInputs.embedding [B, d] is present, such as from a prior or an
    interpolation, it is used and the image is ignored.

    Attributes:
        reads_prompts: True if a prior samples embeddings for prompts.
    """

    reads = frozenset({"image"})
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
        """Set whether the matrix is trained; the embedder never is."""
        super().requires_grad_(requires_grad)
        self.embedder.requires_grad_(False)
        return self

    def forward(self, inputs: ConditionInputs) -> Context:
        """Return the vector and the tokens of B embeddings."""
        shown = ~inputs.is_dropped
        embedding = torch.zeros(len(shown), self.embedder.dim, device=shown.device)  # [B, d]
        if inputs.embedding is not None:
            embedding[shown] = inputs.embedding[shown].to(embedding)
        elif shown.any():  # skips the dropped half of a training batch
            with torch.no_grad():
                embedding[shown] = self.embedder.images(inputs.image[shown])
        tokens = None
        if self.trainable:
            tokens = self.to_tokens(embedding.to(self.to_tokens.weight.dtype))
            tokens = tokens.unflatten(1, (self.config.tokens, -1))  # [B, k * width] -> [B, k, width]
        return Context(tokens=tokens, vector=embedding if self.config.vector else None)
