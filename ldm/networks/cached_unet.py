"""A UNet as samplers call it: repeatedly, with one context, on batches of repeated latents."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.denoising.perturbed_context import PerturbedContext
from ldm.networks.attention import Attention
from ldm.networks.deep_cache import DeepCache
from ldm.networks.folding import folded, layers_before_context, repetitions_of
from ldm.networks.identity_attention import identity_attention, self_attentions
from ldm.networks.unet import ReadContext, UNet


class CachedUNet:
    """A UNet that computes nothing twice: (z_t, timestep, context) -> output.

    It computes the keys and values of a context once for as long as it is called with the same object. On a CPU it
    computes what precedes the first cross-attention once for latents that are repeated in the batch, as guidance does.

    Args:
        unet: in evaluation mode. Inputs are cast to its dtype.
        reuse: compute the inner layers once in so many calls with the same context; see `DeepCache`. 1 is exact.
    """

    def __init__(self, unet: UNet, reuse: int = 1):
        self.unet, self.dtype = unet, next(unet.parameters()).dtype
        self.forward = DeepCache(unet, reuse) if reuse > 1 and isinstance(unet, UNet) else unet
        self.context: Any = None
        self.read: ReadContext | None = None
        self.perturbed: list[Attention] = []
        self.shared: list[nn.Module] = []  # layers whose outputs are equal for repeated latents

    def __call__(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """The UNet's output [B, c, h, w] for z_t [B, c, h, w] and timesteps [B].

        Args:
            z_t, timestep: the UNet's inputs.
            context: of B images, a `PerturbedContext`, or None for an unconditional UNet.
        """
        if context is not self.context:
            self._read(context)
        with ExitStack() as stack:
            if self.perturbed:
                stack.enter_context(identity_attention(self.perturbed, context.count))
            period = context.count if isinstance(context, PerturbedContext) else (len(z_t) + 1) // 2
            repetitions = self._repetitions(z_t, timestep, period)
            if repetitions > 1:
                stack.enter_context(folded(self.shared, period, repetitions))
            return self.forward(z_t.to(self.dtype), timestep, self.read)

    def _read(self, context: Any) -> None:
        """Compute what depends on the context alone."""
        self.context, self.perturbed = context, []
        if isinstance(context, PerturbedContext):
            self.perturbed, context = self_attentions(self.unet, context.blocks), context.context
        self.read = None if context is None else _read(self.unet, context)
        has_keys = self.read is not None and self.read.keys_values
        self.shared = [x for x in layers_before_context(self.unet) if x not in self.perturbed] if has_keys else []
        if isinstance(self.forward, DeepCache):
            self.forward.reset()

    def _repetitions(self, z_t: Tensor, timestep: Tensor, period: int) -> int:
        """How often the batch repeats its first images, as far as layers can be computed once for them."""
        read = self.read
        if read is None or not z_t.is_cpu or not self.shared:
            return 0
        if read.vector is not None or read.latents is not None or read.guidance is not None:
            return 0
        return min(repetitions_of(z_t, period), repetitions_of(timestep, period))


def _read(unet: UNet, context: Any) -> ReadContext:
    """What a UNet reads of a context. It can be kept for gradients, also in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        read = unet.read(context)
        vector = None if read.vector is None else read.vector.clone()
    return replace(read, vector=vector)
