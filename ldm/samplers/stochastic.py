"""Stochastic samplers: solvers of the reverse stochastic differential equation, and samplers that add fresh noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.samplers.heun import heun_step
from ldm.samplers.interpolation import MIDDLE, mean_between, moments, usable
from ldm.samplers.spacing import KARRAS_RHO
from ldm.samplers.steps import (
    Denoise,
    Generators,
    Point,
    Step,
    fresh_share,
    middle,
    noise_like,
    noised,
    posterior_sample,
    step_points,
)
from ldm.schedules.noise_schedule import Schedule


def dpmpp_sde(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """SDE-DPM-Solver++(2S): each step uses the estimate in its middle (Lu et al. 2022b; Katherine Crowson's code).

    A step of `ddpm` goes to the middle in log(alpha / sigma). This half is then repeated with the same noise and the
    estimate of the middle. Steps from or to an infinite logarithm are `ddpm`'s.
    """
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = clean = denoise(z, t.time)
        if math.isfinite(s.log_snr_half - t.log_snr_half):
            m = middle(t, s, schedule)
            z = posterior_sample(z, z_0, t, m, generators)
            clean = denoise(z, m.time)
            z = z + m.alpha * fresh_share(t, m) * (clean - z_0)
            t = m
        z = posterior_sample(z, clean, t, s, generators)
        yield Step(index, s.time, z, z_0)


def dpmpp_2m_sde(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators
) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M): `ddpm` with z_0 extrapolated from two steps (Lu et al. 2022b, section 5 and appendix D).

    Steps from or to an infinite logarithm of alpha / sigma are of first order.
    """
    yield from _multistep(denoise, z, times, schedule, generators, order=2)


def dpmpp_3m_sde(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators
) -> Iterator[Step]:
    """`dpmpp_2m_sde` with a parabola through three steps (Katherine Crowson's DPM-Solver++(3M) SDE).

    The variance of samples is still of second order, with a smaller error, because an estimate does not depend on the
    noise of its own step. In fewer than 15 steps the last ones are of lower order. The mean of the parabola is exact,
    where k-diffusion halves its curvature and diffusers has a wrong sign.
    """
    yield from _multistep(denoise, z, times, schedule, generators, order=3)


def restart(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    restarts: int = 1,
    low: float = 0.1,
    high: float = 2.0,
) -> Iterator[Step]:
    """`heun` that returns to higher noise once and samples again, which reduces errors (Xu et al. 2023, algorithm 1).

    Restarts happen where sigma / alpha first reaches `low`, or else at the beginning of the last step. Each restart
    takes half as many steps as the sampler, spaced as in Karras et al. 2022. They are part of the step before them.

    Args:
        restarts: number of restarts (K of the paper).
        low, high: sigma / alpha at the ends of the restarted interval; the paper searches for good values per model.

    Raises:
        ValueError: restarts is negative, or low is not below high.
    """
    if restarts < 0 or not 0 < low < high < math.inf:
        raise ValueError(f"restarts {restarts} must be at least 0, and 0 < low < high, not {low} and {high}")
    steps = step_points(times, schedule)
    reached = [index for index, (_, s) in enumerate(steps) if s.sigma and s.sigma <= low * s.alpha]
    bottom = reached[0] if reached else len(steps) - 2
    for index, (t, s) in enumerate(steps):
        z, z_0 = heun_step(denoise, z, t, s)
        if index == bottom:
            down = _down(high, s, max(1, len(steps) // 2), schedule)
            for _ in range(restarts if down else 0):
                z = noised(z, s, down[0][0], generators)
                for upper, lower in down:
                    z = heun_step(denoise, z, upper, lower)[0]
        yield Step(index, s.time, z, z_0)


def lcm(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Multistep consistency sampling: estimate z_0, add fresh noise up to s (Luo et al. 2023, algorithm 3).

    It is exact with any number of steps if the denoiser is a consistency function, which maps z_t to the end of its
    probability flow, as distilled models do. Other denoisers estimate the mean of z_0, which gives blurred images. The
    scalings c_skip and c_out (eq. 9) are part of the denoiser; for the authors' models they differ from 0 and 1 by less
    than 1e-5 at the sampling times.
    """
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        z = s.alpha * z_0 + s.sigma * noise_like(z, generators) if s.sigma else z_0
        yield Step(index, s.time, z, z_0)


def _multistep(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, order: int
) -> Iterator[Step]:
    """`ddpm` with z_0 the mean of a polynomial, weighted by e^(2 h x) along a step of length h, x from 0 to 1."""
    steps = step_points(times, schedule)
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and z_0, newest first
    for index, (t, s) in enumerate(steps):
        z_0 = denoise(z, t.time)
        past = [(t.log_snr_half, z_0), *past]
        used = usable(past, index, len(steps))
        means = moments(2 * (s.log_snr_half - t.log_snr_half), 3) if used == 3 else MIDDLE
        z = posterior_sample(z, mean_between(past[:used], t.log_snr_half, s.log_snr_half, means), t, s, generators)
        past = past[: order - 1]
        yield Step(index, s.time, z, z_0)


def _down(high: float, s: Point, steps: int, schedule: Schedule) -> list[tuple[Point, Point]]:
    """Steps from where sigma / alpha is `high`, or from t = 1, down to s; none if s is not lower."""
    alpha, sigma = (level.item() for level in schedule(1.0))
    top, end = min(high, sigma / alpha if alpha else high) ** (1 / KARRAS_RHO), (s.sigma / s.alpha) ** (1 / KARRAS_RHO)
    if top <= end:
        return []
    ratios = (top + torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (end - top)).pow(KARRAS_RHO)
    times = schedule.time(ratios).clamp(min=s.time)
    times[-1] = s.time
    return step_points(times, schedule)
