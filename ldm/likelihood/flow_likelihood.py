"""Bits per dimension by the probability-flow ODE and its change of volume (Song et al. 2021, app. D.2).

The equation is solved for x = z_t / (alpha + sigma) over log u, u = sigma / (alpha + sigma): in these coordinates every
schedule is the same rectified flow, u is 1 where no signal is left (sigma / alpha infinite), and

    dx / d log u = x - z_0(z_t, t)

is never large, since close to the data the estimate of z_0 is close to x. The scale between x and z_t at both ends
changes the logarithm of the density by known amounts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.likelihood.variational_bound import HALF_BIN, check_eight_bit, discretized, prior_std
from ldm.samplers.runge_kutta import adaptive
from ldm.samplers.steps import Denoise, Generators, Point, noise_like, step_points
from ldm.schedules.noise_schedule import Schedule

LOG_2 = math.log(2)


def _rademacher(z: Tensor, generators: Generators) -> Tensor:
    return torch.where(noise_like(z, generators) < 0, -1.0, 1.0).to(z.dtype)


PROBES: dict[str, Callable[[Tensor, Generators], Tensor]] = {  # v like z with E[v v^T] = 1; Hutchinson 1989
    "rademacher": _rademacher,  # has the lower variance
    "gaussian": noise_like,
}


def ode_bits(
    denoise: Denoise,
    z_0: Tensor,
    schedule: Schedule,
    generators: Generators,
    probes: str = "rademacher",
    count: int = 1,
    tolerance: float = 1e-5,
    eight_bit: bool = False,
) -> Tensor:
    """-log2 p(z_0) in bits per dimension [B], where p is the density that the probability flow makes of the prior.

    More precisely, p is the density of data with noise of deviation sigma / alpha of the first noise level, where the
    flow ends, since networks are not trained closer to t = 0. It is evaluated at z_0 itself, so data with details below
    this noise appear up to log2(e) / 2 = 0.72 bits too probable. The prior, at t = 1, is that of the variational bound.
    The estimate is unbiased over probes, which are drawn once for the whole solution. The denoiser must be
    differentiable in z_t, smooth in t (use fractional timesteps), and not guided, since guidance changes the flow.

    Args:
        denoise: (z_t, t) -> z_0; its parameters need no gradient.
        z_0: data [B, ...]: unit-scale latents, or images in [-1, 1].
        schedule: gives alpha and sigma.
        generators: one per image, on the CPU.
        probes: a key of PROBES, for the estimate of the trace, or "exact": one per dimension.
        count: probes per image; each takes a backward pass of the network. Not used for exact.
        tolerance: of the solver, relative and absolute.
        eight_bit: z_0 has 8-bit values; uniform noise over their bins is added, and the result is an upper bound of the
            bits of the values (Theis et al. 2016), in the unit of the discretized decoder.

    Raises:
        ValueError: unknown probes, a count below 1, other numbers of generators and images, data without 8-bit
            values if eight_bit, or an error of the solver.
    """
    _check(z_0, generators, probes, count, eight_bit)
    with torch.inference_mode(False), torch.no_grad():
        z_0 = z_0.to(torch.promote_types(z_0.dtype, torch.float32), copy=True)
        if eight_bit:
            z_0 = z_0 + HALF_BIN * (2 * _uniform_like(z_0, generators) - 1)
        size = z_0[0].numel()
        vectors = _basis(z_0) if probes == "exact" else [PROBES[probes](z_0, generators) for _ in range(count)]
        levels = torch.tensor([1.0, 1 / schedule.config.timesteps], dtype=torch.float64)
        ((noise, data),) = step_points(levels, schedule)
        begin, end = (math.log(t.sigma / (t.alpha + t.sigma)) for t in (data, noise))
        stretch = data.alpha / (data.alpha + data.sigma)  # of z_0 into x

        def slope(log_u: float, state: Tensor) -> Tensor:
            velocity, divergence = _flow(denoise, state[:, :size].view_as(z_0), log_u, schedule, vectors)
            return torch.cat([velocity.flatten(1), divergence[:, None] / size], 1)

        state = torch.cat([stretch * z_0.flatten(1), z_0.new_zeros(len(z_0), 1)], 1)  # [B, size + 1]
        ((_, state),) = deque(adaptive(slope, state, begin, end, tolerance), maxlen=1)  # the last step
        log_density = state[:, size] + math.log(stretch) + _log_prior(state[:, :size], noise)
        return -log_density / LOG_2 - (math.log2(2 * HALF_BIN) if eight_bit else 0)


def ode_bound(
    denoise: Denoise, z_0: Tensor, schedule: Schedule, generators: Generators, count: int = 1, tolerance: float = 1e-5
) -> Tensor:
    """An upper bound on the bits per dimension [B] of 8-bit values: the flow with the variational bound's decoder.

    The density of the flow is evaluated at its end, z_0 + sigma / alpha noise of the first noise level, and the decoder
    of the variational bound adds the rest: -log p(z_0) <= E[log q(y | z_0) - log p(y) - log p(z_0 | y)], with y the
    noised z_0. It differs from `variational_bound` only in the cost of the steps above this level.

    If that level's noise is far below the 8-bit bins (sub_vp: 0.0001 of 0.008), both include the cost of the position
    of y in its bin; `ode_bits` with eight_bit does not.

    Args:
        denoise, schedule, generators, count, tolerance: as in `ode_bits`.
        z_0: images [B, ...] in [-1, 1] with 8-bit values.

    Raises:
        ValueError: as `ode_bits`.
    """
    _check(z_0, generators, "rademacher", count, True)
    t = 1 / schedule.config.timesteps
    alpha, sigma = (level.item() for level in schedule(t))
    noise = noise_like(z_0, generators)
    noised = z_0 + sigma / alpha * noise
    drawn = -noise.square() / 2 - math.log(2 * math.pi * (sigma / alpha) ** 2) / 2  # log q(y | z_0)
    density = ode_bits(denoise, noised, schedule, generators, count=count, tolerance=tolerance)
    with torch.no_grad():
        estimate = denoise(alpha * noised, t).to(noised.dtype)
    return density + (drawn - discretized(z_0, estimate, sigma)).flatten(1).mean(1) / LOG_2


def _flow(
    denoise: Denoise, x: Tensor, log_u: float, schedule: Schedule, vectors: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """dx / d log u, like x [B, ...], and its divergence [B] by the mean of v^T (d z_0 / d x) v over vectors."""
    u = math.exp(log_u)
    t = schedule.time(u / (1 - u) if u < 1 else math.inf).item()
    alpha, sigma = (level.item() for level in schedule(t))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        z_0 = denoise((alpha + sigma) * x, t).to(x.dtype)
        trace = 0.0
        for index, vector in enumerate(vectors, 1):
            (gradient,) = torch.autograd.grad(z_0, x, vector, retain_graph=index < len(vectors))
            trace = trace + (gradient * vector).flatten(1).sum(1)
    x, z_0 = x.detach(), z_0.detach()
    return x - z_0, x[0].numel() - trace / len(vectors)


def _log_prior(x: Tensor, t: Point) -> Tensor:
    """Mean over dimensions [B] of the log density of x [B, size] whose z_t is normal with deviation prior_std."""
    scale = (t.alpha + t.sigma) / prior_std(t)
    return math.log(scale) - math.log(2 * math.pi) / 2 - (scale * x).square().mean(1) / 2


def _basis(z: Tensor) -> list[Tensor]:
    """Vectors v like z [B, ...], one per dimension, for which the mean of v^T J v is exactly the trace of J."""
    size = z[0].numel()
    rows = math.sqrt(size) * torch.eye(size, dtype=z.dtype, device=z.device)
    return [row.view_as(z[0]).expand_as(z) for row in rows]


def _uniform_like(z: Tensor, generators: Generators) -> Tensor:
    """Uniform on [0, 1) like z [B, ...]; each image draws float32 numbers from its own CPU generator."""
    drawn = torch.stack([torch.rand(z.shape[1:], generator=generator) for generator in generators])
    return drawn.to(z.device, z.dtype)


def _check(z_0: Tensor, generators: Generators, probes: str, count: int, eight_bit: bool) -> None:
    if probes not in PROBES and probes != "exact":
        raise ValueError(f"unknown probes {probes!r}; use one of {', '.join(PROBES)}, exact")
    if count < 1:
        raise ValueError(f"count of probes {count} must be at least 1")
    if len(z_0) != len(generators):
        raise ValueError(f"{len(z_0)} images need as many generators, not {len(generators)}")
    if eight_bit:
        check_eight_bit(z_0)
