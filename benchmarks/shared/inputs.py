"""The inputs of the contenders of a benchmark: requested images, and seeded random tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT, SEED, GUIDANCE_SCALE = "a photograph of a red heart on a wooden table", 42, 7.5


@dataclass(frozen=True)
class ImageRequest:
    """A request for a batch of images of PROMPT; image i has seed SEED + i."""

    size: int  # side in pixels
    batch: int
    steps: int


@dataclass(frozen=True)
class Pair:
    """A batch of classifier-free guidance: each z_t occurs twice, with different contexts."""

    z_t: Tensor  # [2 B, 4, h, w]
    tokens: Tensor  # [2 B, 77, d]
    timestep: int = 500

    @classmethod
    def draw(cls, size: int, width: int, batch: int = 1, device: str = "cpu") -> Pair:
        """Draw B latents [4, size, size] with two contexts of tokens [77, width] each."""
        z_t = normal(batch, 4, size, size, device=device)
        return cls(torch.cat([z_t, z_t]), normal(2 * batch, 77, width, device=device))


def normal(*shape: int, device: str = "cpu") -> Tensor:
    """Return standard normal numbers, the same at every call; on the meta device, an empty tensor."""
    return torch.randn(shape, generator=None if device == "meta" else torch.Generator().manual_seed(0), device=device)
