"""Encodes batches of training data, cached or not: images to latents, captions and other conditions to contexts."""

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
    """Encodes batches to posteriors of latents and to contexts."""

    autoencoder: Autoencoder
    conditioner: Conditioner
    text_network: nn.Module  # the conditioner, wrapped for several processes if it is trained
    cache: CachedLatents | None
    needs_null: bool = True  # whether null contexts are computed

    @torch.no_grad()
    def posterior(self, batch: Batch | CachedBatch, device: torch.device) -> Posterior:
        """The posterior of the unit-scale latents [B, c, h, w]."""
        if isinstance(batch, CachedBatch):
            return Posterior.from_moments(batch.moments.to(device, non_blocking=True))
        return self.autoencoder.encode(batch.images.to(device, non_blocking=True))

    def contexts(self, batch: Batch | CachedBatch, device: torch.device) -> tuple[Context, Context | None]:
        """The contexts of a batch (batch size B) and the null contexts of its dropped members.

        Null contexts have batch size B, or 1 if the model is conditioned on prompts only. They are None unless
        `needs_null`.
        """
        if isinstance(batch, CachedBatch) and batch.tokens is not None:
            null = self.cache.null_tokens[None]  # [1, L, d]
            null = Context(tokens=null, mask=torch.ones(null.shape[:2], dtype=torch.bool))
            context = Context(tokens=batch.tokens, mask=batch.mask)
            if not self.conditioner.use_mask:  # all true; without it attention has faster kernels to choose from
                context, null = Context(tokens=context.tokens), Context(tokens=null.tokens)
            return context.to(device), null.to(device)
        inputs = self.condition_inputs(batch)
        prompts = [*inputs.prompts, *(inputs.null().prompts if self.needs_null else [])]
        tokens = self.conditioner.tokenize(prompts)
        both = self.text_network(tokens.ids.to(device), tokens.mask.to(device), inputs.to(device))
        null = both.select(slice(len(inputs), None)) if self.needs_null else None
        return both.select(slice(0, len(inputs))), null

    def condition_inputs(self, batch: Batch | CachedBatch) -> ConditionInputs:
        """The inputs of the conditioner in a batch."""
        reads = self.conditioner.reads
        return ConditionInputs(
            prompts=batch.captions,
            hint=batch.hints if "hint" in reads else None,
            image=batch.images if "image" in reads else None,
            frame=batch.frames if "frame" in reads else None,
            names=batch.names if "image" in reads else None,
        )
