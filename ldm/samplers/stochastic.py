"""Samplers that solve the reverse stochastic differential equation to higher order, and those that renew the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.samplers.interpolation import MIDDLE, mean_between, moments, usable
from ldm.samplers.onestep import heun_step
from ldm.samplers.spacing import KARRAS_RHO
from ldm.samplers.steps import (
    Denoise,
    Generators,
    Point,
    Step,
    drawn,
    fresh_share,
    middle,
    noise_like,
    noised,
    step_points,
)
from ldm.schedules.base import Schedule


def dpmpp_sde(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """SDE-DPM-Solver++(2S): each step uses z_0 as estimated in its middle (Lu et al. 2022b; Katherine Crowson's code).

    The middle, in log(alpha / sigma), is reached by a step of `ddpm`; that half is then taken again, with the same
    noise, as if z_0 had been that of the middle all the time. Steps from or to an infinite logarithm are `ddpm`'s.
    """
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = clean = denoise(z, t.time)
        if math.isfinite(s.log_snr_half - t.log_snr_half):
            m = middle(t, s, schedule)
            z = drawn(z, z_0, t, m, generators)
            clean = denoise(z, m.time)
            z = z + m.alpha * fresh_share(t, m) * (clean - z_0)
            t = m
        z = drawn(z, clean, t, s, generators)
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

    The variance of samples stays of second order, with a smaller error: an estimate knows nothing of the noise that its
    own step draws. In fewer than 15 steps the last ones are of lower order. The parabola is weighed exactly, where
    k-diffusion counts its curvature half and diffusers has a sign wrong.
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
    """`heun`, but at low noise back up with fresh noise and down again, which forgets errors (Xu et al. 2023, alg. 1).

    Once, where sigma / alpha first gets to `low`, or at the last step's begin if it never does. Each restart walks down
    in half as many steps as the whole walk has, spaced as in Karras et al. 2022; they belong to the step before it.

    Args:
        restarts: how often (K of the paper).
        low, high: sigma / alpha at the ends of the restarted interval; the paper searches several per model.

    Raises:
        ValueError: restarts is negative, or low is not below high.
    """
    if restarts < 0 or not 0 < low < high < math.inf:
        raise ValueError(f"restarts {restarts} must be at least 0, and their interval {low} to {high} positive, rising")
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
    """Multistep consistency sampling: estimate z_0, noise it to s with fresh noise (Luo et al. 2023, algorithm 3).

    Exact at any number of steps where the denoiser is a consistency function, which leads from z_t along the
    probability flow to z_0, as distilled models do; of the mean of z_0, what others say, it makes blurred pictures. The
    scalings c_skip and c_out (eq. 9) are part of that function, so of the denoiser; for the authors' models they differ
    from 0 and 1 by less than 1e-5 at the times that are walked.
    """
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        z = s.alpha * z_0 + s.sigma * noise_like(z, generators) if s.sigma else z_0
        yield Step(index, s.time, z, z_0)


def _multistep(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, order: int
) -> Iterator[Step]:
    """`ddpm` with z_0 the mean of a polynomial; as a step goes from x = 0 to 1, z_0 at x weighs e^(2 growth x)."""
    steps = step_points(times, schedule)
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and z_0, newest first
    for index, (t, s) in enumerate(steps):
        z_0 = denoise(z, t.time)
        past = [(t.log_snr_half, z_0), *past]
        used = usable(past, index, len(steps))
        means = moments(2 * (s.log_snr_half - t.log_snr_half), 3) if used == 3 else MIDDLE
        z = drawn(z, mean_between(past[:used], t.log_snr_half, s.log_snr_half, means), t, s, generators)
        past = past[: order - 1]
        yield Step(index, s.time, z, z_0)


def _down(high: float, s: Point, steps: int, schedule: Schedule) -> list[tuple[Point, Point]]:
    """Steps from where sigma / alpha is `high`, or from t = 1, down to s; none if s is not below."""
    alpha, sigma = (level.item() for level in schedule(1.0))
    top, end = min(high, sigma / alpha if alpha else high) ** (1 / KARRAS_RHO), (s.sigma / s.alpha) ** (1 / KARRAS_RHO)
    if top <= end:
        return []
    ratios = (top + torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (end - top)).pow(KARRAS_RHO)
    times = schedule.time(ratios).clamp(min=s.time)
    times[-1] = s.time
    return step_points(times, schedule)
