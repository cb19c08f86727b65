"""The inputs of the contenders of a benchmark: requested images, and seeded random tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PROMPT, SEED, GUIDANCE_SCALE = "a photograph of a red heart on a wooden table", 42, 7.5


@dataclass(frozen=True)
class ImageRequest:
    """Pictures of PROMPT to be made together, picture i from SEED + i."""

    size: int  # side in pixels
    batch: int
    steps: int


@dataclass(frozen=True)
class Pair:
    """A pair as classifier-free guidance makes it: every z_t twice, each time with another context."""

    z_t: Tensor  # [2 B, 4, h, w]
    tokens: Tensor  # [2 B, 77, d]
    timestep: int = 500

    @classmethod
    def draw(cls, size: int, width: int, batch: int = 1, device: str = "cpu") -> Pair:
        """B latents [4, size, size] with two contexts of tokens [77, width] each."""
        z_t = normal(batch, 4, size, size, device=device)
        return cls(torch.cat([z_t, z_t]), normal(2 * batch, 77, width, device=device))


def normal(*shape: int, device: str = "cpu") -> Tensor:
    """Standard normal numbers, the same at every call; on the meta device only the shape."""
    return torch.randn(shape, generator=None if device == "meta" else torch.Generator().manual_seed(0), device=device)
