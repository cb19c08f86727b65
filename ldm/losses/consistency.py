"""Consistency functions, which map z_t to the end of its probability flow in one call, and their distillation.

Song et al. 2023 (arXiv:2303.01469); in latents, from a guided teacher: Luo et al. 2023 (LCM, arXiv:2310.04378).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.denoising.denoiser import Denoiser
from ldm.denoising.prediction import mix, per_image
from ldm.guidance.classifier_free import copies, extrapolate, for_all
from ldm.samplers.steps import NoiseLevel, ddim_step
from ldm.schedules.noise_schedule import Schedule

SIGMA_DATA = 0.5  # of the boundary condition, as in Karras et al. 2022
TIMESTEP_SCALING = 10.0  # factor of the timestep, of the authors' code

Consistency = Callable[[Tensor, Tensor, Any], Tensor]  # (z_t [B, c, h, w], t [B], context) -> z_0 [B, c, h, w]
Teacher = Callable[[Tensor, Tensor], Tensor]  # (z_t [B, c, h, w], t [B]) -> z_0 [B, c, h, w]


def boundary(schedule: Schedule, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at times t, float64: 1 and 0 at the first noise level, almost 0 and 1 above (LCM, eq. 9).

    As in LCMScheduler of diffusers, they depend on the timestep, not on sigma.
    """
    scaled = TIMESTEP_SCALING * schedule.timestep(t).to(torch.float64).clamp(min=0)
    size = torch.hypot(scaled, torch.full_like(scaled, SIGMA_DATA))
    return (SIGMA_DATA / size).square(), scaled / size


@dataclass(frozen=True, eq=False)
class ConsistencyFunction:
    """f(z_t, t) = c_skip(t) z_t + c_out(t) denoiser(z_t, t): at the first noise level it returns z_t (LCM, eq. 9)."""

    denoiser: Denoiser

    def __call__(self, z_t: Tensor, t: Tensor | float, context: Any = None) -> Tensor:
        """The end of the flow from z_t [B, c, h, w] at times t (one, or [B])."""
        c_skip, c_out = boundary(self.denoiser.schedule, t)
        return mix(z_t, self.denoiser(z_t, t, context), c_skip, c_out)


def rung(schedule: Schedule, t: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The lowest of `levels` evenly spaced times that is not below t [B], and the one before, at least the first level.

    With 50 of 1000 noise levels, steps have k = 20, at the times of the authors' code (LCM, section 4.3).
    """
    index = (t.to(torch.float64) * levels - 1e-3).ceil().clamp(1, levels)  # tolerates rounding of float32 times
    return schedule.nearest(index / levels), schedule.nearest((index - 1) / levels)


def guided_teacher(denoiser: Denoiser, context: Any, null: Any, scale: Tensor) -> Teacher:
    """The denoiser with classifier-free guidance, each image at its own guidance scale [B] (LCM, eq. 14; w + 1)."""

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        contexts = for_all(context, len(z_t)).cat(for_all(null, len(z_t)))
        conditional, unconditional = denoiser(*copies(z_t, t, 2), contexts).chunk(2)  # [B, c, h, w] each
        return extrapolate(conditional, unconditional, per_image(scale, z_t))

    return denoise


def distance(one: Tensor, other: Tensor, huber: float) -> Tensor:
    """Pseudo-Huber distance [B] of elements, averaged: sqrt(d^2 + huber^2) - huber; at 0 it is the squared difference.

    Song & Dhariwal 2023 (arXiv:2310.14189), eq. 6, of elements as in diffusers' training scripts.
    """
    squared = (one - other).square()
    return ((squared + huber**2).sqrt() - huber if huber else squared).flatten(1).mean(1)


def consistency_loss(
    student: Consistency,
    target: Consistency,
    teacher: Teacher,
    z_t: Tensor,
    t: Tensor,
    s: Tensor,
    context: Any,
    schedule: Schedule,
    huber: float = 0.001,
) -> Tensor:
    """The distance [B] of the student at z_t from the target after one step of the teacher (LCM, eq. 17).

    Args:
        student: the consistency function that is trained.
        target: the student with averaged weights, or the student itself; it gets no gradient.
        teacher: a denoiser, guided or not.
        z_t: noisy latents [B, c, h, w].
        t, s: [B], times where the teacher's step, `ddim_step`, begins and ends.
        context: what student and target are conditioned on.
        schedule: gives alpha and sigma.
        huber: of `distance`.
    """
    with torch.no_grad():
        levels = [NoiseLevel(*schedule(time, torch.float64)) for time in (t, s)]
        z_s = ddim_step(z_t, teacher(z_t, t), *levels)
        expected = target(z_s, s, context)
    return distance(student(z_t, t, context), expected, huber)


def guidance_loss(student: Denoiser, teacher: Teacher, z_t: Tensor, t: Tensor, context: Any) -> Tensor:
    """Squared error [B] of the student's output against the guided teacher's (Meng et al. 2022, eq. 3).

    It is the error of the network's output, as `diffusion_loss` with weighting simple, which is finite at all times.

    Args:
        student: conditioned on the context alone.
        teacher: guided, on the student's schedule.
        z_t: noisy latents [B, c, h, w].
        t: [B].
        context: what the student is conditioned on.
    """
    with torch.no_grad():
        expected = teacher(z_t, t)
    error = (student(z_t, t, context) - expected).square().flatten(1).mean(1)  # [B], of z_0
    return error / student.gain(t).to(error)
