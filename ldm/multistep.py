"""Samplers that remember what the network said in the steps before: higher orders at one network call per step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.prediction import target, to_clean
from ldm.schedule import Schedule
from ldm.walk import Denoise, Generators, Point, Step, noise_in, signal_remains, towards, walk

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

    The first step is taken again with the mean of the outputs at both its ends, which needs one more network call.

    Args:
        averaged: what the mean is taken of, a key of PREDICTIONS; None: noise as in the paper, or flow on schedules
            that leave no signal. diffusers averages the network's output; for velocity, which is another mixture of z_0
            and noise at each time, that leaves a method of first order.
    """
    averaged = averaged or ("noise" if signal_remains(schedule) else "flow")
    past: list[Tensor] = []
    steps = walk(times, schedule)
    for index, (t, s) in enumerate(steps):
        z_0 = denoise(z, t.time)
        past = [_output(z, z_0, t, averaged), *past[:3]]
        if index == 0 and len(steps) > 1:
            ahead = towards(z, z_0, t, s)
            mean = (past[0] + _output(ahead, denoise(ahead, s.time), s, averaged)) / 2
        else:
            mean = sum(weight * output for weight, output in zip(ADAMS_BASHFORTH[len(past) - 1], past, strict=True))
        z_0 = to_clean(mean, z, *_levels(t), averaged)
        z = towards(z, z_0, t, s)
        yield Step(index, s.time, z, z_0)


def dpmpp_2m(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """DPM-Solver++(2M): z_0 extrapolated from two steps, in log(alpha / sigma) (Lu et al. 2022b, algorithm 2).

    Steps from or to an infinite logarithm are of first order.
    """
    before, grown = None, math.inf  # z_0 of the step before, and how much log(alpha / sigma) grew in it
    for index, (t, s) in enumerate(walk(times, schedule)):
        z_0 = denoise(z, t.time)
        growth = s.growth - t.growth
        z = towards(z, _extrapolated(z_0, before, growth, grown), t, s)
        before, grown = z_0, growth
        yield Step(index, s.time, z, z_0)


def unipc(denoise: Denoise, z: Tensor, times: Tensor, schedule: Schedule, generators: Generators) -> Iterator[Step]:
    """UniPC-2: `dpmpp_2m`, whose every step is taken again when z_0 at its end is known (Zhao et al. 2023, B_2).

    That needs no network call: z_0 is estimated only before the step is taken again.
    """
    begun, before, before_that = None, None, None  # (z, t) where the last step began; z_0 of the last two steps
    grown = growth = math.inf  # of the step before the last one, and of the last one
    for index, (t, s) in enumerate(walk(times, schedule)):
        z_0 = denoise(z, t.time)
        if begun is not None:
            z = towards(begun[0], _corrected(z_0, before, before_that, growth, grown), begun[1], t)
        begun, before, before_that, grown, growth = (z, t), z_0, before, growth, s.growth - t.growth
        z = towards(z, _extrapolated(z_0, before_that, growth, grown), t, s)
        yield Step(index, s.time, z, z_0)


def _extrapolated(z_0: Tensor, before: Tensor | None, growth: float, grown: float) -> Tensor:
    """z_0 in the middle of a step that grows by `growth`, on the line through the two estimates before it."""
    if before is None or math.isinf(growth):
        return z_0
    return z_0 + growth / grown / 2 * (z_0 - before)


def _corrected(end: Tensor, begin: Tensor, before: Tensor | None, growth: float, grown: float) -> Tensor:
    """The mean z_0 of a step that grew by `growth`, of a line through both ends, or of a parabola through `before` too.

    Zhao et al. 2023 (arXiv:2302.04867), theorem 3.1 with B(h) = e^h - 1; the line is weighed 1 to 1, as in their code.
    """
    if before is None:
        return begin + (end - begin) / 2
    decay = -math.expm1(-growth)
    whole = 1 / decay - 1 / growth
    square = 2 / growth**2 + (1 - 2 / growth) / decay
    ratio = -grown / growth  # where `before` is, as the step goes from 0 to 1
    bend = (whole - square) / (1 - ratio)
    return begin + bend / ratio * (before - begin) + (whole - bend) * (end - begin)


def _levels(t: Point) -> tuple[Tensor, Tensor]:
    return torch.tensor(t.alpha, dtype=torch.float64), torch.tensor(t.sigma, dtype=torch.float64)


def _output(z: Tensor, z_0: Tensor, t: Point, averaged: str) -> Tensor:
    """What a network that predicts `averaged` says where the estimate is z_0."""
    return target(z_0, noise_in(z, z_0, t), *_levels(t), averaged)
