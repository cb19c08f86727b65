"""Completing an image with a model that was not trained to: known latents, and repeated steps.

Blending is the replacement method of Song et al. 2020 (arXiv:2011.13456, appendix I.2) and blended latent diffusion
(Avrahami et al. 2022); the repetitions are RePaint's (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ldm.guidance.classifier_free import Denoise
from ldm.samplers.steps import Generators, Step, noised, step_points
from ldm.schedules.noise_schedule import Schedule

SEGMENTS = 25  # parts that are repeated: RePaint jumps back 10 of 250 steps

# (denoise, z, times, schedule, generators) -> steps
Sample = Callable[[Denoise, Tensor, Tensor, Schedule, Generators], Iterator[Step]]


def blended(denoise: Denoise, known: Tensor, painted: Tensor) -> Denoise:
    """A denoiser whose estimate is the known latents outside the painted part.

    There z_t is always the known latents with the noise of t, and sampling ends at them. In the painted part the
    estimate depends on z_t alone: it is E[z_0 | z_t], not E[z_0 | z_t, known], and is better at lower noise. Samples
    are exact if both parts are independent. Otherwise the known part has too little influence at high noise, which
    `resampled` improves.

    Args:
        denoise: (z_t, t) -> z_0, guided or not.
        known: clean latents [1, c, h, w].
        painted: [1, 1, h, w], 1 where latents are sampled, 0 where they are known.
    """
    return lambda z_t, t: known + painted * (denoise(z_t, t) - known)


def painted_latents(mask: Tensor, downsampling: int) -> Tensor:
    """The painted latents [1, 1, h, w], 0 or 1, of a mask of pixels [1, H, W].

    These are all latents with a painted pixel. Their known pixels are restored in the finished image.
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
    """Sample each segment of the times `repeats` times, adding noise back to its beginning (RePaint, algorithm 1).

    Repetition lets the painted part adapt to the known part at the same noise. Samplers run on each segment separately,
    so multistep samplers begin each without a memory.

    Args:
        sample: a sampler's `run`, with its options.
        denoise: as `blended` returns it.
        z: [B, c, h, w] at the first time.
        times: falling [S + 1].
        schedule, generators: as for samplers.
        repeats: of each segment; 1 repeats nothing.
        segments: their number, at most one per step.
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
