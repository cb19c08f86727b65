"""One-step samplers: each step depends on z_t alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from ldm.samplers.steps import (
    Denoise,
    Generators,
    Step,
    fresh_share,
    line_step,
    noise_in,
    noise_like,
    posterior_sample,
    step_points,
)
from ldm.schedules.noise_schedule import Schedule

# The exponent v of the variance of `ddpm`, small^(1 - v) large^v; None: the network outputs it.
VARIANCES: dict[str, float | None] = {"small": 0.0, "large": 1.0, "learned": None}


def ddim(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, eta: float = 0.0
) -> Iterator[Step]:
    """Keep z_0 and noise, change their amounts; a share eta of the noise is redrawn (Song et al. 2020, eq. 12 and 16).

    eta 0 is deterministic, eta 1 is `ddpm`. Each step ends where the next begins. DDIMScheduler and PNDMScheduler of
    diffusers end it at t - T // S instead, which differs for linspace and for step counts that do not divide T.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must be between 0 (deterministic) and 1 (ddpm)")
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        fresh = eta * math.sqrt(fresh_share(t, s))
        z = s.alpha * z_0 + s.sigma * math.sqrt(1 - fresh**2) * noise_in(z, z_0, t)
        if fresh and s.sigma:
            z = z + s.sigma * fresh * noise_like(z, generators)
        yield Step(index, s.time, z, z_0)


def ddpm(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    variance: str = "small",
    interpolation: Callable[[], Tensor] | None = None,
) -> Iterator[Step]:
    """Draw z_s around the mean of q(z_s | z_t, z_0), the posterior of the noising process (Ho et al. 2020, eq. 7).

    Args:
        variance: "small" is that of the posterior, exact if the data are one point; "large" is that of q(z_t | z_s),
            exact if the data are standard normal (Ho et al. 2020, section 3.2); "learned" interpolates their logarithms
            by the network's output (Nichol & Dhariwal 2021, eq. 15).
        interpolation: for "learned": returns v of the last network call, [B, ...], or [2 B, ...] with the conditional
            half first if guidance doubles the batch; 0 is small, 1 is large. See `LearnedVariance`.

    Raises:
        ValueError: an unknown variance, or learned without an interpolation.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; use one of {', '.join(VARIANCES)}")
    if variance == "learned" and interpolation is None:
        raise ValueError("variance 'learned' requires a network that outputs it; use small or large")
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        v = interpolation()[: len(z)].to(z) if variance == "learned" else VARIANCES[variance]
        z = posterior_sample(z, z_0, t, s, generators, (t.sigma / s.sigma) ** v if s.sigma else 1.0)
        yield Step(index, s.time, z, z_0)


def euler(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Euler's rule along straight lines, the same map as `ddim` (Karras et al. 2022, algorithm 1 without line 6)."""
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        z = line_step(z, [(z_0, noise_in(z, z_0, t))], t, s)
        yield Step(index, s.time, z, z_0)


def euler_ancestral(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators
) -> Iterator[Step]:
    """Euler to below s, then noise up to s: the map of `ddpm` (Song et al. 2020, eq. 16; Katherine Crowson's code)."""
    yield from ddim(denoise, z, times, schedule, generators, eta=1.0)
