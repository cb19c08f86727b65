"""The training loss of a denoiser, weighted over noise levels (Ho et al. 2020, eq. 14; Hang et al. 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.denoiser import Denoiser

# The weight of the squared error of the network's output, from the signal-to-noise ratio snr, the gain (how an error of
# the output weighs as an error of z_0) and gamma. A weight w of the error of z_0 is a weight w * gain of the output's.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "simple": lambda snr, gain, gamma: torch.ones_like(snr),
    "min_snr": lambda snr, gain, gamma: snr.clamp(max=gamma) * gain,
}


def loss_weight(denoiser: Denoiser, t: Tensor, weighting: str, gamma: float = 5.0) -> Tensor:
    """The weight [B] (float64) of each image's squared error, measured on what the network outputs.

    min_snr is min(snr, gamma) on the error of z_0 (Hang et al. 2023, eq. 7); on the output that is, by the gain,
    noise min(snr, gamma) / snr, clean min(snr, gamma), velocity min(snr, gamma) / (snr + 1) and
    flow min(snr, gamma) / (sqrt(snr) + 1)^2.

    Raises:
        ValueError: unknown weighting, or gamma not above 0.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown loss weighting {weighting!r}; use one of {', '.join(WEIGHTINGS)}")
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma {gamma} must be a positive number; Hang et al. 2023 use 5")
    return WEIGHTINGS[weighting](denoiser.schedule.snr(t, torch.float64), denoiser.gain(t), gamma)


def diffusion_loss(
    denoiser: Denoiser,
    z_0: Tensor,
    context: Any,
    t: Tensor,
    noise: Tensor,
    weighting: str = "simple",
    gamma: float = 5.0,
) -> Tensor:
    """Weighted squared error [B] (float32 or better) of the network's output, averaged over each image's elements.

    Args:
        denoiser: what is trained.
        z_0: clean latents [B, c, h, w].
        context: what the denoiser is told.
        t: times [B] in (0, 1], as `schedule.quantize` gives them; best on the CPU.
        noise: standard normal [B, c, h, w].
        weighting: a key of WEIGHTINGS.
        gamma: the signal-to-noise ratio above which min_snr stops to count noise levels for more.
    """
    output = denoiser.output(denoiser.add_noise(z_0, noise, t), t, context)
    target = denoiser.target(z_0, noise, t)
    error = (output.to(target.dtype) - target).square().flatten(1).mean(1)  # [B]
    return error * loss_weight(denoiser, t, weighting, gamma).to(error.device, error.dtype)
