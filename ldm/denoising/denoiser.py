"""The denoiser: a network whose output a schedule and a prediction define (Vincent et al. 2008; Karras et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.denoising.prediction import NOISE_ALONE, check_prediction, clean_coefficients, mix, per_image, target, to_clean
from ldm.schedules.noise_schedule import Schedule


class Numbers(NamedTuple):
    """Numbers of one time: z_0 = from_z_in * z_t / scale + from_output * output, and the timestep that is embedded."""

    scale: float
    from_z_in: float
    from_output: float
    timestep: float


@dataclass(frozen=True, eq=False)
class Denoiser:
    """Maps noisy latents z_t to the estimate E[z_0 | z_t] of the clean ones.

    It is not a module: DDP, EMA and compile wrap the network, which is called as network(z_t, timestep [B], context).

    On variance-exploding schedules, whose z_t has a standard deviation of up to sigma_max, z_t, alpha and sigma are
    divided by sqrt(alpha^2 + sigma^2) first. The scaled z_t is again a z_0 + b noise, with a^2 + b^2 = 1: the network's
    input has unit variance, and edm prediction is the preconditioning of Karras et al. 2022. Their sigma_data is 1,
    since latents have unit scale; a model of pixels with sigma_data 0.5 corresponds to pixels and sigmas multiplied by
    2.

    Raises:
        ValueError: unknown prediction, or noise or score prediction on a schedule that ends in pure noise.
    """

    network: Callable[[Tensor, Tensor, Any], Tensor]
    schedule: Schedule
    prediction: str
    at_levels: bool = False  # round timesteps between two noise levels to the nearest one
    numbers: Mapping[float, Numbers] = field(default_factory=dict)  # by time, see `prepared`

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if self.prediction in NOISE_ALONE and self.schedule.ends_in_pure_noise:
            raise ValueError(
                f"{self.prediction} prediction is undefined on schedule {self.schedule.config.name!r}, which has no "
                "signal left at t = 1; use prediction velocity, flow, clean or edm"
            )

    def __call__(self, z_t: Tensor, t: Tensor | float, context: Any = None) -> Tensor:
        """z_0 [B, c, h, w] from z_t [B, c, h, w] at times t (one, or [B]; best on the CPU) and a context."""
        if not isinstance(t, Tensor) and t in self.numbers:
            at = self.numbers[t]
            z_in = z_t / at.scale if self.schedule.unit_input else z_t
            timestep = torch.full((len(z_t),), at.timestep, device=z_t.device)
            return mix(z_in, self.network(z_in, timestep, context).to(z_t.dtype), at.from_z_in, at.from_output)
        alpha, sigma, scale = self.levels(t)
        z_in = self._scaled(z_t, scale)
        return to_clean(self.network(z_in, self._timestep(z_t, t), context), z_in, alpha, sigma, self.prediction)

    def prepared(self, times: Tensor) -> Denoiser:
        """The same denoiser with the numbers of these times [S] computed in advance, which makes steps faster."""
        alpha, sigma, scale = self.levels(times)
        columns = scale, *clean_coefficients(alpha, sigma, self.prediction), self._timesteps(times).double()
        rows = (Numbers(*row) for row in torch.stack(columns, 1).tolist())
        return replace(self, numbers=dict(zip(times.tolist(), rows, strict=True)))

    def output(self, z_t: Tensor, t: Tensor | float, context: Any = None) -> Tensor:
        """The bare network's output at z_t [B, ...] and times t (one, or [B])."""
        return self.network(self._scaled(z_t, self.levels(t)[2]), self._timestep(z_t, t), context)

    def target(self, z_0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """The target of `output` at alpha z_0 + sigma noise, [B, ...]."""
        alpha, sigma, _ = self.levels(t)
        return target(z_0, noise, alpha, sigma, self.prediction)

    def add_noise(self, z_0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
        """z_t = alpha z_0 + sigma noise, [B, ...]."""
        return mix(z_0, noise, *self.schedule(t, torch.float64))

    def coefficients(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """The numbers with z_0 = first * z_t + second * output at times t, float64."""
        alpha, sigma, scale = self.levels(t)
        from_z_in, from_output = clean_coefficients(alpha, sigma, self.prediction)
        return from_z_in / scale, from_output

    def gain(self, t: Tensor | float) -> Tensor:
        """(d z_0 / d output)^2 at times t, float64: the squared error of z_0 per squared error of the output."""
        return self.coefficients(t)[1].square()

    def levels(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled alpha and sigma, and the scale that z_t is divided by; float64."""
        alpha, sigma = self.schedule(t, torch.float64)
        scale = torch.hypot(alpha, sigma) if self.schedule.unit_input else torch.ones_like(alpha)
        return alpha / scale, sigma / scale, scale

    def _scaled(self, z_t: Tensor, scale: Tensor) -> Tensor:
        return z_t / per_image(scale, z_t) if self.schedule.unit_input else z_t

    def _timestep(self, z_t: Tensor, t: Tensor | float) -> Tensor:
        return self._timesteps(t).to(z_t.device).expand(len(z_t))

    def _timesteps(self, t: Tensor | float) -> Tensor:
        timestep = self.schedule.timestep(t)
        return timestep.round() if self.at_levels and self.schedule.discrete else timestep
