"""The training loss of a denoiser, weighted over noise levels (Ho et al. 2020, eq. 12 and 14; Kingma & Gao 2023)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.denoising.denoiser import Denoiser


@dataclass(frozen=True)
class NoisePoint:
    """What weightings depend on at times t [B], for a denoiser; all properties are [B], float64."""

    denoiser: Denoiser
    t: Tensor

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio: the squared error of the noise per squared error of z_0."""
        return self.denoiser.schedule.snr(self.t, torch.float64)

    @property
    def gain(self) -> Tensor:
        """The squared error of z_0 per squared error of the network's output."""
        return self.denoiser.gain(self.t)

    @property
    def snr_drop(self) -> Tensor:
        """-d snr / dt / 2, the variational bound's weight of the squared error of z_0.

        On a discrete schedule it is T / 2 times the decrease since the level before. Before the first level snr is
        infinite, so the noise of the first level has the weight of the second (as in CompVis' code).
        """
        schedule = self.denoiser.schedule
        if not schedule.discrete:
            return torch.where(self.snr == 0, 0.0, schedule.dlogsnr_dt(self.t) * self.snr) / 2
        t, step = schedule.nearest(self.t.to(torch.float64)), 1 / schedule.config.timesteps
        later = t.clamp(min=2 * step)
        snr_drop = (schedule.snr(later - step) - schedule.snr(later)) / (2 * step)
        return torch.where(t < later, schedule.snr(t) / schedule.snr(later), 1.0) * snr_drop


@dataclass(frozen=True)
class Weighting:
    """The weight [B] of the squared error of the network's output, and its constant gamma."""

    weigh: Callable[[NoisePoint, Any], Tensor]
    gamma: float | None = None  # the paper's; None: the weighting has no gamma and ignores it
    lowest: float = 0.0  # gamma must be larger


WEIGHTINGS: dict[str, Weighting] = {
    "simple": Weighting(lambda at, gamma: torch.ones_like(at.snr)),
    "min_snr": Weighting(lambda at, gamma: at.snr.clamp(max=gamma) * at.gain, gamma=5.0),
    "vlb": Weighting(lambda at, gamma: at.snr_drop * at.gain),
    "p2": Weighting(lambda at, gamma: (1 + at.snr) ** -gamma * at.snr * at.gain, gamma=1.0),
    "edm": Weighting(lambda at, gamma: (1 + at.snr) * at.gain),
    "sigmoid": Weighting(
        lambda at, gamma: torch.sigmoid(gamma - at.snr.log()) * at.snr_drop * at.gain, gamma=0.0, lowest=-math.inf
    ),
    "noise": Weighting(lambda at, gamma: at.snr * at.gain),
}


def loss_weight(denoiser: Denoiser, t: Tensor, weighting: str, gamma: float | None = None) -> Tensor:
    """The weight [B] (float64) of each image's squared error, measured on what the network outputs.

    Weights of the error of z_0 are multiplied by the gain, those of the error of the noise by snr and gain:

    - simple: 1 on the output (Ho et al. 2020, eq. 14);
    - min_snr: min(snr, gamma) on z_0 (Hang et al. 2023, eq. 7);
    - vlb: (snr(s) / snr(t) - 1) T / 2 on noise from level s to the next one, t, and -d log(snr) / dt / 2 if time is
      continuous: the terms of the variational bound, in nats per element (Kingma et al. 2021, eq. 13 and section 5);
    - p2: 1 / (1 + snr)^gamma on noise (Choi et al. 2022, eq. 8);
    - edm: 1 on F, Karras et al. 2022's output (section 5);
    - sigmoid: vlb's times sigmoid(gamma - log(snr)), where gamma is the paper's b (Kingma & Gao 2023; Hoogeboom 2024);
    - noise: 1 on noise, which is sigma^2 on the score (Song & Ermon 2019, eq. 6).

    Args:
        denoiser: defines schedule and prediction.
        t: times [B] in [1/T, 1].
        weighting: a key of WEIGHTINGS.
        gamma: the constant of min_snr, p2 or sigmoid; None: 5 and 1 as in the papers, or 0.

    Raises:
        ValueError: unknown weighting, or a gamma that the weighting does not support.
    """
    check_weighting(weighting, gamma)
    chosen = WEIGHTINGS[weighting]
    return chosen.weigh(NoisePoint(denoiser, t), chosen.gamma if gamma is None else gamma)


def check_weighting(weighting: str, gamma: float | None) -> None:
    """Raise ValueError for an unknown weighting, or a gamma that it does not support."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown loss weighting {weighting!r}; use one of {', '.join(WEIGHTINGS)}")
    chosen = WEIGHTINGS[weighting]
    if None not in (gamma, chosen.gamma) and not chosen.lowest < gamma < math.inf:
        rule = "finite" if math.isinf(chosen.lowest) else "positive"
        raise ValueError(f"gamma {gamma} must be a {rule} number; {chosen.gamma:g} is usual")


def diffusion_loss(
    denoiser: Denoiser,
    z_0: Tensor,
    context: Any,
    t: Tensor,
    noise: Tensor,
    weighting: str = "simple",
    gamma: float | None = None,
) -> Tensor:
    """Weighted squared error [B] (float32 or better) of the network's output, averaged over each image's elements.

    Args:
        denoiser: the denoiser that is trained.
        z_0: clean latents [B, c, h, w].
        context: what the denoiser is conditioned on.
        t: times [B] in (0, 1], as `schedule.quantize` returns them; best on the CPU.
        noise: standard normal [B, c, h, w].
        weighting: a key of WEIGHTINGS.
        gamma: its constant, see `loss_weight`; None: the paper's.
    """
    output = denoiser.output(denoiser.add_noise(z_0, noise, t), t, context)
    target = denoiser.target(z_0, noise, t)
    error = (output.to(target.dtype) - target).square().flatten(1).mean(1)  # [B]
    return error * loss_weight(denoiser, t, weighting, gamma).to(error.device, error.dtype)
