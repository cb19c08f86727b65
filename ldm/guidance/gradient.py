"""Guidance by the gradient of a score: of a classifier, of CLIP, of anything differentiable that rates latents.

Dhariwal & Nichol 2021 (arXiv:2105.05233, section 4), Nichol et al. 2021 (GLIDE, section 2.3), Bansal et al. 2023
(universal guidance). By Tweedie's formula alpha E[z_0 | z_t] = z_t + sigma^2 grad log p(z_t), and Bayes' rule,
conditioning on y as well moves the estimate by sigma^2 / alpha grad log p(y | z_t).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.denoising.prediction import per_image
from ldm.guidance.classifier_free import Denoise
from ldm.schedules.noise_schedule import Schedule

Score = Callable[[Tensor, Any], Tensor]  # (latents [B, c, h, w], t) -> [B], how well each image does; differentiable


def by_gradient(denoise: Denoise, score: Score, scale: float, schedule: Schedule) -> Denoise:
    """Guide by a score of noisy latents, made for noise: a classifier's log p(y | z_t, t), or CLIP's likewise.

    z_0 + scale sigma^2 / alpha grad score(z_t, t), one pass of the score and one backward beside the denoiser's. At
    scale 1 a classifier that knows p(y | z_t, t) makes an unconditional denoiser the conditional one.

    Args:
        denoise: (z_t, t) -> z_0, guided already or not.
        score: of z_t [B, c, h, w] at t, [B]; at scale 0 it is never called.
        scale: a finite number; below 0 guides away.
        schedule: gives alpha and sigma.

    Raises:
        ValueError: scale is not a finite number; when called, where alpha is 0 and z_t says nothing about y.
    """
    return _guided(denoise, score, scale, schedule, _of_noisy)


def by_estimate(denoise: Denoise, score: Score, scale: float, schedule: Schedule, through: bool = True) -> Denoise:
    """Guide by a score of clean latents, any that was made without noise in mind, applied to the estimate of z_0.

    With `through`, the gradient goes back through the denoiser to z_t, one backward pass of the network (Bansal et al.
    2023, eq. 5): that multiplies the score's gradient by the covariance of z_0 given z_t. Without, it stops at z_0,
    and that covariance is taken to be sigma^2 / (alpha^2 + sigma^2), as of data of unit variance (Song et al. 2023,
    Pseudoinverse-Guided Diffusion Models, section 3.3): less exact, and much cheaper.

    Args:
        denoise: (z_t, t) -> z_0; with `through` differentiable.
        score: of z_0 [B, c, h, w] at t, [B]; at scale 0 it is never called.
        scale: a finite number; below 0 guides away.
        schedule: gives alpha and sigma.
        through: whether to differentiate the denoiser. Freeze its parameters, or memory is kept for their gradients.

    Raises:
        ValueError: scale is not a finite number; when called, with `through`, where alpha is 0.
    """
    return _guided(denoise, score, scale, schedule, _of_clean_through if through else _of_clean)


def _guided(denoise: Denoise, score: Score, scale: float, schedule: Schedule, moved: Callable) -> Denoise:
    if not math.isfinite(scale):
        raise ValueError(f"guidance scale {scale} must be a finite number; 0 is no guidance by the gradient")
    if scale == 0:
        return denoise

    def guided(z_t: Tensor, t: Any) -> Tensor:
        z_0, shift = moved(denoise, score, z_t, t, *schedule(t, torch.float64))
        return z_0 + scale * shift

    return guided


def _of_noisy(denoise: Denoise, score: Score, z_t: Tensor, t: Any, alpha: Tensor, sigma: Tensor) -> tuple:
    share = per_image(sigma**2 / _signal(alpha, t), z_t)
    return denoise(z_t, t), share * _gradient(lambda z: (score(z, t), z), z_t)[0]


def _of_clean(denoise: Denoise, score: Score, z_t: Tensor, t: Any, alpha: Tensor, sigma: Tensor) -> tuple:
    z_0 = denoise(z_t, t)
    share = per_image(sigma**2 / (alpha**2 + sigma**2), z_t)
    return z_0, share * _gradient(lambda z: (score(z, t), z), z_0)[0]


def _of_clean_through(denoise: Denoise, score: Score, z_t: Tensor, t: Any, alpha: Tensor, sigma: Tensor) -> tuple:
    share = per_image(sigma**2 / _signal(alpha, t), z_t)

    def scored(z: Tensor) -> tuple[Tensor, Tensor]:
        z_0 = denoise(z, t)
        return score(z_0, t), z_0

    gradient, z_0 = _gradient(scored, z_t)
    return z_0, share * gradient


def _gradient(scored: Callable[[Tensor], tuple[Tensor, Tensor]], z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of a score with respect to z [B, ...], and what came with the score; also in inference mode."""
    with torch.inference_mode(False), torch.enable_grad():
        z = z.detach().clone().requires_grad_()  # a tensor made in inference mode can't have a gradient; its clone can
        value, other = scored(z)
        return torch.autograd.grad(value.sum(), z)[0], other.detach()


def _signal(alpha: Tensor, t: Any) -> Tensor:
    """alpha, where it is not 0."""
    if (alpha == 0).any():
        raise ValueError(
            f"guidance by the gradient of a score is undefined at t = {t}, where alpha is 0: noise alone says nothing; "
            "guide in_interval from a lower time"
        )
    return alpha
