"""Group normalization followed by SiLU, the activation before each convolution of the networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """SiLU of the normalized x [B, C, H, W]; computed in place if gradients are disabled."""
    return F.silu(norm(x), inplace=not torch.is_grad_enabled())
