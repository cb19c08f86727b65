"""The context of a batch in which the last images are denoised with perturbed self-attention (Ahn et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class PerturbedContext:
    """A context, and for which images of the batch self-attention is the identity. `CachedUNet` supports it.

    Args:
        context: of the whole batch, or None for an unconditional network.
        count: number of images at the end of the batch that are perturbed.
        blocks: names of the parts of the network whose self-attention is perturbed, such as "mid_block".
    """

    context: Any
    count: int
    blocks: tuple[str, ...]
