"""A UNet as samplers call it: again and again, with the same context, on halves that guidance makes alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm.denoising.perturbed_context import PerturbedContext
from ldm.networks.attention import Attention, PlainAttention, TransformerBlock
from ldm.networks.unet import InnerFeatures, ReadContext, UNet


class CachedUNet:
    """A UNet in its own dtype, on latents in theirs, that does nothing twice: (z_t, timestep, context) -> output.

    It reads a context once for as long as it is told the same object. On a CPU it looks whether both halves of a batch
    are the same latents, told different things, as guidance wants them.

    Args:
        unet: in evaluation mode.
        reuse: compute the inner layers at every so many calls of equal context, and take what they said before at the
            others (Ma et al. 2024, arXiv:2312.00858, DeepCache). 1 is exact.
    """

    def __init__(self, unet: UNet, reuse: int = 1):
        self.unet, self.context, self.read, self.reuse, self.calls = unet, None, None, reuse, 0
        self.inner: InnerFeatures | None = None
        self.dtype = next(unet.parameters()).dtype

    def __call__(self, z_t: Tensor, timestep: Tensor, context: Any) -> Tensor:
        """The UNet's output [B, c, h, w] for z_t [B, c, h, w] at timesteps [B], told a context of B or none at all.

        The context may be `PerturbedContext`.
        """
        if context is not self.context:
            self.context, self.read, self.calls = context, _read(self.unet, context), 0
        if self.reuse > 1 and self.calls % self.reuse == 0:
            self.inner = InnerFeatures()
        self.calls += 1
        if (
            self.read is not None
            and z_t.is_cpu
            and self.read.keys_values
            and self.read.vector is None
            and self.read.latents is None
            and self.read.guidance is None
        ):
            alike = context.count if isinstance(context, PerturbedContext) else (len(z_t) + 1) // 2
            if _repeats(z_t, alike) and _repeats(timestep, alike):
                z_t, timestep = z_t[:alike], timestep[:alike]
        return self.unet(z_t.to(self.dtype), timestep, self.read, self.inner)


def self_attentions(unet: UNet, blocks: Iterable[str]) -> list[Attention]:
    """Those from pixels to pixels in the parts of a UNet that are named, such as mid_block or up_blocks.1.

    Raises:
        ValueError: there is none in a part.
    """
    found = {f"{name}.": module.attn1 for name, module in unet.named_modules() if isinstance(module, TransformerBlock)}
    found |= {f"{name}.": module for name, module in unet.named_modules() if isinstance(module, PlainAttention)}
    for block in blocks:
        if not any(name.startswith(f"{block}.") for name in found):
            places = dict.fromkeys(name.partition(".attentions")[0] for name in found)
            raise ValueError(f"there is no self-attention in {block!r} of this UNet; use {', '.join(places)}")
    return [attention for name, attention in found.items() if any(name.startswith(f"{block}.") for block in blocks)]


def _read(unet: UNet, context: Any) -> ReadContext | None:
    """What a UNet reads of a context, if there is one; a gradient through it may keep that, even in inference mode."""
    if context is None:  # an unconditional model
        return None
    perturbed = None
    if isinstance(context, PerturbedContext):
        perturbed = dict.fromkeys(self_attentions(unet, context.blocks), context.count)
        context = context.context
    if context is None:
        return ReadContext(None, None, None, None, {}, perturbed)
    with torch.inference_mode(False), torch.no_grad():
        read = unet.read(context)
        vector = None if read.vector is None else read.vector.clone()
    return replace(read, vector=vector, perturbed=perturbed)


def _repeats(x: Tensor, period: int) -> bool:
    """Whether a batch is one of `period` members, again and again."""
    return len(x) % period == 0 and torch.equal(x[:-period], x[period:])
