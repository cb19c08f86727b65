"""Self-attention in which each pixel attends to itself alone: the perturbation of Ahn et al. 2024, eq. 15."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.networks.attention import Attention, PlainAttention, TransformerBlock


def self_attentions(unet: nn.Module, blocks: Iterable[str]) -> list[Attention]:
    """The self-attentions in the named parts of a UNet, such as mid_block or up_blocks.1.

    Raises:
        ValueError: a part has no self-attention.
    """
    by_name = {f"{name}.": part.attn1 for name, part in unet.named_modules() if isinstance(part, TransformerBlock)}
    by_name |= {f"{name}.": part for name, part in unet.named_modules() if isinstance(part, PlainAttention)}
    for block in blocks:
        if not any(name.startswith(f"{block}.") for name in by_name):
            places = dict.fromkeys(name.partition(".attentions")[0] for name in by_name)
            raise ValueError(f"there is no self-attention in {block!r} of this UNet; use {', '.join(places)}")
    return [attention for name, attention in by_name.items() if any(name.startswith(f"{block}.") for block in blocks)]


@contextmanager
def identity_attention(attentions: Iterable[Attention], count: int) -> Iterator[None]:
    """Within this context, self-attentions are the identity for the last `count` images of each batch."""
    handles = []
    for attention in attentions:
        perturbed: list[Tensor] = []
        handles.append(attention.register_forward_pre_hook(_split(perturbed, count)))
        handles.append(attention.register_forward_hook(_append(perturbed)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _split(perturbed: list[Tensor], count: int):
    """A hook that passes all but the last images on, and keeps the last ones."""

    def hook(module: nn.Module, arguments: tuple) -> tuple:
        x, *others = arguments
        perturbed.append(x[-count:])
        return x[:-count], *others

    return hook


def _append(perturbed: list[Tensor]):
    """A hook that appends the perturbed images to the output."""

    def hook(module: Attention, arguments: tuple, output: Tensor) -> Tensor:
        return torch.cat([output, module.attend_to_self(perturbed.pop())])

    return hook
