"""Guidance: functions that make a denoise(z_t, t) -> z_0 out of denoisers and contexts (Ho & Salimans 2022).

All of them work on estimates of z_0. At a given z_t and t these are affine in the network's output, by the same numbers
for every estimate, so mixing them is mixing noises, velocities or scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Any], Tensor]  # (z_t [B, c, h, w], t one or [B]) -> z_0 [B, c, h, w]
# (conditional z_0, unconditional z_0, guidance scale, z_t, t) -> z_0
Combine = Callable[[Tensor, Tensor, float, Tensor, Any], Tensor]


def extrapolate(conditional: Tensor, unconditional: Tensor, guidance_scale: float, *_: Any) -> Tensor:
    """unconditional + guidance_scale (conditional - unconditional); the paper's w is guidance_scale - 1 (its eq. 6)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def rescaled(factor: float, coefficients: Callable[[Any], tuple[Tensor, Tensor]]) -> Combine:
    """A way to combine for `classifier_free` that takes back the contrast guidance adds (Lin et al. 2023, eq. 14-16).

    The guided output of the network is scaled to the standard deviation of each image's conditional output. It is the
    output that is scaled, so for noise and velocity prediction the result is another than if z_0 were.

    Args:
        factor: how much of that is used, in [0, 1] (the paper: 0.7).
        coefficients: the numbers of a time with z_0 = first * z_t + second * output, as `Denoiser.coefficients`.

    Raises:
        ValueError: factor outside [0, 1].
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"guidance rescale {factor} must be between 0 (off) and 1")

    def combine(conditional: Tensor, unconditional: Tensor, guidance_scale: float, z_t: Tensor, t: Any) -> Tensor:
        guided = extrapolate(conditional, unconditional, guidance_scale)
        first, second = (number.to(z_t).reshape(-1, *[1] * (z_t.dim() - 1)) for number in coefficients(t))
        output, wanted = ((z_0 - first * z_t) / second for z_0 in (guided, conditional))
        axes = tuple(range(1, z_t.dim()))
        ratio = wanted.std(axes, keepdim=True) / output.std(axes, keepdim=True)  # [B, 1, 1, 1]
        return guided + factor * (ratio - 1) * second * output

    return combine


def classifier_free(
    denoiser: Callable[[Tensor, Any, Any], Tensor],
    context: Any,
    null: Any,
    guidance_scale: float,
    combine: Combine = extrapolate,
) -> Denoise:
    """Guide a denoiser away from `null`, towards `context` (Ho & Salimans 2022, eq. 6).

    Args:
        denoiser: (z_t, t, context) -> z_0.
        context: what the pictures should show, for B images or for one, which then serves all.
        null: the empty caption, or a negative prompt, for B images or for one.
        guidance_scale: 1 is the plain conditional denoiser, and `null` is never computed; 0 is the one told `null`, and
            `context` is never computed; above 1 guides; below 0 guides away from `context`. Otherwise both are computed
            in one batch of 2 B.
        combine: what to make of the two estimates.

    Raises:
        ValueError: guidance_scale is not a finite number.
    """
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance scale {guidance_scale} must be a finite number; 1 is no guidance")

    @functools.cache  # one object for all steps, so that a network may keep what it has read of it
    def told(batch: int) -> Any:
        if guidance_scale == 1:
            return _for_all(context, batch)
        if guidance_scale == 0:
            return _for_all(null, batch)
        return _for_all(context, batch).cat(_for_all(null, batch))

    def denoise(z_t: Tensor, t: Any) -> Tensor:
        if guidance_scale in (0, 1):
            return denoiser(z_t, t, told(len(z_t)))
        twice = torch.cat([t, t]) if isinstance(t, Tensor) and t.dim() else t
        conditional, unconditional = denoiser(torch.cat([z_t, z_t]), twice, told(len(z_t))).chunk(2)  # 2 x [B, c, h, w]
        return combine(conditional, unconditional, guidance_scale, z_t, t)

    return denoise


def in_interval(inside: Denoise, outside: Denoise, start: float, stop: float) -> Denoise:
    """`inside` at times stop <= t <= start, `outside` elsewhere (Kynkaanniemi et al. 2024, eq. 6).

    With a guided denoiser inside and classifier_free(..., guidance_scale=1) outside, guidance costs nothing where it
    does harm: at high noise it drops variety, at low noise it does nothing.

    Args:
        inside, outside: (z_t, t) -> z_0, called with one time for all images.
        start, stop: times in [0, 1]; sampling runs from high to low, so start >= stop.

    Raises:
        ValueError: the times are not 0 <= stop <= start <= 1.
    """
    if not 0 <= stop <= start <= 1:
        raise ValueError(f"guidance interval from t = {start} to {stop} must satisfy 1 >= start >= stop >= 0")
    return lambda z_t, t: (inside if stop <= float(t) <= start else outside)(z_t, t)


def _for_all(context: Any, batch: int) -> Any:
    """A context for one picture is repeated for all of the batch; no context (None) stays none."""
    return context.repeat(batch) if context is not None and context.batch_size == 1 else context
