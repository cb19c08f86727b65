"""Group normalization followed by SiLU, which begins every convolution of the networks here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU of the normalized x [B, C, H, W]; without gradients in one piece of memory instead of two."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())
