"""Layers that a batch of repeated images passes once: guidance calls a UNet on the same latents with several prompts.

Before the first cross-attention the repetitions are equal, so it is enough to compute one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.networks.unet import UNet


def layers_before_context(unet: UNet) -> list[nn.Module]:
    """The layers that a UNet with cross-attention applies before its first cross-attention, in order."""
    layers: list[nn.Module] = [unet.conv_in, unet.time_embedding]
    for level in (*unet.down_blocks, unet.mid_block):
        for index, residual in enumerate(level.resnets):
            layers.append(residual)
            if index < len(level.attentions):
                transformer = level.attentions[index]
                return [*layers, transformer.norm, transformer.transformer_blocks[0].attn1]
        layers += level.downsamplers
    return layers


@contextmanager
def folded(layers: Iterable[nn.Module], period: int, repetitions: int) -> Iterator[None]:
    """Within this context, layers compute the first `period` images of each batch and repeat their outputs.

    Args:
        layers: modules of tensors [B, ...] whose batch is the same `period` images again and again.
        period: number of different images.
        repetitions: B / period.
    """
    handles = []
    for layer in layers:
        handles.append(
            layer.register_forward_pre_hook(lambda _, arguments: tuple(_first(x, period) for x in arguments))
        )
        handles.append(layer.register_forward_hook(lambda _, __, output: torch.cat([output] * repetitions)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def repetitions_of(x: Tensor, period: int) -> int:
    """How often a batch x [B, ...] repeats its first `period` members; 0 if it does not consist of repetitions."""
    repeats = len(x) % period == 0 and torch.equal(x[:-period], x[period:])
    return len(x) // period if repeats else 0


def _first(argument: Any, period: int) -> Any:
    return argument[:period] if isinstance(argument, Tensor) else argument
