"""Batches, cached or of images, as latents and contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from autoencoder import Autoencoder, Posterior
from conditioning.conditioner import Conditioner
from conditioning.context import Context
from storage.dataset import Batch
from storage.shards import CachedBatch, CachedLatents


@dataclass(frozen=True)
class Inputs:
    """Batches, cached or of images, as latents and contexts."""

    autoencoder: Autoencoder
    conditioner: Conditioner
    text_network: nn.Module  # the conditioner, wrapped for several processes where it is trained
    cache: CachedLatents | None

    @torch.no_grad()
    def posterior(self, batch: Batch | CachedBatch, device: torch.device) -> Posterior:
        """The posterior of the unit-scale latents [B, c, h, w]."""
        if isinstance(batch, CachedBatch):
            return Posterior.from_moments(batch.moments.to(device, non_blocking=True))
        return self.autoencoder.encode(batch.images.to(device, non_blocking=True))

    def contexts(self, batch: Batch | CachedBatch, device: torch.device) -> tuple[Context, Context]:
        """The contexts of the captions (batch B), and of the empty caption (batch 1)."""
        if isinstance(batch, CachedBatch) and batch.tokens is not None:
            null = self.cache.null_tokens[None]  # [1, L, d]
            null = Context(tokens=null, mask=torch.ones(null.shape[:2], dtype=torch.bool))
            context = Context(tokens=batch.tokens, mask=batch.mask)
            if not self.conditioner.use_mask:  # all true; without it attention has faster kernels to choose from
                context, null = Context(tokens=context.tokens), Context(tokens=null.tokens)
            return context.to(device), null.to(device)
        tokens = self.conditioner.tokenize([*batch.captions, ""])
        both = self.text_network(tokens.ids.to(device), tokens.mask.to(device))
        return both.select(slice(0, -1)), both.select(-1)
