"""Batches, cached or of images, as latents and contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from autoencoder import Autoencoder, Posterior
from conditioning.interface.conditioner import Conditioner
from conditioning.interface.context import Context
from conditioning.interface.inputs import ConditionInputs
from stipple_core.data.dataset import Batch
from stipple_core.latent_cache.reader import CachedBatch, CachedLatents


@dataclass(frozen=True)
class BatchEncoder:
    """Batches, cached or of images, as latents and contexts."""

    autoencoder: Autoencoder
    conditioner: Conditioner
    text_network: nn.Module  # the conditioner, wrapped for several processes where it is trained
    cache: CachedLatents | None
    nulls: bool = True  # whether anybody is ever told nothing

    @torch.no_grad()
    def posterior(self, batch: Batch | CachedBatch, device: torch.device) -> Posterior:
        """The posterior of the unit-scale latents [B, c, h, w]."""
        if isinstance(batch, CachedBatch):
            return Posterior.from_moments(batch.moments.to(device, non_blocking=True))
        return self.autoencoder.encode(batch.images.to(device, non_blocking=True))

    def contexts(self, batch: Batch | CachedBatch, device: torch.device) -> tuple[Context, Context | None]:
        """What the network is told (batch B), and what of dropped members (batch B; 1 where there are prompts only).

        The second is None where nobody is ever told nothing.
        """
        if isinstance(batch, CachedBatch) and batch.tokens is not None:
            null = self.cache.null_tokens[None]  # [1, L, d]
            null = Context(tokens=null, mask=torch.ones(null.shape[:2], dtype=torch.bool))
            context = Context(tokens=batch.tokens, mask=batch.mask)
            if not self.conditioner.use_mask:  # all true; without it attention has faster kernels to choose from
                context, null = Context(tokens=context.tokens), Context(tokens=null.tokens)
            return context.to(device), null.to(device)
        given = self.given(batch)
        prompts = [*given.prompts, *(given.null().prompts if self.nulls else [])]
        tokens = self.conditioner.tokenize(prompts)
        read = self.text_network(tokens.ids.to(device), tokens.mask.to(device), given.to(device))
        null = read.select(slice(len(given), None)) if self.nulls else None
        return read.select(slice(0, len(given))), null

    def given(self, batch: Batch | CachedBatch) -> ConditionInputs:
        """What the conditioner reads of a batch."""
        reads = self.conditioner.reads
        return ConditionInputs(
            prompts=batch.captions,
            hint=batch.hints if "hint" in reads else None,
            image=batch.images if "image" in reads else None,
            frame=batch.frames if "frame" in reads else None,
            names=batch.names if "image" in reads else None,
        )
