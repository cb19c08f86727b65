"""Other ways to make one estimate of two than extrapolation: APG, CFG-Zero*, and the scale that makes DDIM CFG++.

Each is handed to `classifier_free`, or to any other guidance by two estimates. Sadat et al. 2024 (arXiv:2410.02416),
Fan et al. 2025 (arXiv:2503.18886), Chung et al. 2024 (arXiv:2406.08070).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.guidance.base import Combine, Denoise
from ldm.schedules.base import Schedule


def apg(momentum: float = -0.5, norm: float | None = None, parallel: float = 0.0) -> Combine:
    """Adaptive projected guidance: without what only raises contrast and saturation (Sadat et al. 2024, algorithm 1).

    It remembers the calls before, for the momentum: make one for each run of a sampler.

    Args:
        momentum: the share of the differences before that is added to each difference of the two estimates; below 0,
            which takes them back, keeps the walk from running on in one direction.
        norm: what the length of an image's difference is cut to (the paper: 2.5 to 15, by model); None: it is not.
        parallel: the share that is kept of the part of the difference along the conditional estimate.

    Raises:
        ValueError: momentum outside (-1, 1), or norm not above 0, or parallel not a finite number.
    """
    if not -1 < momentum < 1:
        raise ValueError(f"guidance momentum {momentum} must be between -1 and 1; -0.5 is usual, 0 is none")
    if norm is not None and not 0 < norm < math.inf:
        raise ValueError(f"guidance norm {norm} must be a positive number; leave it out to cut nothing")
    if not math.isfinite(parallel):
        raise ValueError(f"guidance parallel {parallel} must be a finite number; 0 is usual, 1 projects nothing away")
    before: Tensor | float = 0.0

    def combine(conditional: Tensor, unconditional: Tensor, guidance_scale: float, z_t: Tensor, t: Any) -> Tensor:
        nonlocal before
        before = difference = conditional - unconditional + momentum * before
        if norm is not None:
            difference = difference * (norm / _dot(difference, difference).sqrt()).clamp(max=1)
        line_step = _share(difference, conditional) * conditional
        return conditional + (guidance_scale - 1) * (difference - (1 - parallel) * line_step)

    return combine


def zero_star(coefficients: Callable[[Any], tuple[Tensor, Tensor]]) -> Combine:
    """CFG-Zero*: scale each image's unconditional output to fit the conditional one best (Fan et al. 2025, eq. 6-8).

    It is the output of the network that is scaled; the paper's is the velocity of a flow.

    Args:
        coefficients: the numbers of a time with z_0 = first * z_t + second * output, as `Denoiser.coefficients`.
    """

    def combine(conditional: Tensor, unconditional: Tensor, guidance_scale: float, z_t: Tensor, t: Any) -> Tensor:
        first, second = (number.to(z_t).reshape(-1, *[1] * (z_t.dim() - 1)) for number in coefficients(t))
        told, untold = ((z_0 - first * z_t) / second for z_0 in (conditional, unconditional))
        fitted = _share(told, untold) * untold
        return first * z_t + second * (fitted + guidance_scale * (told - fitted))

    return combine


def zero_output(coefficients: Callable[[Any], tuple[Tensor, Tensor]]) -> Denoise:
    """The estimate of a network that says 0, which costs nothing (Fan et al. 2025, section 4.2: zero-init).

    For the first steps, `in_interval` outside of which this is: there a flow is better left standing than guided by an
    estimate that is off. For noise prediction it means that z_t holds no noise, for clean prediction that there is
    nothing in it, and does harm.
    """
    return lambda z_t, t: coefficients(t)[0].to(z_t).reshape(-1, *[1] * (z_t.dim() - 1)) * z_t


def cfg_plus_plus(share: float, times: Tensor, schedule: Schedule) -> Callable[[Any], float]:
    """The guidance scale at each time with which `ddim` is CFG++ (Chung et al. 2024, algorithm 1).

    CFG++ steps from t to s with the guided z_0 and the unconditional noise: what guidance adds to z_0 comes into z_s
    alpha_s times. DDIM's noise, (z_t - alpha_t z_0) / sigma_t, is guided too, so there it comes into z_s only
    alpha_s - sigma_s alpha_t / sigma_t times. Both are equal at the scale share / (1 - sigma_s alpha_t / (alpha_s
    sigma_t)). It grows with the number of steps; in the last one, to clean data, it is the share. A step that goes
    nowhere has the share, too. Samplers that ask between the times of the walk get the scale of the step they are in.

    Args:
        share: the paper's lambda, in [0, 1]; 0 is unconditional, 1 has the conditional z_0.
        times: of the walk, falling [S + 1].
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
    """The scalar product of each image [B, ...] with another: [B, 1, ...]."""
    return (a * b).sum(tuple(range(1, a.dim())), keepdim=True)


def _share(a: Tensor, b: Tensor) -> Tensor:
    """The number per image [B, 1, ...] by which b comes closest to a; 0 where b is 0."""
    return _dot(a, b) / _dot(b, b).clamp(min=torch.finfo(b.dtype).tiny)
