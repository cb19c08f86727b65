"""Static and dynamic thresholding of estimates of clean latents (Saharia et al. 2022, section 2.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ldm.guidance.classifier_free import Denoise


def thresholded(denoise: Denoise, bound: float, percentile: float | None = None) -> Denoise:
    """Limit estimates to the range of clean latents (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Static thresholding clips to [-bound, bound]. Dynamic thresholding clips to [-s, s] and scales by bound / s, where s
    is the percentile of each image's absolute values, and at least `bound`.

    Args:
        denoise: (z_t, t) -> z_0, guided or not.
        bound: largest absolute value of clean data: 1 for pixels; of latents, few are above 4.
        percentile: of dynamic thresholding, in percent (the paper: 99.5); None is static.

    Raises:
        ValueError: bound not above 0, or percentile not between 50 and 100.
    """
    check_threshold(bound, percentile)
    if percentile is None:
        return lambda z_t, t: denoise(z_t, t).clamp(-bound, bound)

    def threshold(z_t: Tensor, t: Any) -> Tensor:
        z_0 = denoise(z_t, t)
        s = torch.quantile(z_0.abs().flatten(1), percentile / 100, dim=1).clamp(min=bound)  # [B]
        s = s.view(-1, *[1] * (z_0.dim() - 1))  # [B, 1, 1, 1]
        return z_0.clamp(-s, s) * (bound / s)

    return threshold


def check_threshold(bound: float, percentile: float | None) -> None:
    """Raise ValueError for a bound or percentile that `thresholded` does not support."""
    if not 0 < bound < math.inf:
        raise ValueError(f"guidance bound {bound} must be a positive number; 1 is usual for pixels, 4 for latents")
    if percentile is not None and not 50 <= percentile <= 100:
        raise ValueError(f"guidance percentile {percentile} must be between 50 and 100; 99.5 is usual")
