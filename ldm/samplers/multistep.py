"""Multistep samplers, which reuse the network outputs of earlier steps: higher order at one network call per step.

The first steps are of lower order. They are at high noise, where estimates hardly change.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.denoising.prediction import target, to_clean
from ldm.samplers.interpolation import MIDDLE, mean_between, moments, usable
from ldm.samplers.steps import Denoise, Generators, Point, Step, ddim_step, noise_in, signal_remains, step_points
from ldm.schedules.noise_schedule import Schedule

# Adams-Bashforth: weights of the newest output, the one before it, ..., for as many as there are (Liu et al. 2022,
# eq. 9 and 12, arXiv:2202.09778).
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def pndm(
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    averaged: str | None = None,
) -> Iterator[Step]:
    """PLMS: step along the Adams-Bashforth mean of up to four outputs (Liu et al. 2022, arXiv:2202.09778, section 3.3).

    The first step is repeated with the mean of the outputs at both its ends, which needs one more network call.

    Args:
        averaged: the prediction that is averaged, a key of PREDICTIONS; None: noise as in the paper, or flow on
            schedules that leave no signal. diffusers averages the network's output, which for velocity, a different
            mixture of z_0 and noise at each time, is a method of first order.
    """
    averaged = averaged or _slope(schedule)
    past: list[Tensor] = []
    steps = step_points(times, schedule)
    for index, (t, s) in enumerate(steps):
        z_0 = denoise(z, t.time)
        past = [_output(z, z_0, t, averaged), *past]
        if index == 0 and len(steps) > 1:
            ahead = ddim_step(z, z_0, t, s)
            mean = (past[0] + _output(ahead, denoise(ahead, s.time), s, averaged)) / 2
        else:
            mean = sum(weight * output for weight, output in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
        z_0 = to_clean(mean, z, *_levels(t), averaged)
        z = ddim_step(z, z_0, t, s)
        past = past[:3]
        yield Step(index, s.time, z, z_0)


def lms(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, order: int = 4
) -> Iterator[Step]:
    """Adams-Bashforth of order 4 with steps of any length, in sigma / alpha (Katherine Crowson's k-diffusion, LMS).

    It integrates a polynomial through up to four slopes along the line of `euler`. On schedules that leave no signal
    this is the line of rectified flow: see `Point`.
    """
    slope = _slope(schedule)
    past: list[tuple[float, Tensor]] = []  # places on the line and slopes there, newest first
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        past = [(t.sigma / t.scale, _output(z, z_0, t, slope)), *past]
        if len(past) > 1:
            places = t.sigma / t.scale, s.sigma / s.scale
            z_0 = to_clean(mean_between(past, *places, moments(0, len(past))), z, *_levels(t), slope)
        z = ddim_step(z, z_0, t, s)
        past = past[: order - 1]
        yield Step(index, s.time, z, z_0)


def deis(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, order: int = 2
) -> Iterator[Step]:
    """DEIS: noise on a line through two steps in log(sigma / alpha) (Zhang & Chen 2022, log-rho Adams-Bashforth).

    Steps from or to an infinite logarithm are of first order.
    """
    steps = step_points(times, schedule)
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and noise, newest first
    for index, (t, s) in enumerate(steps):
        z_0 = denoise(z, t.time)
        past = [(t.log_snr_half, noise_in(z, z_0, t)), *past]
        used = usable(past, index, len(steps))
        if used > 1:
            means = moments(t.log_snr_half - s.log_snr_half, used)
            z_0 = to_clean(mean_between(past[:used], t.log_snr_half, s.log_snr_half, means), z, *_levels(t), "noise")
        z = ddim_step(z, z_0, t, s)
        past = past[: order - 1]
        yield Step(index, s.time, z, z_0)


def dpmpp_2m(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """DPM-Solver++(2M): z_0 extrapolated from two steps, in log(alpha / sigma) (Lu et al. 2022b, algorithm 2).

    Steps from or to an infinite logarithm are of first order.
    """
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and z_0, newest first
    for index, (t, s) in enumerate(step_points(times, schedule)):
        z_0 = denoise(z, t.time)
        past = [(t.log_snr_half, z_0), *past]
        z = ddim_step(z, mean_between(past, t.log_snr_half, s.log_snr_half, MIDDLE), t, s)
        past = past[:1]
        yield Step(index, s.time, z, z_0)


def dpmpp_3m(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, curvature: float = 1.0
) -> Iterator[Step]:
    """DPM-Solver++(3M): z_0 on a parabola through three steps, in log(alpha / sigma) (Lu et al. 2022b, appendix B).

    Steps from or to an infinite logarithm are of first order.

    Args:
        curvature: factor of the mean of x^2. 1 is exact; the authors' code, k-diffusion and diffusers use 1/2, which is
            a method of second order.
    """
    steps = step_points(times, schedule)
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and z_0, newest first
    for index, (t, s) in enumerate(steps):
        z_0 = denoise(z, t.time)
        past = [(t.log_snr_half, z_0), *past]
        used = usable(past, index, len(steps))
        mean_x, *mean_square = moments(s.log_snr_half - t.log_snr_half, 3)[1:] if used == 3 else MIDDLE[1:]
        means = [1.0, mean_x, *(curvature * square for square in mean_square)]
        z = ddim_step(z, mean_between(past[:used], t.log_snr_half, s.log_snr_half, means), t, s)
        past = past[:2]
        yield Step(index, s.time, z, z_0)


def unipc(
    denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators, order: int = 2
) -> Iterator[Step]:
    """UniPC-2: `dpmpp_2m`, each step of which is corrected by the estimate at its end (Zhao et al. 2023, B_2).

    The correction gains an order and needs no network call, since the next step needs the same estimate. By theorem 3.1
    (arXiv:2302.04867) means of polynomials are exact; as in the authors' code, a line through two steps, and one
    through both ends of the first step, are evaluated in the middle.

    Args:
        order: of the steps before they are corrected, the p of UniPC-p.
    """
    steps = step_points(times, schedule)
    start: tuple[Tensor, Point] | None = None  # z and t where the last step began
    past: list[tuple[float, Tensor]] = []  # log(alpha / sigma) and z_0, newest first
    used = 0  # of them, for the last step
    for index, (t, s) in enumerate(steps):
        z_0 = denoise(z, t.time)
        past = [(t.log_snr_half, z_0), *past]
        if start is not None:
            log_snr_half = t.log_snr_half - start[1].log_snr_half
            means = MIDDLE if used == 1 else moments(log_snr_half, used + 1)
            z = ddim_step(
                start[0], mean_between(past[: used + 1], start[1].log_snr_half, t.log_snr_half, means), start[1], t
            )
        past, start = past[:order], (z, t)
        used = len(past) if steps[-1][1].sigma else min(len(past), len(steps) - index)
        means = MIDDLE if used == 2 else moments(s.log_snr_half - t.log_snr_half, used)
        z = ddim_step(z, mean_between(past[:used], t.log_snr_half, s.log_snr_half, means), t, s)
        yield Step(index, s.time, z, z_0)


def _slope(schedule: Schedule) -> str:
    """The prediction that is the slope of the line along which z_t / scale runs: see `Point`."""
    return "noise" if signal_remains(schedule) else "flow"


def _levels(t: Point) -> tuple[Tensor, Tensor]:
    return torch.tensor(t.alpha, dtype=torch.float64), torch.tensor(t.sigma, dtype=torch.float64)


def _output(z: Tensor, z_0: Tensor, t: Point, averaged: str) -> Tensor:
    """The output of a network that predicts `averaged`, for the estimate z_0."""
    return target(z_0, noise_in(z, z_0, t), *_levels(t), averaged)
