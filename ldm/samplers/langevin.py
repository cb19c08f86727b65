"""Langevin samplers, z + step/2 score + sqrt(step) noise, from noise level to noise level."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.samplers.steps import NO_SIGNAL, Denoise, Generators, Point, Step, noise_like, step_points
from ldm.schedules.noise_schedule import Schedule


def langevin(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    corrections: int = 5,
    step_size: float = 0.2,
) -> Iterator[Step]:
    """Annealed Langevin dynamics: several noisy steps along the score at each noise level (Song & Ermon 2019, alg. 1).

    Between levels z / alpha is kept, or z if alpha is almost 0. The first level has no steps, since z has its
    distribution already. At t = 0 z is the last z_0 (Jolicoeur-Martineau et al. 2020, section 3.1). Steps of finite
    size add step_size / (4 - step_size) of the level's variance.

    Args:
        corrections: steps per noise level; the paper takes 100 at 10 levels, Song & Ermon 2020 5 at hundreds.
        step_size: of a step, in units of the noise's variance (epsilon / sigma_L^2; the paper takes 2e-5 / 0.01^2).

    Raises:
        ValueError: corrections below 1, or the step size not between 0 and 4, where steps overshoot.
    """
    if corrections < 1:
        raise ValueError(f"corrections {corrections} must be at least 1; 5 is usual")
    if not 0 < step_size < 4:
        raise ValueError(f"step size {step_size} must be above 0 and below 4; 0.2 is usual")
    for index, (t, s) in enumerate(step_points(times, schedule)):
        if s.sigma:
            z = s.alpha / t.alpha * z if t.alpha > NO_SIGNAL else z
        else:
            z = z_0 = denoise(z, t.time)
        for _ in range(corrections if s.sigma else 0):
            z_0 = denoise(z, s.time)
            z = z + step_size / 2 * (s.alpha * z_0 - z) + math.sqrt(step_size) * s.sigma * noise_like(z, generators)
        yield Step(index, s.time, z, z_0)


def predictor_corrector(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    corrections: int = 1,
    snr: float = 0.16,
) -> Iterator[Step]:
    """Steps of the reverse diffusion, each followed by Langevin steps as corrections (Song et al. 2021, alg. 2 and 3).

    The length of a correction makes its mean `snr` times the norm of its noise, for each image by itself (algorithms 4
    and 5, without their factor of 0.98 to 1 for variance-preserving schedules). It multiplies the variance of a
    Gaussian by 1 + snr^2. At t = 0 z is the last z_0. If no signal is left at t = 1, the first step doubles the
    variance (eq. 46 of the paper), which later steps reduce.

    Args:
        corrections: Langevin steps at each noise level; 0 is the predictor alone.
        snr: signal-to-noise ratio r of a correction; the paper takes 0.16.

    Raises:
        ValueError: corrections is negative, or snr not between 0 and 1, where corrections overshoot.
    """
    if corrections < 0:
        raise ValueError(f"corrections {corrections} must be at least 0; 1 is usual")
    if not 0 < snr < 1:
        raise ValueError(f"snr {snr} must be above 0 and below 1; 0.16 is usual")
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        z = _reversed(z, _score(z, z_0, t), t, s, generators) if s.sigma else z_0
        for _ in range(corrections if s.sigma else 0):
            score, noise = _score(z, denoise(z, s.time), s), noise_like(z, generators)
            length = 2 * (snr * _size(noise) / _size(score)).square()  # [B, 1, 1, 1]
            z = z + length * score + (2 * length).sqrt() * noise
        yield Step(index, s.time, z, z_0)


def _reversed(z: Tensor, score: Tensor, t: Point, s: Point, generators: Generators) -> Tensor:
    """z_s from z_t by the reverse of the step z_t = kept z_s + noise of variance `added` (Song et al. 2021, eq. 46)."""
    kept = t.alpha / s.alpha
    added = max(t.sigma**2 - (kept * s.sigma) ** 2, 0.0)  # a last bit below 0 where s is t
    return (2 - kept) * z + added * score + math.sqrt(added) * noise_like(z, generators)


def _score(z: Tensor, z_0: Tensor, t: Point) -> Tensor:
    """The gradient of the logarithm of z_t's density."""
    return (t.alpha * z_0 - z) / t.sigma**2


def _size(z: Tensor) -> Tensor:
    """The norm of each image, [B, 1, 1, 1] for z [B, c, h, w]."""
    return torch.linalg.vector_norm(z, dim=tuple(range(1, z.dim())), keepdim=True)
