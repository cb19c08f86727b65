"""Completing a picture with a denoiser that was trained to make whole ones: known latents, and a walk that turns back.

Blending is the replacement method of Song et al. 2020 (arXiv:2011.13456, appendix I.2) and blended latent diffusion
(Avrahami et al. 2022); the repetitions are RePaint's (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ldm.guidance.base import Denoise
from ldm.samplers.steps import Generators, Step, noised, step_points
from ldm.schedules.base import Schedule

SEGMENTS = 25  # that a walk is cut into: RePaint jumps back 10 of 250 steps

# (denoise, z, times, schedule, generators) -> steps
Sample = Callable[[Denoise, Tensor, Tensor, Schedule, Generators], Iterator[Step]]


def blended(denoise: Denoise, known: Tensor, painted: Tensor) -> Denoise:
    """A denoiser whose estimate is the known latents where nothing is to be painted.

    There z_t is then always the known latents with the noise of t, and the walk ends at them. Elsewhere the estimate
    rests on z_t alone: E[z_0 | z_t], not E[z_0 | z_t, known], and is the better the less noise there is. Samples are
    those of p(z_0 | known) where both parts are independent; where they are not, too little of the known part bears
    on the other at high noise, which `resampled` makes up for.

    Args:
        denoise: (z_t, t) -> z_0, guided or not.
        known: clean latents [1, c, h, w].
        painted: [1, 1, h, w], 1 where latents are to be made, 0 where they are known.
    """
    return lambda z_t, t: known + painted * (denoise(z_t, t) - known)


def painted_latents(mask: Tensor, downsampling: int) -> Tensor:
    """Which latents are to be painted, [1, 1, h, w] of 0 and 1, for a mask of pixels [1, H, W] likewise.

    All whose pixels are not all known: the rest of them is known, and is put back in the finished picture.
    """
    return F.max_pool2d(mask[None], downsampling)  # [1, 1, H, W] -> [1, 1, H / f, W / f]


def resampled(
    sample: Sample,
    denoise: Denoise,
    z: Tensor,
    times: Tensor,
    schedule: Schedule,
    generators: Generators,
    repeats: int,
    segments: int = SEGMENTS,
) -> Iterator[Step]:
    """Walk each segment of the times `repeats` times, noising back to its begin in between (RePaint, algorithm 1).

    What was made at the end of a segment meets the known part, as noisy as itself, at its begin again: so both come to
    fit. Samplers know nothing of it; one with a memory begins each segment without.

    Args:
        sample: a sampler's `run`, with its options.
        denoise: as `blended` makes it.
        z: where the walk begins [B, c, h, w].
        times: falling [S + 1].
        schedule, generators: as samplers take them.
        repeats: 1 is the walk in segments, without turning back.
        segments: as many as there are, or one for each step where there are fewer.
    """
    length, index = max(round((len(times) - 1) / segments), 1), 0
    for first in range(0, len(times) - 1, length):
        part = times[first : first + length + 1]
        points = step_points(part, schedule)
        begin, end = points[0][0], points[-1][1]
        for again in range(repeats):
            z = noised(z, end, begin, generators) if again else z
            for step in sample(denoise, z, part, schedule, generators):
                yield replace(step, index=index)
                z, index = step.z, index + 1
