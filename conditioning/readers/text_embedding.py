"""A prompt's CLIP embedding as a vector beside its tokens: for unCLIP's prior (Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from conditioning.readers.combined import Widths
from stipple_core.embedders import EmbedderConfig, build_embedder


@dataclass(frozen=True, kw_only=True)
class TextEmbeddingConfig:
    """Whose embedding of a prompt is told."""

    encoder: EmbedderConfig = field(default_factory=EmbedderConfig)


class TextEmbeddingReader(nn.Module):
    """Given.prompts -> Context with vector [B, d], a point of the same space as embeddings of pictures."""

    reads = frozenset()
    reads_prompts = True
    trainable = False
    Config = TextEmbeddingConfig

    def __init__(self, config: TextEmbeddingConfig) -> None:
        super().__init__()
        self.embedder = build_embedder(config.encoder, images=False)
        self.config = replace(config, encoder=self.embedder.config)
        self.widths = Widths(vector=self.embedder.dim)

    @torch.no_grad()
    def forward(self, given: ConditionInputs) -> Context:
        """The embeddings of B prompts; whoever is dropped has the empty prompt, or a negative one, for a prompt."""
        return Context(vector=self.embedder.texts(given.prompts))  # [B, d]
