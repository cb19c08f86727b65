"""What samplers share: the points at both ends of each step, and noise that is drawn per image."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.denoising.prediction import mix
from ldm.samplers.spacing import LARGEST_RATIO
from ldm.schedules.noise_schedule import Schedule

Denoise = Callable[[Tensor, float], Tensor]
Generators = Sequence[torch.Generator]

NO_SIGNAL = 1e-3  # if alpha at t = 1 is below this, straight lines are those of rectified flow: see `Point`


@dataclass(frozen=True)
class Step:
    """The state of a sampler after a step."""

    index: int  # 0 for the first step
    t: float  # the time that the step ends at
    z: Tensor  # [B, c, h, w], noisy latents at t; after the last step, the result
    z_0: Tensor  # [B, c, h, w], the estimate of clean latents that the step used


class NoiseLevel(NamedTuple):
    """alpha and sigma of z_t = alpha z_0 + sigma noise, as numbers or one per image [B]."""

    alpha: float | Tensor
    sigma: float | Tensor


class Point(NamedTuple):
    """A time and its noise level, as Python numbers, which do not affect the dtype and the device of latents.

    With constant z_0 and noise, z_t / scale moves along a straight line. The scale is alpha, so that sigma / alpha is
    the time on that line (Karras et al. 2022). If almost no signal is left at t = 1, where sigma / alpha explodes, it
    is alpha + sigma, with which every schedule is a rectified flow.
    """

    time: float
    alpha: float
    sigma: float
    scale: float
    log_snr_half: float  # log(alpha / sigma), the time of multistep solvers; infinite at t = 0, see `_log_snr_halves`


def signal_remains(schedule: Schedule) -> bool:
    """Whether z_t at t = 1 contains some of z_0, so that sigma / alpha is not too large to compute with."""
    return schedule(1.0)[0].item() > NO_SIGNAL


def step_points(times: Tensor, schedule: Schedule) -> list[tuple[Point, Point]]:
    """The points where each step begins and ends. The last step may have length 0, as diffusers ends some models.

    Raises:
        ValueError: the times do not fall.
    """
    falling = (times[1:-1] < times[:-2]).all() and (times[-1:] <= times[-2:-1]).all()
    if len(times) < 2 or not falling:
        raise ValueError(f"times {times.tolist()} must be at least two, each below the one before it")
    alpha, sigma = schedule(times, torch.float64)
    scale = alpha if signal_remains(schedule) else alpha + sigma
    columns = torch.stack([times.double(), alpha, sigma, scale, _log_snr_halves(alpha / sigma)], 1)
    points = [Point(*values) for values in columns.tolist()]
    return list(zip(points[:-1], points[1:], strict=True))


def middle(t: Point, s: Point, schedule: Schedule) -> Point:
    """The point halfway from t to s in log(alpha / sigma), which must be finite at both."""
    time = schedule.time(math.exp(-(t.log_snr_half + s.log_snr_half) / 2)).clamp(s.time, t.time).item()
    return step_points(torch.tensor([time, s.time], dtype=torch.float64), schedule)[0][0]


def _log_snr_halves(ratios: Tensor) -> Tensor:
    """log(alpha / sigma). At a first level without signal it is finite, if the next level is well below."""
    begins_in_noise = ratios[0] == 0 and ratios[1] * LARGEST_RATIO > 1
    return torch.cat([ratios[:1].clamp(min=1 / LARGEST_RATIO) if begins_in_noise else ratios[:1], ratios[1:]]).log()


def initial_noise(
    shape: Sequence[int], generators: Generators, schedule: Schedule, t: float = 1.0, noise_only: bool = False
) -> Tensor:
    """The noise that sampling begins with: normal z_t [B, c, h, w], float32 on the CPU, variance alpha^2 + sigma^2.

    This is the variance of noised latents of unit scale: 1, except on variance-exploding schedules.

    Args:
        shape: (B, c, h, w).
        generators: one per image, on the CPU.
        schedule: gives alpha and sigma.
        t: the time at which sampling begins.
        noise_only: use variance sigma^2 instead, as if no signal were left at t.

    Raises:
        ValueError: B is not the number of generators.
    """
    if shape[0] != len(generators):
        raise ValueError(f"{shape[0]} images need as many generators, not {len(generators)}")
    alpha, sigma = schedule(t)
    return noise_like(torch.empty(*shape), generators) * (sigma.item() if noise_only else math.hypot(alpha, sigma))


def noise_like(z: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise like z [B, ...]; each image draws float32 numbers from its own CPU generator."""
    values = torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators])
    return values.to(z.device, z.dtype)


def noise_in(z: Tensor, z_0: Tensor, t: Point) -> Tensor:
    """The noise in z_t, if its clean latents are z_0."""
    return (z - t.alpha * z_0) / t.sigma


def fresh_share(t: Point, s: Point) -> float:
    """The share of the noise in z_s that q(z_s | z_t, z_0) draws anew: its variance is s.sigma^2 times this."""
    return 1 - (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2


def ddim_step(z: Tensor, z_0: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """z_s from z_t [B, ...] with constant z_0 and noise (Song et al. 2020, eq. 12); levels are numbers or [B]."""
    kept = s.sigma / t.sigma
    return mix(z, z_0, kept, s.alpha - t.alpha * kept)


def posterior_sample(
    z: Tensor, z_0: Tensor, t: Point, s: Point, generators: Generators, noise_scale: float | Tensor = 1.0
) -> Tensor:
    """z_s drawn from q(z_s | z_t, z_0), the posterior of the noising process (Ho et al. 2020, eq. 6 and 7).

    Its noise is multiplied by `noise_scale`, a number or like z; there is no noise at t = 0.
    """
    share = max(fresh_share(t, s), 0.0)  # 0 if s is t
    z = t.alpha / s.alpha * (s.sigma / t.sigma) ** 2 * z + s.alpha * share * z_0
    return z + s.sigma * math.sqrt(share) * noise_scale * noise_like(z, generators) if s.sigma else z


def noised(z: Tensor, t: Point, u: Point, generators: Generators, noise_scale: float = 1.0) -> Tensor:
    """z_u drawn from q(z_u | z_t) at a noisier point u, the noising process, its noise times `noise_scale`."""
    kept = u.alpha / t.alpha
    added = math.sqrt(max(u.sigma**2 - (kept * t.sigma) ** 2, 0.0))
    return kept * z + noise_scale * added * noise_like(z, generators)


def line_step(z: Tensor, lines: list[tuple[Tensor, Tensor]], t: Point, s: Point) -> Tensor:
    """z_s from z_t along the mean of the straight lines through pairs of z_0 and noise."""
    signal, noise = s.alpha / s.scale - t.alpha / t.scale, s.sigma / s.scale - t.sigma / t.scale
    slope = sum(signal * z_0 + noise * noise_in for z_0, noise_in in lines) / len(lines)
    return s.scale * (z / t.scale + slope)
