"""Singlestep samplers, which call the network again in the middle of each step: second order without a memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from ldm.samplers.steps import Denoise, Generators, Step, ddim_step, line_step, middle, noise_in, step_points
from ldm.schedules.noise_schedule import Schedule


def dpm2(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """DPM-Solver-2: one slope for a step, that of its middle in log(sigma / alpha) (Lu et al. 2022a).

    Algorithm 1 with r = 1/2, with steps along straight lines as in Karras et al. 2022. Steps from or to an infinite
    logarithm are Euler's.
    """
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        line = z_0, noise_in(z, z_0, t)
        if math.isfinite(s.log_snr_half - t.log_snr_half):
            m = middle(t, s, schedule)
            ahead = line_step(z, [line], t, m)
            z_0 = denoise(ahead, m.time)
            line = z_0, noise_in(ahead, z_0, m)
        z = line_step(z, [line], t, s)
        yield Step(index, s.time, z, z_0)


def dpmpp_2s(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """DPM-Solver++(2S): one estimate for a step, that of its middle in log(alpha / sigma) (Lu et al. 2022b).

    Algorithm 1 with r = 1/2. Steps from or to an infinite logarithm are of first order. DPMSolverSinglestepScheduler of
    diffusers counts network calls as steps: its middles are every other of its times, wherever they lie.
    """
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        if math.isfinite(s.log_snr_half - t.log_snr_half):
            m = middle(t, s, schedule)
            z_0 = denoise(ddim_step(z, z_0, t, m), m.time)
        z = ddim_step(z, z_0, t, s)
        yield Step(index, s.time, z, z_0)
