"""Heun's second-order rule with churn (Karras et al. 2022, algorithms 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.samplers.steps import (
    Denoise,
    Generators,
    Point,
    Step,
    line_step,
    noise_in,
    noised,
    step_points,
)
from ldm.schedules.noise_schedule import Schedule

LARGEST_GAMMA = math.sqrt(2) - 1  # at most doubles the variance of the noise (Karras et al. 2022, algorithm 2)


def heun(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    noise_scale: float = 1.0,
) -> Iterator[Step]:
    """Heun's rule, the mean of the slopes at both ends of a step (Karras et al. 2022, algorithms 1 and 2).

    A step that ends at t = 0, where the slope is undefined, is Euler's.

    Args:
        churn: 0 is deterministic; above 0, each step first adds noise, which multiplies sigma / alpha by 1 + churn / S,
            by 1.41 at most and never beyond the last noise level (S_churn; good values depend on the model).
        churn_range: smallest and largest sigma / alpha at which noise is added (S_tmin, S_tmax).
        noise_scale: factor of the standard deviation of that noise (S_noise); the paper uses 1.003 for networks that
            remove too much noise.

    Raises:
        ValueError: churn is negative.
    """
    if not churn >= 0:
        raise ValueError(f"churn {churn} must be at least 0 (deterministic); 40 is usual")
    for index, (t, s) in enumerate(step_points(times, schedule)):
        if churn and t.alpha and churn_range[0] <= t.sigma / t.alpha <= churn_range[1]:
            higher = _raised(t, s, min(churn / (len(times) - 1), LARGEST_GAMMA), schedule)
            z, t = noised(z, t, higher, generators, noise_scale), higher
        z, z_0 = heun_step(denoise, z, t, s)
        yield Step(index, s.time, z, z_0)


def heun_step(denoise: Denoise, z: Tensor, t: Point, s: Point) -> tuple[Tensor, Tensor]:
    """z_s from z_t by Heun's rule, or by Euler's if s is at t = 0; and the estimate of z_0 at t."""
    z_0 = denoise(z, t.time)
    lines = [(z_0, noise_in(z, z_0, t))]
    if s.sigma:
        ahead = line_step(z, lines, t, s)
        z_0_ahead = denoise(ahead, s.time)
        lines.append((z_0_ahead, noise_in(ahead, z_0_ahead, s)))
    return line_step(z, lines, t, s), z_0


def _raised(t: Point, s: Point, gamma: float, schedule: Schedule) -> Point:
    """The point where sigma / alpha is 1 + gamma times that of t, or t = 1."""
    time = schedule.time(t.sigma / t.alpha * (1 + gamma)).item()
    return step_points(torch.tensor([max(time, t.time), s.time], dtype=torch.float64), schedule)[0][0]
