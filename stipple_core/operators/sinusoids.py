"""Sinusoidal embeddings of numbers: timesteps, noise levels, sizes (Ho et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LONGEST_PERIOD = 10000.0  # divided by 2 pi


def sinusoids(numbers: Tensor, dim: int) -> Tensor:
    """Embed real numbers [...], such as timesteps from 0 to 1000, as cosines, then sines (LDM's order): [..., dim]."""
    half = dim // 2
    steps = torch.arange(half, device=numbers.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(LONGEST_PERIOD) * steps / half)  # 1 down to 1 / 10000, [dim / 2]
    angles = numbers.float()[..., None] * frequencies  # [..., dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [..., dim]
