"""Samplers that remember nothing: each step begins from z_t alone."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.schedule import Schedule
from ldm.walk import Denoise, Generators, Step, along, noise_in, noise_like, renewed, walk


def ddim(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, eta: float = 0.0
) -> Iterator[Step]:
    """Keep z_0 and noise, change their amounts; eta of the noise is drawn anew (Song et al. 2020, eq. 12 and 16).

    eta 0 is deterministic, eta 1 is `ddpm`. Each step ends where the next begins; DDIMScheduler and PNDMScheduler of
    diffusers end it at t - T // S, which for linspace and for step counts that do not divide T is somewhere else.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must be between 0 (deterministic) and 1 (ddpm)")
    for index, (t, s) in enumerate(walk(times, schedule)):
        z_0 = denoise(z, t.time)
        fresh = eta * math.sqrt(renewed(t, s))
        z = s.alpha * z_0 + s.sigma * math.sqrt(1 - fresh**2) * noise_in(z, z_0, t)
        if fresh and s.sigma:
            z = z + s.sigma * fresh * noise_like(z, generators)
        yield Step(index, s.time, z, z_0)


def ddpm(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Draw z_s from q(z_s | z_t, z_0), the posterior of the noising process (Ho et al. 2020, eq. 6 and 7)."""
    for index, (t, s) in enumerate(walk(times, schedule)):
        z_0 = denoise(z, t.time)
        share = renewed(t, s)
        z = t.alpha / s.alpha * (s.sigma / t.sigma) ** 2 * z + s.alpha * share * z_0
        if s.sigma:
            z = z + s.sigma * math.sqrt(share) * noise_like(z, generators)
        yield Step(index, s.time, z, z_0)


def euler(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Euler's rule along straight lines, the same map as `ddim` (Karras et al. 2022, algorithm 1 without line 6)."""
    for index, (t, s) in enumerate(walk(times, schedule)):
        z_0 = denoise(z, t.time)
        z = along(z, [(z_0, noise_in(z, z_0, t))], t, s)
        yield Step(index, s.time, z, z_0)


def euler_ancestral(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators
) -> Iterator[Step]:
    """Euler to below s, then noise up to s: the map of `ddpm` (Song et al. 2020, eq. 16; Katherine Crowson's code)."""
    yield from ddim(denoise, z, times, schedule, generators, eta=1.0)


def heun(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Heun's rule, the mean of the slopes at both ends of a step (Karras et al. 2022, algorithm 1).

    A step that ends at t = 0, where there is no slope, is Euler's.
    """
    for index, (t, s) in enumerate(walk(times, schedule)):
        z_0 = denoise(z, t.time)
        lines = [(z_0, noise_in(z, z_0, t))]
        if s.sigma:
            ahead = along(z, lines, t, s)
            z_0_ahead = denoise(ahead, s.time)
            lines.append((z_0_ahead, noise_in(ahead, z_0_ahead, s)))
        z = along(z, lines, t, s)
        yield Step(index, s.time, z, z_0)
