"""Conditioning on the CLIP embedding of the prompt: unCLIP's prior (Ramesh et al. 2022, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from conditioning.interface.context import Context
from conditioning.interface.input_reader import InputReader, Widths
from conditioning.interface.inputs import ConditionInputs
from stipple_core.embedders import EmbedderConfig, build_embedder


@dataclass(frozen=True, kw_only=True)
class TextEmbeddingConfig:
    """Which network embeds the prompt."""

    encoder: EmbedderConfig = field(default_factory=EmbedderConfig)


class TextEmbeddingReader(InputReader):
    """ConditionInputs.prompts -> Context with vector [B, d], in the same space as the embeddings of images."""

    reads = frozenset()
    reads_prompts = True
    Config = TextEmbeddingConfig

    def __init__(self, config: TextEmbeddingConfig) -> None:
        super().__init__()
        self.embedder = build_embedder(config.encoder, images=False)
        self.config = replace(config, encoder=self.embedder.config)
        self.widths = Widths(vector=self.embedder.dim)

    @torch.no_grad()
    def forward(self, inputs: ConditionInputs) -> Context:
        """Return the embeddings of B prompts; dropped members have the empty prompt, or a negative prompt."""
        return Context(vector=self.embedder.texts(inputs.prompts))  # [B, d]
