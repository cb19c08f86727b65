"""Noise schedules that are tables of T noise levels, with index k = t T - 1 (Ho et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.schedules.noise_schedule import Schedule, ScheduleConfig, with_betas, with_sigmas


@dataclass(frozen=True, eq=False)
class TableSchedule(Schedule):
    """T noise levels, defined by their ratios sigma / alpha; between two of them log(sigma / alpha) is linear in t.

    Below the first level sigma / alpha is linear. Next to a level without signal alpha / sigma is, where logs are
    infinite.
    """

    ratios: Tensor  # [T + 1] float64, rising sigma / alpha of clean data (0) and each level; the last may be infinite

    @property
    def discrete(self) -> bool:
        """Whether networks are trained at T noise levels only, rather than at all times."""
        return not self.config.continuous

    def _ratio(self, position: Tensor) -> Tensor:
        """sigma / alpha at positions [0, T]."""
        below = position.floor().clamp(max=self.config.timesteps - 1)
        weight = position - below
        low, high = self.ratios[below.long()], self.ratios[below.long() + 1]
        ratio = torch.exp((1 - weight) * low.log() + weight * high.log())
        ratio = torch.where(weight == 0, low, torch.where(weight == 1, high, ratio))
        ratio = torch.where(below == 0, weight * high, ratio)
        return torch.where(high.isinf(), low / (1 - weight), ratio)

    def _embedded(self, position: Tensor) -> Tensor:
        return (position - 1).clamp(min=0)  # below the first level, the index of the first

    def _located(self, ratio: Tensor) -> Tensor:
        """The positions [0, T] at which sigma / alpha has the values `ratio`."""
        below = (torch.searchsorted(self.ratios, ratio, right=True) - 1).clamp(0, self.config.timesteps - 1)
        low, high = self.ratios[below], self.ratios[below + 1]
        weight = (ratio / low).log() / (high / low).log()
        weight = torch.where(below == 0, ratio / high, weight)
        return below + torch.where(high.isinf(), 1 - low / ratio, weight).clamp(max=1)

    def _dlogsnr_dt(self, position: Tensor) -> Tensor:
        below = ((position - 1e-9).ceil() - 1).clamp(1, self.config.timesteps - 1)  # tolerates rounding
        low, high = self.ratios[below.long()], self.ratios[below.long() + 1]
        return 2 * torch.where(high.isinf(), 1 / (1 - (position - below)), (high / low).log())


class VariancePreserving(TableSchedule):
    """alpha^2 + sigma^2 = 1 (Ho et al. 2020)."""

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        ratio, one = self._ratio(position), torch.ones((), dtype=torch.float64)
        return 1 / torch.hypot(one, ratio), 1 / torch.hypot(one, 1 / ratio)  # exact at ratios 0 and infinity


class VarianceExploding(TableSchedule):
    """alpha = 1, sigma grows geometrically (Song et al. 2021, eq. 31)."""

    unit_input = True

    def _levels(self, position: Tensor) -> tuple[Tensor, Tensor]:
        ratio = self._ratio(position)
        return torch.ones_like(ratio), ratio


def linear(config: ScheduleConfig) -> Schedule:
    """beta linear in k (Ho et al. 2020)."""
    config = with_betas(config, 1e-4, 0.02)
    ends = config.beta_start, config.beta_end
    return _from_betas(config, torch.linspace(*ends, config.timesteps, dtype=torch.float64))


def scaled_linear(config: ScheduleConfig) -> Schedule:
    """sqrt(beta) linear in k (Rombach et al. 2022, whose code calls this linear)."""
    config = with_betas(config, 0.00085, 0.012)
    ends = config.beta_start**0.5, config.beta_end**0.5
    return _from_betas(config, torch.linspace(*ends, config.timesteps, dtype=torch.float64).square())


def cosine(config: ScheduleConfig) -> Schedule:
    """alpha_bar a squared cosine of k, betas at most 0.999 (Nichol & Dhariwal 2021, eq. 17)."""
    k = torch.linspace(0, 1, config.timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((k + 0.008) / 1.008 * math.pi / 2).square()
    return _from_betas(config, (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999))


def ve(config: ScheduleConfig) -> Schedule:
    """sigma geometric from sigma_min to sigma_max (Song & Ermon 2019)."""
    config = with_sigmas(config, 0.01, 50.0)
    ends = math.log(config.sigma_min), math.log(config.sigma_max)
    sigmas = torch.linspace(*ends, config.timesteps, dtype=torch.float64).exp()
    return VarianceExploding(config, torch.cat([torch.zeros_like(sigmas[:1]), sigmas]))


def _from_betas(config: ScheduleConfig, betas: Tensor) -> VariancePreserving:
    """The schedule whose step k adds noise of variance betas[k] (Ho et al. 2020, eq. 4)."""
    alpha_bar = torch.cumprod(1 - betas, 0)
    if config.zero_terminal_snr:  # Lin et al. 2023, algorithm 1: shift sqrt(alpha_bar) to end at 0, keep its start
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    alpha_bar = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar])
    return VariancePreserving(config, ((1 - alpha_bar) / alpha_bar).sqrt())
