"""Data distributions with an exact denoiser and probability flow, as references for tests of ldm/."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.denoising.prediction import target
from ldm.schedules.noise_schedule import Schedule, ScheduleConfig
from ldm.schedules.registry import make_schedule

CONFIGS = {
    "scaled_linear": ScheduleConfig(),
    "scaled_linear_0195": ScheduleConfig(beta_start=0.0015, beta_end=0.0195),
    "linear": ScheduleConfig(name="linear"),
    "linear_continuous": ScheduleConfig(name="linear", continuous=True),
    "cosine": ScheduleConfig(name="cosine"),
    "zero_terminal": ScheduleConfig(zero_terminal_snr=True),
    "ve": ScheduleConfig(name="ve"),
    "ve_large": ScheduleConfig(name="ve", sigma_max=1000.0),
    "sub_vp": ScheduleConfig(name="sub_vp"),
    "edm": ScheduleConfig(name="edm"),
    "flow": ScheduleConfig(name="flow"),
    "flow_shift": ScheduleConfig(name="flow", shift=3.0),
}
SCHEDULES = {name: make_schedule(config) for name, config in CONFIGS.items()}


@dataclass(frozen=True)
class Mixture:
    """Independent elements, each a mixture of K normal distributions with the same weights."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def _noised(self, z: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log responsibilities up to a constant, centers and variances of z_t's components, in a last dimension K."""
        weights, means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds))
        center, variance = alpha * means, alpha**2 * stds**2 + sigma**2
        logs = weights.log() - variance.log() / 2 - (z.double()[..., None] - center) ** 2 / (2 * variance)
        return logs, center, variance

    def denoise(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[z_0 | z_t] in closed form, elementwise."""
        logs, center, variance = self._noised(z, alpha, sigma)
        means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.stds))
        posterior = means + alpha * stds**2 / variance * (z.double()[..., None] - center)
        return (logs.softmax(-1) * posterior).sum(-1).to(z.dtype)

    def cdf(self, z: Tensor, alpha: float, sigma: float) -> Tensor:
        _, center, variance = self._noised(z, alpha, sigma)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return (weights * torch.special.ndtr((z[..., None] - center) / variance.sqrt())).sum(-1)

    def flow(self, z: Tensor, start: tuple[float, float], stop: tuple[float, float]) -> Tensor:
        """The exact solution of the probability-flow ODE for z (float64), which keeps quantiles in one dimension."""
        quantile = self.cdf(z, *start)
        low, high = torch.full_like(z, -1e4), torch.full_like(z, 1e4)
        for _ in range(100):
            middle = (low + high) / 2
            below = self.cdf(middle, *stop) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        k = torch.multinomial(torch.tensor(self.weights), count, replacement=True, generator=generator)
        noise = torch.randn(count, dtype=torch.float64, generator=generator)
        means, stds = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.stds))
        return means[k] + stds[k] * noise


GAUSSIAN = Mixture((1.0,), (0.7,), (0.4,))
TWO = Mixture((0.3, 0.7), (-1.0, 0.8), (0.35, 0.5))


def denoiser_of(data: Mixture, schedule: Schedule):
    """The denoiser denoise(z, t) of data, for a single t."""

    def denoise(z: Tensor, t: float) -> Tensor:
        alpha, sigma = (level.item() for level in schedule(t))
        return data.denoise(z, alpha, sigma)

    return denoise


def perfect_network(data: Mixture, schedule: Schedule, prediction: str, t: float):
    """A network that predicts exactly what `data.denoise` implies, at a fixed time t."""
    alpha, sigma = (level.item() for level in schedule(t))
    scale = math.hypot(alpha, sigma) if schedule.unit_input else 1.0

    def network(z_in: Tensor, timestep: Tensor, context: object) -> Tensor:
        z_t = z_in.double() * scale
        z_0 = data.denoise(z_t, alpha, sigma)
        a, b = (torch.tensor(level / scale, dtype=torch.float64) for level in (alpha, sigma))
        return target(z_0, (z_t - alpha * z_0) / sigma, a, b, prediction).to(z_in.dtype)

    return network
