"""Perturbed attention guidance: away from the estimate of a network whose self-attention is the identity.

Ahn et al. 2024 (arXiv:2403.17377). It needs no empty caption, and also guides unconditional models.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ldm.denoising.perturbed_context import PerturbedContext
from ldm.guidance.classifier_free import (
    Combine,
    Denoise,
    Scale,
    classifier_free,
    copies,
    extrapolate,
    for_all,
    scale_of,
)


def perturbed_attention(
    denoiser: Callable[[Tensor, Any, Any], Tensor],
    context: Any,
    null: Any,
    guidance_scale: Scale,
    perturbed_scale: float = 3.0,
    blocks: tuple[str, ...] = ("mid_block",),
    combine: Combine = extrapolate,
) -> Denoise:
    """Guide by perturbed attention and classifier-free at once (Ahn et al. 2024, eq. 16).

    With the conditional estimate c, the unconditional u and the perturbed conditional p, all computed in one batch, the
    result is u + guidance_scale (c - u) + perturbed_scale (c - p). This equals guiding c at the sum of both scales away
    from the mean of u and p, weighted by guidance_scale - 1 and perturbed_scale, so any `combine` can be used.

    Args:
        denoiser: (z_t, t, context) -> z_0, whose network supports `PerturbedContext`.
        context, null, guidance_scale: as in `classifier_free`; at guidance_scale 1 `null` is never computed.
        perturbed_scale: the paper's s; 0 is `classifier_free`.
        blocks: names of the network's parts in which self-attention becomes the identity.
        combine: how the conditional estimate and the mean are combined.

    Raises:
        ValueError: a scale is not a finite number, or both add up to 1, where the mean is undefined.
    """
    check_perturbed(1.0 if callable(guidance_scale) else guidance_scale, perturbed_scale)
    if perturbed_scale == 0:
        return classifier_free(denoiser, context, null, guidance_scale, combine)
    scale_at = scale_of(guidance_scale)

    @functools.cache
    def context_of(batch: int, with_null: bool) -> PerturbedContext:
        positive = for_all(context, batch)
        whole = positive.cat(for_all(null, batch)).cat(positive) if with_null else _twice(positive)
        return PerturbedContext(whole, batch, blocks)

    def denoise(z_t: Tensor, t: Any) -> Tensor:
        scale = scale_at(t)
        count = 2 if scale == 1 else 3
        estimates = denoiser(*copies(z_t, t, count), context_of(len(z_t), scale != 1)).chunk(count)  # [B, c, h, w] each
        away = estimates[-1]
        if scale != 1:
            away = estimates[1] + _share(scale, perturbed_scale) * (away - estimates[1])
        return combine(estimates[0], away, scale + perturbed_scale, z_t, t)

    return denoise


def check_perturbed(scale: float, perturbed_scale: float) -> None:
    """Raise ValueError for scales that `perturbed_attention` does not support."""
    if not math.isfinite(perturbed_scale):
        raise ValueError(f"perturbed scale {perturbed_scale} must be a finite number; 0 is none, 3 is usual")
    if perturbed_scale and scale - 1 + perturbed_scale == 0:
        raise ValueError(f"guidance scale {scale} and perturbed scale {perturbed_scale} add up to 1; change one")


def _share(scale: float, perturbed_scale: float) -> float:
    """The weight of the perturbed estimate in the mean that guidance moves away from."""
    check_perturbed(scale, perturbed_scale)
    return perturbed_scale / (scale - 1 + perturbed_scale)


def _twice(context: Any) -> Any:
    return None if context is None else context.cat(context)
