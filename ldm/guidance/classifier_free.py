"""Guidance: functions that build a denoise(z_t, t) -> z_0 from denoisers and contexts (Ho & Salimans 2022).

All of them combine estimates of z_0. At the same z_t and t every estimate is the same affine function of the network's
output, so combining estimates combines noises, velocities or scores.
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
Scale = float | Callable[[Any], float]  # a guidance scale, or a function of the time, which all images share


def extrapolate(conditional: Tensor, unconditional: Tensor, guidance_scale: float, *_: Any) -> Tensor:
    """unconditional + guidance_scale (conditional - unconditional); the paper's w is guidance_scale - 1 (its eq. 6)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def rescaled(
    factor: float, coefficients: Callable[[Any], tuple[Tensor, Tensor]], combine: Combine = extrapolate
) -> Combine:
    """A combination for `classifier_free` that removes the contrast which guidance adds (Lin et al. 2023, eq. 14-16).

    The guided output of the network is scaled to the standard deviation of each image's conditional output. This is
    not the same as scaling z_0, except for clean prediction.

    Args:
        factor: share of the scaled output in the result, in [0, 1] (the paper: 0.7).
        coefficients: t -> (first, second) with z_0 = first * z_t + second * output, as `Denoiser.coefficients`.
        combine: the combination that is rescaled.

    Raises:
        ValueError: factor outside [0, 1].
    """
    check_rescale(factor)

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
    """Guide a denoiser away from `null`, towards `context` (Ho & Salimans 2022, eq. 6).

    Args:
        denoiser: (z_t, t, context) -> z_0.
        context: what the images should show, of B images, or of one that is used for all.
        null: of the empty caption, or of a negative prompt, for B images or for one.
        guidance_scale: 1 is the conditional denoiser, which never computes `null`; 0 is the one conditioned on `null`,
            which never computes `context`; above 1 guides; below 0 guides away from `context`. Except at 0 and 1 both
            are computed in one batch of 2 B. A function of t is evaluated at each call.
        combine: how the two estimates are combined.

    Raises:
        ValueError: guidance_scale is not a finite number.
    """
    scale_at = scale_of(guidance_scale)
    context_of = functools.cache(lambda batch: for_all(context, batch))  # one object for all steps, so that a network
    null_of = functools.cache(lambda batch: for_all(null, batch))  # can cache its keys and values
    both_of = functools.cache(lambda batch: context_of(batch).cat(null_of(batch)))

    def denoise(z_t: Tensor, t: Any) -> Tensor:
        scale = scale_at(t)
        if scale == 1:
            return denoiser(z_t, t, context_of(len(z_t)))
        if scale == 0:
            return denoiser(z_t, t, null_of(len(z_t)))
        both = denoiser(*copies(z_t, t, 2), both_of(len(z_t)))
        conditional, unconditional = both.chunk(2)  # [B, c, h, w] each
        return combine(conditional, unconditional, scale, z_t, t)

    return denoise


def autoguidance(strong: Denoise, weak: Denoise, guidance_scale: Scale, combine: Combine = extrapolate) -> Denoise:
    """Guide a model away from a weaker version with the same context (Karras et al. 2024, arXiv:2406.02507, eq. 3).

    Args:
        strong: the denoiser that is guided; it may be guided already.
        weak: a denoiser of less capacity, training or context, which makes the same errors, but larger ones.
        guidance_scale: as in `classifier_free`; 1 never calls `weak`, 0 never calls `strong`.
        combine: how the two estimates are combined.

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
    """Guide towards several contexts, and away from others (Liu et al. 2022, arXiv:2206.01714, eq. 11).

    The estimate is null + sum of weight (context - null), computed in one batch. Contexts of weight 0 are skipped.

    Args:
        denoiser: (z_t, t, context) -> z_0.
        contexts: each of B images, or of one that is used for all.
        weights: the guidance scale of each context; below 0 guides away from it.
        null: of the empty caption, for B images or for one; not computed if the weights add up to 1.

    Raises:
        ValueError: a weight is not a finite number, or the numbers of weights and contexts differ.
    """
    if len(weights) != len(contexts):
        raise ValueError(f"{len(contexts)} contexts need as many weights, not {len(weights)}")
    weighted = [(context, scale_of(weight)(None)) for context, weight in zip(contexts, weights, strict=True) if weight]
    weights = [weight for _, weight in weighted]
    computed = [context for context, _ in weighted] + ([] if math.isclose(sum(weights), 1) else [null])

    @functools.cache
    def contexts_of(batch: int) -> Any:
        return functools.reduce(lambda some, more: some.cat(more), (for_all(context, batch) for context in computed))

    def denoise(z_t: Tensor, t: Any) -> Tensor:
        estimates = denoiser(*copies(z_t, t, len(computed)), contexts_of(len(z_t))).chunk(len(computed))  # [B, c, h, w]
        if len(computed) == len(weights):
            return sum(weight * z_0 for weight, z_0 in zip(weights, estimates, strict=True))
        *estimates, unconditional = estimates
        differences = (weight * (z_0 - unconditional) for weight, z_0 in zip(weights, estimates, strict=True))
        return sum(differences, start=unconditional)

    return denoise


def in_interval(inside: Denoise, outside: Denoise, start: float, stop: float) -> Denoise:
    """`inside` at times stop <= t <= start, `outside` elsewhere (Kynkaanniemi et al. 2024, eq. 6).

    With a guided denoiser inside and classifier_free(..., guidance_scale=1) outside, guidance is skipped where it does
    not help: at high noise it reduces variety, at low noise it has no effect.

    Args:
        inside, outside: (z_t, t) -> z_0; t is one number for all images.
        start, stop: times in [0, 1] with start >= stop, since sampling runs from high to low.

    Raises:
        ValueError: the times are not 0 <= stop <= start <= 1.
    """
    check_interval(start, stop)
    return lambda z_t, t: (inside if stop <= float(t) <= start else outside)(z_t, t)


def scale_of(guidance_scale: Scale) -> Callable[[Any], float]:
    """A guidance scale as a function of t. Raises ValueError if it is not a finite number."""
    if callable(guidance_scale):
        return lambda t: check_scale(guidance_scale(t))
    constant = check_scale(guidance_scale)
    return lambda t: constant


def check_scale(scale: float) -> float:
    """The guidance scale. Raises ValueError if it is not a finite number."""
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale {scale} must be a finite number; 1 is no guidance")
    return scale


def check_rescale(factor: float) -> None:
    """Raise ValueError for a factor of `rescaled` outside [0, 1]."""
    if not 0 <= factor <= 1:
        raise ValueError(f"guidance rescale {factor} must be between 0 (off) and 1")


def check_interval(start: float, stop: float) -> None:
    """Raise ValueError for times of `in_interval` that are not 0 <= stop <= start <= 1."""
    if not 0 <= stop <= start <= 1:
        raise ValueError(f"guidance interval from t = {start} to {stop} must satisfy 1 >= start >= stop >= 0")


def for_all(context: Any, batch: int) -> Any:
    """Repeat a context of one image for the batch; None stays None."""
    return context.repeat(batch) if context is not None and context.batch_size == 1 else context


def copies(z_t: Tensor, t: Any, count: int) -> tuple[Tensor, Any]:
    """z_t [B, c, h, w] and t (one, or [B]) repeated `count` times, for a batch with different contexts."""
    return torch.cat([z_t] * count), torch.cat([t] * count) if isinstance(t, Tensor) and t.dim() else t
