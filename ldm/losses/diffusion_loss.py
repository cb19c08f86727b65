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
class Level:
    """The noise levels at times t [B] where errors are to be weighed, for a denoiser; all properties [B], float64."""

    denoiser: Denoiser
    t: Tensor

    @property
    def snr(self) -> Tensor:
        """The signal-to-noise ratio: the squared error of z_0 times it is that of noise."""
        return self.denoiser.schedule.snr(self.t, torch.float64)

    @property
    def gain(self) -> Tensor:
        """The squared error of z_0 per squared error of the network's output."""
        return self.denoiser.gain(self.t)

    @property
    def snr_drop(self) -> Tensor:
        """-d snr / dt / 2, the variational bound's weight of the squared error of z_0.

        On a discrete schedule it is T / 2 times what is lost since the level before. Before the first one snr is
        infinite: the noise of that level is weighed as that of the next (CompVis' code).
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

    weigh: Callable[[Level, Any], Tensor]
    gamma: float | None = None  # the paper's; None: it has none, and takes no notice of any
    lowest: float = 0.0  # gamma must be above this


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

    A weight of the error of z_0 becomes one of the output's by the gain; of noise's, by snr and gain. They are

    - simple: 1 on the output (Ho et al. 2020, eq. 14);
    - min_snr: min(snr, gamma) on z_0 (Hang et al. 2023, eq. 7);
    - vlb: (snr(s) / snr(t) - 1) T / 2 on noise from level s to the next one, t, and -d log(snr) / dt / 2 where time is
      continuous: the terms of the variational bound, in nats per element (Kingma et al. 2021, eq. 13 and section 5);
    - p2: 1 / (1 + snr)^gamma on noise (Choi et al. 2022, eq. 8);
    - edm: 1 on F, Karras et al. 2022's output (section 5);
    - sigmoid: vlb's times sigmoid(gamma - log(snr)), where gamma is the paper's b (Kingma & Gao 2023; Hoogeboom 2024);
    - noise: 1 on noise, which is sigma^2 on the score (Song & Ermon 2019, eq. 6).

    Args:
        denoiser: whose schedule and prediction count.
        t: times [B] in [1/T, 1].
        weighting: a key of WEIGHTINGS.
        gamma: the constant of min_snr, p2 or sigmoid; None: 5 and 1 as in the papers, or 0.

    Raises:
        ValueError: unknown weighting, or gamma is no number that it can have.
    """
    check_weighting(weighting, gamma)
    chosen = WEIGHTINGS[weighting]
    return chosen.weigh(Level(denoiser, t), chosen.gamma if gamma is None else gamma)


def check_weighting(weighting: str, gamma: float | None) -> None:
    """Raise ValueError if there is no such weighting, or if it can't have this gamma."""
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
        denoiser: what is trained.
        z_0: clean latents [B, c, h, w].
        context: what the denoiser is told.
        t: times [B] in (0, 1], as `schedule.quantize` gives them; best on the CPU.
        noise: standard normal [B, c, h, w].
        weighting: a key of WEIGHTINGS.
        gamma: its constant, see `loss_weight`; None: the paper's.
    """
    output = denoiser.output(denoiser.add_noise(z_0, noise, t), t, context)
    target = denoiser.target(z_0, noise, t)
    error = (output.to(target.dtype) - target).square().flatten(1).mean(1)  # [B]
    return error * loss_weight(denoiser, t, weighting, gamma).to(error.device, error.dtype)
