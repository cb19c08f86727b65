"""Guidance: functions that make a denoise(z_t, t) -> z_0 out of denoisers and contexts (Ho & Salimans 2022).

All of them work on estimates of z_0. At a given z_t and t these are affine in the network's output, by the same numbers
for every estimate, so mixing them is mixing noises, velocities or scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Any], Tensor]  # (z_t [B, c, h, w], t one or [B]) -> z_0 [B, c, h, w]
# (conditional z_0, unconditional z_0, guidance scale, z_t, t) -> z_0
Combine = Callable[[Tensor, Tensor, float, Tensor, Any], Tensor]
Scale = float | Callable[[Any], float]  # a guidance scale, or that of a time which all images share


def extrapolate(conditional: Tensor, unconditional: Tensor, guidance_scale: float, *_: Any) -> Tensor:
    """unconditional + guidance_scale (conditional - unconditional); the paper's w is guidance_scale - 1 (its eq. 6)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def rescaled(
    factor: float, coefficients: Callable[[Any], tuple[Tensor, Tensor]], combine: Combine = extrapolate
) -> Combine:
    """A way to combine for `classifier_free` that takes back the contrast guidance adds (Lin et al. 2023, eq. 14-16).

    The guided output of the network is scaled to the standard deviation of each image's conditional output. It is the
    output that is scaled, so for noise and velocity prediction the result is another than if z_0 were.

    Args:
        factor: how much of that is used, in [0, 1] (the paper: 0.7).
        coefficients: the numbers of a time with z_0 = first * z_t + second * output, as `Denoiser.coefficients`.
        combine: what adds the contrast.

    Raises:
        ValueError: factor outside [0, 1].
    """
    if not 0 <= factor <= 1:
        raise ValueError(f"guidance rescale {factor} must be between 0 (off) and 1")

    def rescale(conditional: Tensor, unconditional: Tensor, guidance_scale: float, z_t: Tensor, t: Any) -> Tensor:
        guided = combine(conditional, unconditional, guidance_scale, z_t, t)
        first, second = (number.to(z_t).reshape(-1, *[1] * (z_t.dim() - 1)) for number in coefficients(t))
        output, wanted = ((z_0 - first * z_t) / second for z_0 in (guided, conditional))
        axes = tuple(range(1, z_t.dim()))
        ratio = wanted.std(axes, keepdim=True) / output.std(axes, keepdim=True)  # [B, 1, 1, 1]
        return guided + factor * (ratio - 1) * second * output

    return rescale


def classifier_free(
    denoiser: Callable[[Tensor, Any, Any], Tensor],
    context: Any,
    null: Any,
    guidance_scale: Scale,
    combine: Combine = extrapolate,
) -> Denoise:
    """Guide a denoiser away from `null`, ddim_step `context` (Ho & Salimans 2022, eq. 6).

    Args:
        denoiser: (z_t, t, context) -> z_0.
        context: what the pictures should show, for B images or for one, which then serves all.
        null: the empty caption, or a negative prompt, for B images or for one.
        guidance_scale: 1 is the plain conditional denoiser, and `null` is never computed; 0 is the one told `null`, and
            `context` is never computed; above 1 guides; below 0 guides away from `context`. Otherwise both are computed
            in one batch of 2 B. A function of t is asked at each call.
        combine: what to make of the two estimates.

    Raises:
        ValueError: guidance_scale is not a finite number.
    """
    scale_at = scale_of(guidance_scale)
    told = functools.cache(lambda batch: for_all(context, batch))  # one object for all steps, so that a network may
    told_null = functools.cache(lambda batch: for_all(null, batch))  # keep what it has read of it
    told_both = functools.cache(lambda batch: told(batch).cat(told_null(batch)))

    def denoise(z_t: Tensor, t: Any) -> Tensor:
        scale = scale_at(t)
        if scale == 1:
            return denoiser(z_t, t, told(len(z_t)))
        if scale == 0:
            return denoiser(z_t, t, told_null(len(z_t)))
        both = denoiser(*copies(z_t, t, 2), told_both(len(z_t)))
        conditional, unconditional = both.chunk(2)  # [B, c, h, w] each
        return combine(conditional, unconditional, scale, z_t, t)

    return denoise


def autoguidance(strong: Denoise, weak: Denoise, guidance_scale: Scale, combine: Combine = extrapolate) -> Denoise:
    """Guide a model away from a weaker version of itself, told the same (Karras et al. 2024, arXiv:2406.02507, eq. 3).

    Args:
        strong: the denoiser that is guided, guided already or not.
        weak: one of less capacity, training or context that makes the same mistakes, only larger.
        guidance_scale: as `classifier_free`: 1 never calls `weak`, 0 never calls `strong`.
        combine: what to make of the two estimates.

    Raises:
        ValueError: guidance_scale is not a finite number.
    """
    scale_at = scale_of(guidance_scale)

    def denoise(z_t: Tensor, t: Any) -> Tensor:
        scale = scale_at(t)
        if scale in (0, 1):
            return (strong if scale else weak)(z_t, t)
        return combine(strong(z_t, t), weak(z_t, t), scale, z_t, t)

    return denoise


def composed(
    denoiser: Callable[[Tensor, Any, Any], Tensor], contexts: Sequence[Any], weights: Sequence[float], null: Any
) -> Denoise:
    """Guide towards several contexts at once, and away from others (Liu et al. 2022, arXiv:2206.01714, eq. 11).

    The estimate is null + sum of weight (context - null), all in one batch; what weighs nothing is not computed.

    Args:
        denoiser: (z_t, t, context) -> z_0.
        contexts: each for B images or for one, which then serves all.
        weights: of each, its guidance scale; below 0 leads away from it.
        null: the empty caption, for B images or for one; not computed where the weights add up to 1.

    Raises:
        ValueError: a weight is not a finite number, or there are not as many weights as contexts.
    """
    if len(weights) != len(contexts):
        raise ValueError(f"{len(contexts)} contexts need as many weights, not {len(weights)}")
    weighed = [(context, scale_of(weight)(None)) for context, weight in zip(contexts, weights, strict=True) if weight]
    weights = [weight for _, weight in weighed]
    asked = [context for context, _ in weighed] + ([] if math.isclose(sum(weights), 1) else [null])

    @functools.cache
    def told(batch: int) -> Any:
        return functools.reduce(lambda some, more: some.cat(more), (for_all(context, batch) for context in asked))

    def denoise(z_t: Tensor, t: Any) -> Tensor:
        estimates = denoiser(*copies(z_t, t, len(asked)), told(len(z_t))).chunk(len(asked))  # [B, c, h, w] each
        if len(asked) == len(weights):
            return sum(weight * z_0 for weight, z_0 in zip(weights, estimates, strict=True))
        *estimates, unconditional = estimates
        ddim_step = (weight * (z_0 - unconditional) for weight, z_0 in zip(weights, estimates, strict=True))
        return sum(ddim_step, start=unconditional)

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


def thresholded(denoise: Denoise, bound: float, percentile: float | None = None) -> Denoise:
    """Keep estimates within what clean latents can be (Saharia et al. 2022, arXiv:2205.11487, section 2.3).

    Static: clipped to [-bound, bound]. Dynamic: clipped to [-s, s] and scaled by bound / s, where s is the percentile
    of each image's absolute values, and at least `bound`.

    Args:
        denoise: (z_t, t) -> z_0, guided or not.
        bound: largest absolute value of clean data: 1 for pixels; latents have none of their own, few are above 4.
        percentile: of dynamic thresholding, in percent (the paper: 99.5); None: static.

    Raises:
        ValueError: bound not above 0, or percentile not between 50 and 100.
    """
    if not 0 < bound < math.inf:
        raise ValueError(f"guidance bound {bound} must be a positive number; 1 is usual for pixels, 4 for latents")
    if percentile is not None and not 50 <= percentile <= 100:
        raise ValueError(f"guidance percentile {percentile} must be between 50 and 100; 99.5 is usual")
    if percentile is None:
        return lambda z_t, t: denoise(z_t, t).clamp(-bound, bound)

    def threshold(z_t: Tensor, t: Any) -> Tensor:
        z_0 = denoise(z_t, t)
        s = torch.quantile(z_0.abs().flatten(1), percentile / 100, dim=1).clamp(min=bound)  # [B]
        s = s.view(-1, *[1] * (z_0.dim() - 1))  # [B, 1, 1, 1]
        return z_0.clamp(-s, s) * (bound / s)

    return threshold


def scale_of(guidance_scale: Scale) -> Callable[[Any], float]:
    """A guidance scale as a function of t; raises ValueError where it is not a finite number."""

    def checked(scale: float) -> float:
        if not math.isfinite(scale):
            raise ValueError(f"guidance scale {scale} must be a finite number; 1 is no guidance")
        return scale

    if callable(guidance_scale):
        return lambda t: checked(guidance_scale(t))
    constant = checked(guidance_scale)
    return lambda t: constant


def for_all(context: Any, batch: int) -> Any:
    """A context for one picture is repeated for all of the batch; no context (None) stays none."""
    return context.repeat(batch) if context is not None and context.batch_size == 1 else context


def copies(z_t: Tensor, t: Any, count: int) -> tuple[Tensor, Any]:
    """z_t [B, c, h, w] and t (one, or [B]) again and again, as a batch of count B that is told different things."""
    return torch.cat([z_t] * count), torch.cat([t] * count) if isinstance(t, Tensor) and t.dim() else t
