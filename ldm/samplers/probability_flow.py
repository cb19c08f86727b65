"""The probability-flow ODE, solved to a tolerance, and its inversion (Song et al. 2021, section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.samplers.runge_kutta import adaptive
from ldm.samplers.steps import Denoise, Generators, Step, ddim_step, noise_in, step_points
from ldm.schedules.noise_schedule import Schedule


def ode(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    tolerance: float = 1e-5,
) -> Iterator[Step]:
    """Solve the probability-flow ODE with adaptive steps that keep a tolerance (Song et al. 2021, section 4.3).

    It runs from the first time to the first noise level, whose estimate is the result if the times end at t = 0. The
    variables are y = z_t / (alpha + sigma) with slope noise - z_0, and x = sigma / (alpha + sigma), which on every
    schedule are finite and without the kinks of a table of noise levels. The images of a batch share their steps, so
    each depends on the others, by less than the tolerance.

    Args:
        tolerance: relative and absolute, of each step (the paper: 1e-5).

    Raises:
        ValueError: the tolerance is not a positive number, or is too small for the dtype of z.
    """
    steps = step_points(times, schedule)
    first, (t, end) = steps[0][0], steps[-1]
    lowest = 1 / schedule.config.timesteps
    if not end.sigma and t.time > lowest:  # whatever the number of steps
        t = step_points(torch.tensor([lowest, end.time], dtype=torch.float64), schedule)[0][0]
    last = end if end.sigma else t
    start, stop = (point.sigma / (point.alpha + point.sigma) for point in (first, last))
    index, z_0 = -1, None

    def at(x: float) -> tuple[float, float]:
        """The time, and alpha + sigma then."""
        time = first.time if x == start else last.time if x == stop else schedule.time(x / (1 - x)).item()
        return time, sum(level.item() for level in schedule(time))

    def slope(x: float, y: Tensor) -> Tensor:
        nonlocal z_0  # of the last call, which is that at the end of a step
        time, scale = at(x)
        z_0 = denoise(y * scale, time)
        return (y - z_0) / x

    for index, (x, y) in enumerate(adaptive(slope, z / at(start)[1], start, stop, tolerance)):
        time, scale = at(x)
        z = y * scale
        yield Step(index, time, z, z_0)
    if z_0 is None or not end.sigma:
        z_0 = denoise(z, last.time) if z_0 is None else z_0
        yield Step(index + 1, end.time, ddim_step(z, z_0, last, end), z_0)


def invert(denoise: Denoise, z_0: Tensor, times: Tensor, schedule: Schedule) -> Iterator[Step]:
    """DDIM inversion: from z_0 to the z_t from which `ddim` would return to it (Mokady et al. 2023, section 3.1).

    Each step keeps the estimate and the noise at its beginning, as steps of `ddim` do, so inversion and sampling are
    the identity up to their errors of first order (Song et al. 2020, section 4.3). At t = 0 there is no noise to
    estimate: a first step from there estimates at its end instead.

    Args:
        denoise: (z_t, t) -> z_0, conditioned on what z_0 shows; best without guidance.
        z_0: clean latents [B, c, h, w], or noisy latents if the times end at a noise level.
        times: as of a sampler, falling; the steps are taken in reverse order.

    Yields:
        Steps whose t rises to the first of the times, and whose z_0 is the estimate that they used.
    """
    z = z_0
    for index, (t, s) in enumerate(reversed(step_points(times, schedule))):
        kept = t.alpha / s.alpha
        source, point = (z, s) if s.sigma else (kept * z, t)
        estimate = denoise(source, point.time)
        z = kept * z + (t.sigma - kept * s.sigma) * noise_in(source, estimate, point)
        yield Step(index, t.time, z, estimate)
