"""Combinations of two estimates other than extrapolation: APG, CFG-Zero*, and the scale with which DDIM is CFG++.

They are arguments of `classifier_free` and of every other guidance by two estimates. Sadat et al. 2024
(arXiv:2410.02416), Fan et al. 2025 (arXiv:2503.18886), Chung et al. 2024 (arXiv:2406.08070).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.guidance.classifier_free import Combine, Denoise
from ldm.schedules.noise_schedule import Schedule


def apg(momentum: float = -0.5, norm: float | None = None, parallel: float = 0.0) -> Combine:
    """Adaptive projected guidance, which adds no contrast and saturation (Sadat et al. 2024, algorithm 1).

    Its momentum depends on earlier calls: create one for each run of a sampler.

    Args:
        momentum: share of the earlier differences that is added to each difference of the two estimates; a negative
            momentum subtracts them, which keeps the steps from continuing in one direction.
        norm: largest norm of an image's difference (the paper: 2.5 to 15, depending on the model); None: no limit.
        parallel: share of the difference's component along the conditional estimate that is kept.

    Raises:
        ValueError: momentum outside (-1, 1), or norm not above 0, or parallel not a finite number.
    """
    check_apg(momentum, norm, parallel)
    earlier: Tensor | float = 0.0

    def combine(conditional: Tensor, unconditional: Tensor, guidance_scale: float, z_t: Tensor, t: Any) -> Tensor:
        nonlocal earlier
        earlier = difference = conditional - unconditional + momentum * earlier
        if norm is not None:
            difference = difference * (norm / _dot(difference, difference).sqrt()).clamp(max=1)
        along = _share(difference, conditional) * conditional
        return conditional + (guidance_scale - 1) * (difference - (1 - parallel) * along)

    return combine


def check_apg(momentum: float = -0.5, norm: float | None = None, parallel: float = 0.0) -> None:
    """Raise ValueError for arguments that `apg` does not support."""
    if not -1 < momentum < 1:
        raise ValueError(f"guidance momentum {momentum} must be between -1 and 1; -0.5 is usual, 0 is none")
    if norm is not None and not 0 < norm < math.inf:
        raise ValueError(f"guidance norm {norm} must be a positive number; leave it out for no limit")
    if not math.isfinite(parallel):
        raise ValueError(f"guidance parallel {parallel} must be a finite number; 0 is usual, 1 keeps it all")


def zero_star(coefficients: Callable[[Any], tuple[Tensor, Tensor]]) -> Combine:
    """CFG-Zero*: scale each image's unconditional output to best fit the conditional one (Fan et al. 2025, eq. 6-8).

    The network's output is scaled, which in the paper is the velocity of a flow.

    Args:
        coefficients: t -> (first, second) with z_0 = first * z_t + second * output, as `Denoiser.coefficients`.
    """

    def combine(conditional: Tensor, unconditional: Tensor, guidance_scale: float, z_t: Tensor, t: Any) -> Tensor:
        first, second = (number.to(z_t).reshape(-1, *[1] * (z_t.dim() - 1)) for number in coefficients(t))
        output, null_output = ((z_0 - first * z_t) / second for z_0 in (conditional, unconditional))
        fitted = _share(output, null_output) * null_output
        return first * z_t + second * (fitted + guidance_scale * (output - fitted))

    return combine


def zero_output(coefficients: Callable[[Any], tuple[Tensor, Tensor]]) -> Denoise:
    """The estimate for a network output of 0, without calling the network (Fan et al. 2025, section 4.2: zero-init).

    It is used outside `in_interval` for the first steps, where the guided velocity of a flow is inaccurate and not
    moving is better. Do not use it for noise or clean prediction, where 0 means no noise or no data.
    """
    return lambda z_t, t: coefficients(t)[0].to(z_t).reshape(-1, *[1] * (z_t.dim() - 1)) * z_t


def cfg_plus_plus(share: float, times: Tensor, schedule: Schedule) -> Callable[[Any], float]:
    """The guidance scale at each time with which `ddim` is CFG++ (Chung et al. 2024, algorithm 1).

    CFG++ steps from t to s with the guided z_0 and the unconditional noise, so that z_s contains alpha_s times what
    guidance adds to z_0. DDIM's noise, (z_t - alpha_t z_0) / sigma_t, is guided too, so that its z_s contains
    alpha_s - sigma_s alpha_t / sigma_t times as much. Both are equal at the scale
    share / (1 - sigma_s alpha_t / (alpha_s sigma_t)), which grows with the number of steps. It is the share itself in
    the last step, to clean data, and in a step of length 0. Between the sampling times it is the scale of the current
    step.

    Args:
        share: the paper's lambda, in [0, 1]; 0 is unconditional, 1 has the conditional z_0.
        times: of the steps, falling [S + 1].
        schedule: gives alpha and sigma.

    Raises:
        ValueError: share is not a finite number.
    """
    if not math.isfinite(share):
        raise ValueError(f"guidance scale {share} must be a finite number; cfg_plus_plus takes 0 to 1")
    alpha, sigma = schedule(times.to("cpu", torch.float64))
    moved = 1 - sigma[1:] * alpha[:-1] / (alpha[1:] * sigma[:-1])  # [S]
    scales = torch.where(moved > 0, share / moved, share).tolist()
    ends = times[1:].tolist()
    return lambda t: next((scale for scale, end in zip(scales, ends, strict=True) if float(t) > end), scales[-1])


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product [B, 1, ...] of each image of a with that of b, [B, ...] both."""
    return (a * b).sum(tuple(range(1, a.dim())), keepdim=True)


def _share(a: Tensor, b: Tensor) -> Tensor:
    """The factor [B, 1, ...] per image that brings b closest to a; 0 where b is 0."""
    return _dot(a, b) / _dot(b, b).clamp(min=torch.finfo(b.dtype).tiny)
