"""Samplers: generators that walk times from noise to data, given nothing but denoise(z_t, t) -> z_0.

They walk times, not sigma / alpha, which is infinite where a rectified flow or a zero-terminal-SNR schedule begins.
The caller owns progress bars, previews and cancellation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.schedule import Schedule

Denoise = Callable[[Tensor, float], Tensor]
Generators = Sequence[torch.Generator]

# Below this alpha at t = 1 straight lines are drawn in rectified flow's coordinates, see `_Point.scale`.
NO_SIGNAL = 1e-3


@dataclass(frozen=True)
class Step:
    """What a sampler knows after a step."""

    index: int  # 0 for the first step
    t: float  # the time that has been reached; 0 after the last step
    z: Tensor  # [B, c, h, w], noisy latents at t; the result after the last step
    z_0: Tensor  # [B, c, h, w], the estimate of clean latents that made this step


def initial_noise(shape: Sequence[int], generators: Generators, schedule: Schedule, t: float = 1.0) -> Tensor:
    """Where sampling begins: normal z_t [B, c, h, w], float32 on the CPU, of variance alpha^2 + sigma^2.

    That is the variance of noised latents of unit scale, 1 unless variance explodes.

    Args:
        shape: (B, c, h, w).
        generators: one per image, on the CPU.
        schedule: gives alpha and sigma.
        t: the time at which sampling begins.

    Raises:
        ValueError: B is not the number of generators.
    """
    if shape[0] != len(generators):
        raise ValueError(f"{shape[0]} images need as many generators, not {len(generators)}")
    alpha, sigma = schedule(t)
    return _noise(torch.empty(*shape), generators) * math.hypot(alpha, sigma)


def ddim(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, eta: float = 0.0
) -> Iterator[Step]:
    """Keep z_0 and noise, change their amounts; eta of the noise is drawn anew (Song et al. 2020, eq. 12 and 16).

    eta 0 is the deterministic sampler of first order, eta 1 is `ddpm`.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} must be between 0 (deterministic) and 1 (ddpm)")
    for index, (t, s) in enumerate(_walk(times, schedule)):
        z_0 = denoise(z, t.time)
        fresh = eta * math.sqrt(_renewed(t, s))
        z = s.alpha * z_0 + s.sigma * math.sqrt(1 - fresh**2) * _noise_in(z, z_0, t)
        if fresh and s.sigma:
            z = z + s.sigma * fresh * _noise(z, generators)
        yield Step(index, s.time, z, z_0)


def ddpm(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Draw z_s from q(z_s | z_t, z_0), the posterior of the noising process (Ho et al. 2020, eq. 6 and 7)."""
    for index, (t, s) in enumerate(_walk(times, schedule)):
        z_0 = denoise(z, t.time)
        renewed = _renewed(t, s)
        z = t.alpha / s.alpha * (s.sigma / t.sigma) ** 2 * z + s.alpha * renewed * z_0
        if s.sigma:
            z = z + s.sigma * math.sqrt(renewed) * _noise(z, generators)
        yield Step(index, s.time, z, z_0)


def euler(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Euler's rule for the probability-flow ODE along straight lines (Karras et al. 2022, algorithm 1 without line 6).

    First order; does not draw. Straight lines make it the same map as `ddim` with eta 0.
    """
    for index, (t, s) in enumerate(_walk(times, schedule)):
        z_0 = denoise(z, t.time)
        z = _along(z, [(z_0, _noise_in(z, z_0, t))], t, s)
        yield Step(index, s.time, z, z_0)


def heun(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """Heun's rule, the mean of the slopes at both ends of a step (Karras et al. 2022, algorithm 1).

    Second order; does not draw; two network calls per step, one where a step ends at t = 0.
    """
    for index, (t, s) in enumerate(_walk(times, schedule)):
        z_0 = denoise(z, t.time)
        lines = [(z_0, _noise_in(z, z_0, t))]
        if s.sigma:
            ahead = _along(z, lines, t, s)
            z_0_ahead = denoise(ahead, s.time)
            lines.append((z_0_ahead, _noise_in(ahead, z_0_ahead, s)))
        z = _along(z, lines, t, s)
        yield Step(index, s.time, z, z_0)


def dpmpp_2m(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """DPM-Solver++(2M): z_0 extrapolated from two steps, in log(alpha / sigma) (Lu et al. 2022b, algorithm 2).

    Second order; does not draw; one network call per step. Steps from or to an infinite logarithm are of first order.
    """
    before, grown = None, math.inf  # z_0 of the step before, and how much log(alpha / sigma) grew in it
    for index, (t, s) in enumerate(_walk(times, schedule)):
        z_0 = denoise(z, t.time)
        growth = math.log(s.alpha / s.sigma * t.sigma / t.alpha) if t.alpha and s.sigma else math.inf
        ahead = z_0 if before is None or math.isinf(growth) else z_0 + growth / grown / 2 * (z_0 - before)
        z = s.sigma / t.sigma * z + (s.alpha - t.alpha * s.sigma / t.sigma) * ahead
        before, grown = z_0, growth
        yield Step(index, s.time, z, z_0)


SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddim": ddim,
    "ddpm": ddpm,
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
}


class _Point(NamedTuple):
    """A time and its noise level, as numbers, which leave the dtype and the device of latents alone.

    z_t / scale runs along a straight line for as long as z_0 and noise stay what they are. The scale is alpha, which
    makes sigma / alpha the time on that line (Karras et al. 2022); where next to no signal is left at t = 1 and
    sigma / alpha explodes, it is alpha + sigma, the scale in which every schedule is a rectified flow.
    """

    time: float
    alpha: float
    sigma: float
    scale: float


def _walk(times: Tensor, schedule: Schedule) -> list[tuple[_Point, _Point]]:
    """Where each step begins and ends.

    Raises:
        ValueError: the times do not fall.
    """
    if len(times) < 2 or not (times[1:] < times[:-1]).all():
        raise ValueError(f"times {times.tolist()} must be at least two, each below the one before it")
    alpha, sigma = schedule(times, torch.float64)
    scale = alpha if schedule(1.0)[0] > NO_SIGNAL else alpha + sigma
    points = [_Point(*values) for values in torch.stack([times.double(), alpha, sigma, scale], 1).tolist()]
    return list(zip(points[:-1], points[1:], strict=True))


def _renewed(t: _Point, s: _Point) -> float:
    """The share of the noise in z_s that q(z_s | z_t, z_0) draws anew: its variance is s.sigma^2 times this."""
    return 1 - (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2


def _noise_in(z: Tensor, z_0: Tensor, t: _Point) -> Tensor:
    return (z - t.alpha * z_0) / t.sigma


def _along(z: Tensor, lines: list[tuple[Tensor, Tensor]], t: _Point, s: _Point) -> Tensor:
    """z_s from z_t along the mean of the straight lines that pairs of z_0 and noise span."""
    signal, noise = s.alpha / s.scale - t.alpha / t.scale, s.sigma / s.scale - t.sigma / t.scale
    slope = sum(signal * z_0 + noise * noise_in for z_0, noise_in in lines) / len(lines)
    return s.scale * (z / t.scale + slope)


def _noise(z: Tensor, generators: Generators) -> Tensor:
    """Standard normal noise like z [B, ...]; each image draws float32 numbers from its own CPU generator."""
    drawn = torch.stack([torch.randn(z.shape[1:], generator=generator) for generator in generators])
    return drawn.to(z.device, z.dtype)
